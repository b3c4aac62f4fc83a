"""mlx-lqr serve: a model over HTTP, with OpenAI's interface and steering."""

from __future__ import annotations

import logging
import os
import re
import sys
from importlib import util
from pathlib import Path
from typing import NoReturn

import click

from mlx_lqr.commands.help import SERVER, command, option, together
from mlx_lqr.commands.kept_controllers import kept_controller
from mlx_lqr.commands.options import Loading, concept_option, controller_option, loading_options, model_argument
from mlx_lqr.commands.output import say
from mlx_lqr.commands.progress import progress_bars
from mlx_lqr.commands.running import load_to_run
from mlx_lqr.concepts import bundled_prompts
from mlx_lqr.errors import InputError
from mlx_lqr.files.cache import cache_folder
from mlx_lqr.files.private import others_may_open
from mlx_lqr.files.text import read_text
from mlx_lqr.launched import refuse_several
from mlx_lqr.runtime.arguments import ControllerChoice, load_controller
from mlx_lqr.runtime.streams import drop_output

KEY = "MLX_LQR_API_KEY"
NEEDED = ("starlette", "uvicorn", "pydantic")


@command()
@together(
    model_argument,
    controller_option(repeat="The server steers by itself with it; repeat it for several at once."),
    concept_option(
        "Offer a bundled concept (see `mlx-lqr concepts`), fitted at the first start; may be repeated.",
        name="concepts",
        multiple=True,
    ),
    option(
        "--folder",
        type=click.Path(file_okay=False),
        metavar="DIR",
        heading=SERVER,
        help="Where the controllers are that clients fit and bring; by default in the cache folder.",
    ),
    option(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        heading=SERVER,
        help="Where to listen. By default only this machine can connect; anything else needs an API key.",
    ),
    option("--port", type=click.IntRange(0, 65535), default=8080, heading=SERVER, help="0 takes a free one."),
    option(
        "--api-key-file",
        type=click.Path(),
        metavar="FILE",
        heading=SERVER,
        help=f"The key that clients have to send, in a file; or in the environment variable {KEY}.",
    ),
    option(
        "--allow-origin",
        "origins",
        multiple=True,
        metavar="URL",
        heading=SERVER,
        help="A web page's origin, such as http://localhost:3000, that may ask from a browser; may be repeated.",
    ),
    option("--slots", type=click.IntRange(min=1), default=8, heading=SERVER, help="Answers written side by side."),
    option("--waiting", type=click.IntRange(min=1), default=64, heading=SERVER, help="Requests that may wait."),
    loading_options,
)
def serve(
    model: str,
    controllers: tuple[ControllerChoice, ...],
    concepts: tuple[str, ...],
    folder: str | None,
    host: str,
    port: int,
    api_key_file: str | None,
    origins: tuple[str, ...],
    slots: int,
    waiting: int,
    loading: Loading,
) -> None:
    """Serve a model over HTTP, steered.

    With OpenAI's interface at /v1, and a page to chat at /. This needs the extra serve: pip install 'mlx-lqr[serve]'.
    """
    for package in NEEDED:
        if util.find_spec(package) is None:
            raise InputError(f"the server needs {package}, which is not installed: pip install 'mlx-lqr[serve]'")
    from mlx_lqr.serving.app import application
    from mlx_lqr.serving.guard import Access, is_loopback
    from mlx_lqr.serving.listen import bound, listen
    from mlx_lqr.serving.service import Service

    refuse_several("a model is served")
    for origin in origins:
        if not re.fullmatch(r"https?://[^/\s*]+", origin):
            raise InputError(f"an origin is such as http://localhost:3000, without a path, not {origin!r}")
    for concept in concepts:
        bundled_prompts(concept)  # refuses an unknown one before the model is loaded
    key = _key(api_key_file)
    if key is None and not is_loopback(host):
        raise InputError(f"on {host} others can connect: give a key with --api-key-file FILE or {KEY}")
    chosen = [load_controller(choice, model) for choice in controllers]
    with bound(host, port) as listening:
        with progress_bars() as progress:
            steerings = [controller for controller, _ in chosen]
            loaded = load_to_run(model, loading, progress, steerings=steerings)
            offered = [kept_controller(loaded, concept, progress)[1] for concept in concepts]
        kept = Path(folder) if folder is not None else cache_folder() / "served" / loaded.fingerprint
        service = Service(loaded, kept, slots=slots, waiting=waiting)
        for steering, strengths in chosen:
            service.controllers.add_several(steering, strengths)
        for concept, controller in zip(concepts, offered, strict=True):
            service.controllers.add(concept, controller)
        for note in service.controllers.load_folder():
            say(f"Note: {note}", err=True)
        _log_to_stderr()
        app = application(service, Access(host, key), origins=origins)
        place = f"[{host}]" if ":" in host else host

        def ready() -> None:
            say(f"Serving {loaded.name} at http://{place}:{listening.getsockname()[1]} (Ctrl-C stops it)")
            sys.stdout.flush()

        try:
            listen(app, listening, ready=ready, hurry=service.hurry)
        finally:
            service.close()
        say("Stopped.")
    _leave()


def _leave() -> NoReturn:
    """End the process here: MLX may abort where Python unloads it after other threads than the first have computed."""
    drop_output()
    os._exit(0)


def _key(file: str | None) -> str | None:
    """The API key, from a file or the environment."""
    if file is not None:
        key = read_text(file).strip()
        if others_may_open(file):
            say(f"Note: others may read {file}: chmod 600 {file}", err=True)
    else:
        if KEY not in os.environ:
            return None
        key = os.environ[KEY].strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"the API key in {file or KEY} must be printable ASCII characters without spaces")
    return key


class _OneLine(logging.Formatter):
    """Nothing in a line commands a terminal, and no line looks like another one."""

    def format(self, record: logging.LogRecord) -> str:
        return repr(super().format(record))[1:-1]


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(asctime)s %(message)s", "%H:%M:%S"))
    for name in ("mlx_lqr.serving", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.propagate = False
    logging.getLogger("mlx_lqr.serving").setLevel(logging.INFO)

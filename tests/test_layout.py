"""The directions in which imports may point, and what an import costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from built_wheel import built
from helpers.platforms import posix

import mlx_lqr
from mlx_lqr.loading import resolve

ROOT = Path(__file__).parents[1]
TENSOR_FRAMEWORKS = {"mlx", "mlx_lm", "torch", "transformers"}

LAYERS = [
    {"errors", "starting"},
    {"launched"},
    {"convert.gguf_file"},
    {"files", "backends.mlx.device"},
    {"concepts", "backends.blas", "backends.text", "backends.checkpoint"},
    {"backends.description", "backends.measurement"},
    {"backends.protocol"},
    {"backends"},
    {"lqr"},
    {"methods"},
    {"convert"},
    {"backends.llama"},  # runs GGUF files, which convert knows
    {"loading"},
    {"runtime", "analysis"},
    {"tasks", "serving"},
    {"sharing"},
    {"commands"},
    {"__main__"},
]
"""From the bottom to the top. A module may import from its own entry and from the layers below, but not from another
entry of its layer: runtime and analysis know nothing of each other, nor do tasks and serving."""

# What a model is and can do, and what to say where it cannot.
PROTOCOL = {"backends.protocol", "backends.capabilities", "backends.description", "backends.measurement"}
FROM_BACKENDS = {
    "convert": {*PROTOCOL, "backends.borrowed", "backends.checkpoint", "backends.mlx"},  # it writes MLX's
    "loading": {*PROTOCOL, "backends.backend", "backends.checkpoint", "backends.registry"},  # an adapter, read
    "lqr": PROTOCOL,
    "methods": PROTOCOL,
    "analysis": PROTOCOL,
    "runtime": {*PROTOCOL, "backends.text", "backends.overflow"},
    "serving": {*PROTOCOL, "backends.text", "backends.overflow"},
    "tasks": PROTOCOL,
    "sharing": PROTOCOL,
    "tasks.lm_eval": {*PROTOCOL, "backends.borrowed", "backends.mlx"},  # mlx-lm's own evaluator
    "commands": {*PROTOCOL, "backends.registry"},
}
"""What of backends/ a folder may import. A backend's own folder stays out of everybody else's sight."""


def modules() -> Iterator[tuple[str, Path]]:
    for folder, prefix in (("mlx_lqr", ""), ("runtime", "runtime."), ("convert", "convert.")):
        for file in sorted((ROOT / folder).rglob("*.py")):
            name = prefix + ".".join(file.relative_to(ROOT / folder).with_suffix("").parts)
            yield name.removesuffix(".__init__"), file


def imports(file: Path, *, top_level: bool = False) -> Iterator[str]:
    """Absolute names of all modules that a file imports, or of those it imports when it is itself imported."""
    tree = ast.parse(file.read_text("utf-8"))
    package = "mlx_lqr." + file.parent.name
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = f"{package}.{node.module or ''}".rstrip(".") if node.level else node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names)


def entry_of(name: str, entries: Iterable[str]) -> str | None:
    """The entry that a module belongs to: the longest that its name begins with."""
    while name and name not in entries:
        name = name.rpartition(".")[0]
    return name or None


def of_the_library(file: Path) -> Iterator[str]:
    """What a file imports of the library, without the library's own name."""
    return (name.removeprefix("mlx_lqr.") for name in imports(file) if name.startswith("mlx_lqr."))


@pytest.mark.parametrize(("name", "file"), [entry for entry in modules() if entry[0] != "__init__"])
def test_imports_point_downwards(name: str, file: Path) -> None:
    heights = {entry: height for height, layer in enumerate(LAYERS) for entry in layer}
    own = entry_of(name, heights)
    assert own is not None, f"{name} has no layer: give it one"
    for imported in of_the_library(file):
        theirs = entry_of(imported, heights)
        assert theirs is not None
        below = theirs == own or heights[theirs] < heights[own]
        assert below, f"{name} imports {imported}, which does not stand below it"


@pytest.mark.parametrize(("name", "file"), [entry for entry in modules() if not entry[0].startswith("backends.")])
def test_nobody_reaches_into_a_backend(name: str, file: Path) -> None:
    entry = entry_of(name, FROM_BACKENDS)
    allowed = FROM_BACKENDS[entry] if entry is not None else set()
    for imported in of_the_library(file):
        if imported.startswith("backends.") and name != "__init__":
            assert entry_of(imported, allowed), f"{name} imports {imported}"


@pytest.mark.parametrize(("name", "file"), list(modules()))
def test_private_names_stay_in_their_module(name: str, file: Path) -> None:
    private = [imported for imported in of_the_library(file) if imported.rpartition(".")[2].startswith("_")]
    assert not [imported for imported in private if not imported.endswith("__")], f"{name} imports {private}"


@pytest.mark.parametrize(("name", "file"), list(modules()))
def test_only_backends_and_converters_know_a_tensor_framework(name: str, file: Path) -> None:
    frameworks = {imported.partition(".")[0] for imported in imports(file)} & TENSOR_FRAMEWORKS
    if name.startswith("backends.torch"):
        assert frameworks <= {"torch", "transformers"}
    elif name.startswith("backends.mlx") or name.startswith("convert."):
        assert frameworks <= {"mlx", "mlx_lm", "transformers"}  # the last for tokenizers in older formats
    else:
        assert not frameworks
    if name.startswith("backends.") and name.endswith(".backend"):  # is imported to list the backends
        assert not {imported.partition(".")[0] for imported in imports(file, top_level=True)} & TENSOR_FRAMEWORKS


def loaded_after(code: str) -> set[str]:
    command = [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def run_apart(*codes: str) -> None:
    """Each in a process of its own, that has of mlx_lm's imports transformers already, which takes seconds."""
    script = (
        "import os, sys, traceback\nfrom transformers import AutoTokenizer, PreTrainedTokenizerFast\n"
        "for code in sys.argv[1:]:\n"
        "    if not (child := os.fork()):\n"
        "        try:\n            exec(code, {})\n"
        "        except BaseException:\n            traceback.print_exc()\n            os._exit(1)\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0, code"
    )
    done = subprocess.run([sys.executable, "-c", script, *codes], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_library_imports_no_framework() -> None:
    loaded = loaded_after("import mlx_lqr, mlx_lqr.commands")
    assert not loaded & {"torch", "transformers", "mlx_lm", "mlx.core", "scipy", "rich", "prompt_toolkit", "jinja2"}


def test_a_model_is_loaded_and_run_without_torch_and_transformers() -> None:
    loaded = loaded_after(
        "sys.modules['torch'] = None\nimport mlx_lqr\n"
        "mlx_lqr.generate(mlx_lqr.load('demo'), 'Once', max_tokens=2, temperature=1.0, top_p=0.9)"
    )
    assert "mlx_lm.models.llama" in loaded
    assert "transformers" not in loaded


def test_a_model_runs_on_torch_without_mlx() -> None:
    demo = resolve("demo")[0]  # the one thing that needs MLX is to convert it
    loaded = loaded_after(
        "sys.modules['mlx.core'] = sys.modules['mlx_lm'] = None\nimport mlx_lqr\n"
        f"model = mlx_lqr.load({str(demo)!r}, backend='torch')\n"
        "controller = mlx_lqr.fit(model, ['a dog'], ['a stone'], cost='feature', layers=[28, 29])\n"
        "mlx_lqr.generate(model, 'Once', controller=controller, max_tokens=2, temperature=1.0, top_p=0.9)"
    )
    assert "transformers.models.llama.modeling_llama" in loaded
    assert not any(name.startswith("mlx.") for name in loaded - {"mlx.core"})


@posix
def test_mlx_lm_is_whole_when_it_is_wanted() -> None:
    """Our short cut to mlx-lm's model classes must not show, in whichever order things are imported."""
    run_apart(
        "import mlx_lqr\nmlx_lqr.load('demo')\nimport mlx_lm, mlx_lm.models.llama, mlx_lm.sample_utils\n"
        "assert callable(mlx_lm.generate) and callable(mlx_lm.load)\n"
        "from mlx_lm import stream_generate, convert\nfrom mlx_lm.generate import generate_step\n"
        "assert mlx_lm.models.llama.Model and mlx_lm.__version__",
        "import mlx_lqr\nmlx_lqr.load('demo')\nimport mlx_lm.generate\nassert callable(mlx_lm.generate)\n"
        "from mlx_lm.models import cache\nassert mlx_lm.models.cache is cache",
        "import mlx_lqr\nfirst = mlx_lqr.load('demo').module.__class__\nfrom mlx_lm.utils import load_model\n"
        "import mlx_lm.models.llama\nassert mlx_lm.models.llama.Model is first\nfrom mlx_lm import sample_utils\n"
        "assert mlx_lm.__spec__.loader is mlx_lm.__loader__ is not None\n"
        "import importlib\nimportlib.reload(mlx_lm)",
        "import mlx_lm\nimport mlx_lqr\nassert mlx_lqr.load('demo').module.__class__ is mlx_lm.models.llama.Model",
    )


def test_mlx_may_be_imported_first() -> None:
    loaded_after("import mlx.core\nimport mlx_lqr\nmlx_lqr.generate(mlx_lqr.load('demo'), 'Once', max_tokens=1)")


def test_the_package_holds_everything(tmp_path: Path) -> None:
    """A wheel built from the checkout has the concepts, the type marker and what stands outside mlx_lqr/."""
    wheel = built(tmp_path)
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in (
        "runtime/decode.py",
        "convert/sources.py",
        "py.typed",
        "concepts/dog.positive.txt",
        "backends/llama/native.c",
        "commands/chat.py",
        "serving/page/index.html",
        "serving/page/app.js",
        "tasks/bundled/words.json",
        "tasks/bundled/capability.jsonl",
    ):
        assert f"mlx_lqr/{file}" in names
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"mlx_lqr"}
    for name, module in modules():
        path = name.replace(".", "/").removesuffix("__init__")
        assert f"mlx_lqr/{path}.py" in names or f"mlx_lqr/{path}/__init__.py".replace("//", "/") in names, module
    assert wheel.name.startswith(f"mlx_lqr-{mlx_lqr.__version__}-")


def test_one_place_says_the_version() -> None:
    said = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert said is not None
    assert mlx_lqr.__version__ == said[1]
    assert said[1] not in "".join(file.read_text("utf-8") for _, file in modules())


ASKS = {"default_device", "is_available", "metal", "gpu", "platform", "machine", "system", "uname"}
"""Names of what tells where a program runs."""
MAY_ASK = {
    "backends.mlx.device": ASKS,
    "backends.blas": {"platform", "machine"},  # in which words to say how to install one
    "backends.torch.backend": {"platform", "is_available"},  # what NVIDIA's driver is called on Windows; torch.cuda
    "backends.torch.load": {"is_available"},  # torch.cuda
}


@pytest.mark.parametrize(("name", "file"), list(modules()))
def test_one_place_asks_where_mlx_computes(name: str, file: Path) -> None:
    """Or a rehearsal of Metal on the CPU would leave a branch out."""
    asked = {node.attr for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Attribute)}
    assert asked & ASKS <= MAY_ASK.get(name, set())

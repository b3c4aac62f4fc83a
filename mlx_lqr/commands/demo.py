"""mlx-lqr demo: fit a concept on a small model, steer with it, and show text and tracking."""

from __future__ import annotations

from pathlib import Path

from mlx_lqr.analysis.tracking import track
from mlx_lqr.backends.protocol import Model
from mlx_lqr.commands.fit import to_try
from mlx_lqr.commands.help import command
from mlx_lqr.commands.options import Loading, concept_option, loading_options, max_tokens_option, prompt_option
from mlx_lqr.commands.output import say
from mlx_lqr.commands.progress import progress_bars
from mlx_lqr.commands.tables import show_table
from mlx_lqr.concepts import bundled_prompts
from mlx_lqr.errors import InputError
from mlx_lqr.files.cache import cache_folder
from mlx_lqr.launched import refuse_several
from mlx_lqr.loading import load
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.lqr.fit import fit
from mlx_lqr.lqr.tracking import as_strength
from mlx_lqr.runtime import stream

STRENGTHS = (1.0, 2.0, 4.0)


@command()
@concept_option("One of `mlx-lqr concepts`.", default="dog")
@prompt_option("The text to continue.", default="Once upon a time,")
@max_tokens_option(40)
@loading_options
def demo(concept: str, prompt: str, max_tokens: int, loading: Loading) -> None:
    """Steer a small model towards a concept.

    Fits the concept on SmolLM2-135M, and shows what the model writes unsteered and at three strengths.
    """
    refuse_several("the demonstration runs")
    bundled_prompts(concept)  # refuses an unknown concept before the model is fetched
    with progress_bars() as progress:
        model = load("demo", **loading, progress=progress)
    controller = _controller(model, concept)
    say(f'\n{model.name} continues "{prompt}"\n')
    _sample("not steered", model, prompt, None, 0.0, max_tokens)
    for strength in STRENGTHS:
        _sample(f"{concept}, strength {strength:g}", model, prompt, controller, strength, max_tokens)
    _tracking_table(model, prompt, controller)
    file = _controller_file(model, concept)
    say(f"\nThe controller: {file} ({file.stat().st_size / 1000:.0f} kB). Go on with it:")
    say(f"  mlx-lqr chat demo -c {to_try(str(file), controller)}")


def _controller(model: Model, concept: str) -> Controller:
    """The demonstration's controller, fitted once and kept in the cache folder."""
    file = _controller_file(model, concept)
    try:
        controller = Controller.load(file)
        controller.check_model(model)
        return controller
    except InputError:
        pass
    positive, negative = bundled_prompts(concept)
    with progress_bars() as progress:
        controller = fit(model, positive, negative, concept=concept, progress=progress)
    controller.save(file, force=True)  # even over a damaged one
    return controller


def _controller_file(model: Model, concept: str) -> Path:
    return cache_folder() / "demo" / f"{concept}-{model.fingerprint}.safetensors"


def _sample(
    title: str, model: Model, prompt: str, controller: Controller | None, strength: float, max_tokens: int
) -> None:
    say(f"[{title}]", nl=False, bold=True)
    say(f" {prompt}", nl=False)
    for piece in stream(model, prompt, controller=controller, strength=strength, max_tokens=max_tokens):
        say(piece.text, nl=False)
    say("\n")


def _tracking_table(model: Model, prompt: str, controller: Controller) -> None:
    """Feature against setpoint at the prompt's last token, as strengths."""
    say("Tracking at the prompt's last token: the strength that the feature v_k.z_k of layer k amounts to")
    unsteered = track(model, prompt, controller, 0.0, steered=False).feature
    features = [unsteered, *(track(model, prompt, controller, strength).feature for strength in STRENGTHS)]
    reached = [as_strength(controller, feature[:, 0]) for feature in features]
    show_table(
        ["layer", "not steered", *(f"strength {strength:g}" for strength in STRENGTHS)],
        [[str(k), *(f"{column[k]:.2f}" for column in reached)] for k in controller.active_layers],
        left=(),
    )

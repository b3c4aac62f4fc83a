"""mlx-lqr demo: fit a concept on a small model, steer with it, and show text and tracking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlx_lqr.analysis.tracking import track
from mlx_lqr.backends.protocol import Model
from mlx_lqr.commands.fit import to_try
from mlx_lqr.commands.help import command
from mlx_lqr.commands.kept_controllers import kept_controller
from mlx_lqr.commands.options import Loading, concept_option, loading_options, max_tokens_option, prompt_option
from mlx_lqr.commands.output import say
from mlx_lqr.commands.progress import progress_bars
from mlx_lqr.commands.tables import show_table
from mlx_lqr.concepts import bundled_prompts
from mlx_lqr.launched import refuse_several
from mlx_lqr.loading import load
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.lqr.prompts import Prompt
from mlx_lqr.lqr.strength import BUDGETS, Budget
from mlx_lqr.lqr.tracking import as_strength
from mlx_lqr.runtime import Options, stream

QUESTION = "What would you like to do today?"
SEED = 1
"""The same random numbers each time, so that everyone sees the texts that the documentation shows."""


@command()
@concept_option("One of `mlx-lqr concepts`.", default="dog")
@prompt_option("The text to continue.", default="Once upon a time,")
@max_tokens_option(60)
@loading_options
def demo(concept: str, prompt: str, max_tokens: int, loading: Loading) -> None:
    """Steer a small model towards a concept.

    Fits the concept on SmolLM2-135M, and shows what the model writes and answers unsteered and at three strengths.
    """
    refuse_several("the demonstration runs")
    bundled_prompts(concept)  # refuses an unknown concept before the model is fetched
    with progress_bars() as progress:
        model = load("demo", **loading, progress=progress)
        file, controller = kept_controller(model, concept, progress)
    strengths = {budget: controller.strength_at(budget)[0] for budget in BUDGETS}
    say(f'\n{model.name} continues "{prompt}"\n')
    _samples(concept, model, prompt, prompt, controller, strengths, max_tokens)
    if model.tokenizer.has_chat_template:
        say(f'and answers "{QUESTION}"\n')
        asked = model.tokenizer.chat([{"role": "user", "content": QUESTION}])
        _samples(concept, model, asked, "", controller, strengths, max_tokens)
    _tracking_table(model, prompt, controller, list(strengths.values()))
    say(f"\nThe controller: {file} ({file.stat().st_size / 1000:.0f} kB). Go on with it:")
    say(f"  mlx-lqr chat demo -c {to_try(str(file), controller)}")


def _samples(
    concept: str,
    model: Model,
    prompt: Prompt,
    shown: str,
    controller: Controller,
    strengths: Mapping[Budget, float],
    max_tokens: int,
) -> None:
    """What follows a prompt, unsteered and at every strength, after what is shown of the prompt."""
    titles = {f"{concept}, {budget}: strength {strength:g}": strength for budget, strength in strengths.items()}
    for title, strength in {"not steered": 0.0, **titles}.items():
        say(f"[{title}]", nl=False, bold=True)
        say(f" {shown}", nl=False)
        options: Options = {"controller": controller, "strength": strength, "max_tokens": max_tokens, "seed": SEED}
        for piece in stream(model, prompt, **options):
            say(piece.text, nl=False)
        say("\n")


def _tracking_table(model: Model, prompt: str, controller: Controller, strengths: Sequence[float]) -> None:
    """Feature against setpoint at the prompt's last token, as strengths."""
    say("Tracking at the prompt's last token: the strength that the feature of layer k amounts to")
    unsteered = track(model, prompt, controller, 0.0, steered=False).feature
    features = [unsteered, *(track(model, prompt, controller, strength).feature for strength in strengths)]
    reached = [as_strength(controller, feature[:, 0]) for feature in features]
    show_table(
        ["layer", "not steered", *(f"strength {strength:g}" for strength in strengths)],
        [[str(k), *(f"{column[k]:.2f}" for column in reached)] for k in controller.active_layers],
        left=(),
    )

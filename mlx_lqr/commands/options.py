"""Every option that several commands have, declared once: its name, its meaning and its heading in `--help`.

What differs from command to command is an argument here: a default, or the words for what the option does there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, get_args

import click

from mlx_lqr.backends.protocol import Sampling
from mlx_lqr.commands.help import (
    CONCEPT,
    DECODING,
    LOADING,
    MEASURING,
    METHOD,
    OUTPUT,
    STEERING,
    TEXT,
    Decorator,
    argument,
    option,
    together,
)
from mlx_lqr.commands.values import ControllerType, LayersType, StrengthsType
from mlx_lqr.loading import BackendName
from mlx_lqr.lqr.strength import Budget
from mlx_lqr.runtime.arguments import (
    ADAPTER_HELP,
    BUDGET_HELP,
    DECODING_HELP,
    DTYPE_DEFAULT,
    STRENGTH_HELP,
    ControllerChoice,
    with_budget,
)
from mlx_lqr.runtime.decode import Overflow

MODEL_HELP = 'An MLX or Hugging Face folder, a hub id, a .gguf file, or "demo".'
model_argument = argument("model", help=MODEL_HELP)


class Loading(TypedDict):
    """How a command loads its model, by the names of `mlx_lqr.load`."""

    backend: BackendName
    device: str | None
    dtype: str | None
    adapter: str | None
    pipeline: bool


def dtype_option(help: str, heading: str = LOADING) -> Decorator:
    return option("--dtype", metavar="DTYPE", heading=heading, help=f"float32, float16 or bfloat16; {help}")


def loading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How the model is loaded, which the command gets as one argument `loading`."""

    @together(
        option(
            "--backend",
            type=click.Choice(get_args(BackendName)),
            default="auto",
            heading=LOADING,
            help="What computes. auto is MLX on a Mac's GPU, torch with CUDA, and MLX where there is only a CPU; "
            "commands that only run a .gguf file take llama (llama.cpp) there, if it is installed.",
        ),
        option(
            "--device",
            metavar="DEVICE",
            heading=LOADING,
            help="For torch: cpu, cuda or cuda:NUMBER; by default a GPU if there is one.",
        ),
        dtype_option(DTYPE_DEFAULT),
        option("--adapter", type=click.Path(), metavar="FOLDER", heading=LOADING, help=ADAPTER_HELP),
        option(
            "--pipeline",
            is_flag=True,
            heading=LOADING,
            help="Under mlx.launch: each machine runs some of the layers, instead of a part of every layer.",
        ),
    )
    @functools.wraps(command)
    def collected(
        *,
        backend: BackendName,
        device: str | None,
        dtype: str | None,
        adapter: str | None,
        pipeline: bool,
        **others: Any,
    ) -> Any:
        loading = Loading(backend=backend, device=device, dtype=dtype, adapter=adapter, pipeline=pipeline)
        return command(loading=loading, **others)

    return collected


def controller_option(
    *,
    swept: bool = False,
    required: bool = False,
    several_strengths: bool = False,
    repeat: str = "Repeat it for several at once.",
) -> Decorator:
    """-c FILE[:STRENGTH] and --budget, which a command gets as one tuple of `ControllerChoice`.

    Args:
        swept: the command runs at several strengths, those of `strengths_option`.
        required: there must be at least one.
        several_strengths: FILE:1,2,3 is fine too.
        repeat: what several of them are for.
    """
    otherwise = "each of --strengths" if swept else "the strength that the file recommends, or 1"
    what = f"Steer with the controller in FILE at STRENGTH; without one, at {otherwise}. {STRENGTH_HELP} {repeat}"
    return together(
        option(
            "-c",
            "--controller",
            "controllers",
            type=ControllerType(several_strengths=several_strengths),
            multiple=True,
            required=required,
            metavar="FILE[:STRENGTH]",
            heading=STEERING,
            callback=_with_budget,
            help=what.strip(),
        ),
        budget_option(BUDGET_HELP, heading=STEERING, is_eager=True, expose_value=False, callback=_remember_budget),
    )


def budget_option(help: str, *, heading: str, **attributes: Any) -> Decorator:
    return option(
        "--budget", type=click.Choice(get_args(Budget)), metavar="BUDGET", heading=heading, help=help, **attributes
    )


_BUDGET = "mlx_lqr.budget"


def _remember_budget(ctx: click.Context, parameter: click.Parameter, value: Budget | None) -> None:
    """Keep it for -c, which click reads later since this option is eager."""
    ctx.meta[_BUDGET] = value


def _with_budget(
    ctx: click.Context, parameter: click.Parameter, value: tuple[ControllerChoice, ...]
) -> tuple[ControllerChoice, ...]:
    return with_budget(value, ctx.meta.get(_BUDGET))


strengths_option = option(
    "--strengths",
    type=StrengthsType(),
    metavar="NUMBERS",
    heading=STEERING,
    help="The strengths to run at, for each FILE without a STRENGTH of its own, such as 1,2,3, 0.5x,1x,2x or "
    "gentle,strong. By default 0.5x,1x,2x; where a FILE recommends none, so much of what its method suggests.",
)
adaptive_option = option(
    "--adaptive/--stored",
    default=None,
    heading=STEERING,
    help="Recompute the gains for each prompt, or use those in the file. By default what the file was fitted for.",
)


def prompt_option(help: str, default: str | None = None) -> Decorator:
    return option("-p", "--prompt", metavar="TEXT", default=default, heading=TEXT, help=help)


def prompts_option(help: str, name: str = "prompts") -> Decorator:
    return option("--prompts", name, type=click.Path(), metavar="FILE", heading=TEXT, help=help)


def max_tokens_option(default: int | None, help: str = DECODING_HELP["max_tokens"], type: Any = int) -> Decorator:
    return option("-n", "--max-tokens", type=type, default=default, heading=DECODING, help=help)


def temperature_option(default: float) -> Decorator:
    return option("--temperature", default=default, heading=DECODING, help=DECODING_HELP["temperature"])


def top_p_option(default: float) -> Decorator:
    return option("--top-p", default=default, heading=DECODING, help=DECODING_HELP["top_p"])


def frequency_penalty_option(default: float | None) -> Decorator:
    help = DECODING_HELP["frequency_penalty"]
    return option("--frequency-penalty", type=float, default=default, heading=DECODING, help=help)


def seed_option(help: str, default: int | None = None, heading: str = MEASURING) -> Decorator:
    return option("--seed", type=int, default=default, heading=heading, help=help)


def decoding_options(max_tokens: int) -> Decorator:
    """The options of `mlx_lqr.Options` that are plain values, under the same names; `stop` is a tuple."""
    penalty, when_full = DECODING_HELP["repetition_penalty"], DECODING_HELP["overflow"]
    return together(
        max_tokens_option(max_tokens),
        temperature_option(Sampling.temperature),
        top_p_option(Sampling.top_p),
        option("--top-k", default=Sampling.top_k, heading=DECODING, help=DECODING_HELP["top_k"]),
        option("--min-p", default=Sampling.min_p, heading=DECODING, help=DECODING_HELP["min_p"]),
        option("--repetition-penalty", default=Sampling.repetition_penalty, heading=DECODING, help=penalty),
        frequency_penalty_option(Sampling.frequency_penalty),
        option("--presence-penalty", default=0.0, heading=DECODING, help=DECODING_HELP["presence_penalty"]),
        seed_option(DECODING_HELP["seed"], heading=DECODING),
        option("--stop", multiple=True, metavar="TEXT", heading=DECODING, help=DECODING_HELP["stop"]),
        option("--overflow", type=click.Choice(get_args(Overflow)), default="error", heading=DECODING, help=when_full),
    )


def concept_option(help: str, default: str | None = None, name: str = "concept", **attributes: Any) -> Decorator:
    return option("--concept", name, metavar="NAME", default=default, heading=CONCEPT, help=help, **attributes)


contrast_options = together(
    concept_option("A bundled contrast set (see `mlx-lqr concepts`), or a name for your own."),
    option(
        "--positive",
        type=click.Path(),
        metavar="FILE",
        heading=CONCEPT,
        help='Prompts that have the concept: one a line, or JSON lines with a "prompt" key.',
    ),
    option("--negative", type=click.Path(), metavar="FILE", heading=CONCEPT, help="Prompts that lack it."),
    option(
        "--chat-prompts/--plain-prompts",
        default=None,
        heading=CONCEPT,
        help="Take each prompt as the beginning of an answer in the chat template, or as it is. By default the former "
        "where the model has a template.",
    ),
)


def method_option(names: Sequence[str], default: str) -> Decorator:
    return option(
        "--method",
        type=click.Choice(names),
        metavar="METHOD",
        default=default,
        heading=METHOD,
        help=f"How to steer: {', '.join(names)}.",
    )


def layers_option(help: str) -> Decorator:
    """--layers, which a command gets as a list of numbers, "auto", "all" or None."""
    return option("--layers", type=LayersType(), metavar="LAYERS", heading=METHOD, help=help)


def positions_option(help: str) -> Decorator:
    return option("--positions", type=click.Choice(["last", "all"]), heading=METHOD, help=help)


def jacobians_option(help: str, heading: str = METHOD) -> Decorator:
    return option("--jacobians", type=click.Path(), metavar="FILE", heading=heading, help=help)


def limit_option(help: str) -> Decorator:
    return option("--limit", type=click.IntRange(min=1), heading=MEASURING, help=help)


def tradeoff_options(damages: Sequence[str], control: str) -> Decorator:
    """--control and --damage: what steering is for, and what it costs.

    Args:
        damages: the metrics to choose from.
        control: what --control is there for.
    """
    return together(
        option("--control", metavar="METRIC", heading=MEASURING, help=f"{control}; by default what the task is about."),
        option(
            "--damage",
            type=click.Choice(damages),
            default="perplexity",
            heading=MEASURING,
            help="What steering costs, in this metric.",
        ),
    )


def output_option(help: str, *, required: bool = True, metavar: str = "FILE") -> Decorator:
    return option("-o", "--output", type=click.Path(), required=required, metavar=metavar, heading=OUTPUT, help=help)


force_option = option("--force", is_flag=True, heading=OUTPUT, help="Replace whatever file is there, of any kind.")


def json_option(help: str = "Print everything as JSON, for scripts.") -> Decorator:
    return option("--json", "as_json", is_flag=True, heading=OUTPUT, help=help)

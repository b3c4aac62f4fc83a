"""The pictures of README.md, from what SmolLM2 says and measures: docs/chat.svg and docs/tracking.svg.

    make figures

One controller, for "ocean", with the defaults of `fit`. The answers are the model's likeliest tokens, and end where
TOKENS do. It takes about a minute on two cores.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

import mlx_lqr
from mlx_lqr.analysis import default_prompts, track
from mlx_lqr.backends.protocol import Model
from mlx_lqr.files.atomic import writing
from mlx_lqr.lqr.tracking import as_strength

DOCS = Path(__file__).resolve().parents[1] / "docs"
CONCEPT = "ocean"
QUESTIONS = ("Tell me about your day.", "Recommend me a book.")
STRENGTH = 0.6
TOKENS = 48
STRENGTHS = (0.5, 0.75, 1.0)
PROMPTS = 24
"""Half sentences about something else, at whose last tokens the feature is measured."""

WIDTH = 860
FONT = "font-family: system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
STYLE = f"""<style>
  text {{ {FONT}; fill: #1f2328; font-size: 14px }}
  .card {{ fill: #ffffff; stroke: #d0d7de }} .question {{ fill: #e7ecf1 }} .plain {{ fill: #f4f5f7 }}
  .steered {{ fill: #d8f0ee }} .quiet {{ fill: #59636e; font-size: 13px }} .title {{ font-weight: 600 }}
  .grid {{ stroke: #d0d7de }} .setpoint {{ stroke: #59636e; stroke-dasharray: 5 4 }}
  .line {{ fill: none; stroke-width: 2.5; stroke-linejoin: round }}
  .unsteered {{ stroke: #818b96 }} .under {{ stroke: #0f766e }} .dot {{ fill: #0f766e }}
  .acts {{ fill: #d8f0ee; opacity: 0.6 }}
  @media (prefers-color-scheme: dark) {{
    text {{ fill: #e6edf3 }} .card {{ fill: #12171e; stroke: #3d444d }} .question {{ fill: #2a313c }}
    .plain {{ fill: #1d232b }} .steered {{ fill: #103c3a }} .quiet {{ fill: #9198a1 }} .grid {{ stroke: #30363d }}
    .setpoint {{ stroke: #9198a1 }} .under {{ stroke: #2dd4bf }} .dot {{ fill: #2dd4bf }} .acts {{ fill: #103c3a }}
  }}
</style>"""


@dataclass(frozen=True)
class Exchange:
    question: str
    unsteered: str
    steered: str


@click.command()
@click.option(
    "--docs", type=click.Path(path_type=Path), default=DOCS, show_default=True, help="Where they are written."
)
def main(docs: Path) -> None:
    """Measure, and draw the pictures of README.md."""
    model = mlx_lqr.load("demo")
    controller = mlx_lqr.fit(model, *mlx_lqr.bundled_prompts(CONCEPT), concept=CONCEPT)
    exchanges = [exchange(model, controller, question) for question in QUESTIONS]
    pictures = {
        "chat": chat(exchanges),
        "tracking": tracking(controller.active_layers, *features(model, controller)),
    }
    for name, picture in pictures.items():
        with writing(docs / f"{name}.svg") as temporary:
            temporary.write_text(picture, "utf-8")
        click.echo(f"Wrote {docs / name}.svg")


def exchange(model: Model, controller: mlx_lqr.Controller, question: str) -> Exchange:
    """Both answers to a question, in the model's chat template."""
    prompt = model.tokenizer.chat([{"role": "user", "content": question}])
    answers = [
        mlx_lqr.generate(model, prompt, controller=controller, strength=strength, max_tokens=TOKENS, temperature=0)
        for strength in (0.0, STRENGTH)
    ]
    return Exchange(question, *answers)


def features(model: Model, controller: mlx_lqr.Controller) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Medians over prompts of the feature, as a strength: unsteered (T,), and at each of STRENGTHS (S, T)."""
    prompts = default_prompts(PROMPTS, without=[CONCEPT])

    def median(strength: float, steered: bool) -> NDArray[np.float32]:
        measured = [track(model, prompt, controller, strength, steered=steered).feature[:, 0] for prompt in prompts]
        return np.median([as_strength(controller, feature) for feature in measured], axis=0)

    return median(0.0, False), np.stack([median(strength, True) for strength in STRENGTHS])


def chat(exchanges: Sequence[Exchange]) -> str:
    """Questions, each with both answers side by side."""
    margin, gap, padding, line = 24, 20, 14, 20
    column = (WIDTH - 2 * margin - gap) // 2
    columns = (margin, margin + column + gap)
    parts = [
        text(columns[0], 40, "Not steered", "title"),
        text(columns[1], 40, f"Steered: {CONCEPT}, strength {STRENGTH:g}", "title"),
    ]
    y = 58
    for one in exchanges:
        answers = [wrapped(answer) for answer in (one.unsteered, one.steered)]
        height = max(map(len, answers)) * line + 2 * padding - 4
        width = 8.6 * len(one.question) + 2 * padding
        parts += [box(margin, y, width, 34, "question"), text(margin + padding, y + 22, one.question)]
        y += 34 + 12
        for x, lines, kind in zip(columns, answers, ("plain", "steered"), strict=True):
            parts.append(box(x, y, column, height, kind))
            parts += [text(x + padding, y + padding + 12 + i * line, words) for i, words in enumerate(lines)]
        y += height + 22
    said = f"SmolLM2-135M-Instruct, its likeliest tokens, {TOKENS} of them; the same model, the same questions"
    parts.append(text(margin, y + 4, said, "quiet"))
    return drawing(y + 24, parts, f"A chat with SmolLM2, not steered and steered towards the {CONCEPT}")


def tracking(layers: Sequence[int], unsteered: NDArray[np.float32], steered: NDArray[np.float32]) -> str:
    """The feature over the last layers: unsteered (T,), and steered (S, T) at each strength beside its setpoint."""
    first, last = layers[0] - 6, len(unsteered) - 1
    left, right, top, bottom = 64, WIDTH - 190, 64, 330
    low, high = -1.0, 3.4

    def x(layer: float) -> float:
        return left + (right - left) * (layer - first) / (last - first)

    def y(feature: float) -> float:
        return bottom - (bottom - top) * (feature - low) / (high - low)

    def curve(feature: NDArray[np.float32], kind: str) -> str:
        points = " ".join(f"{x(k):.1f},{y(feature[k]):.1f}" for k in range(first, last + 1))
        return f'<polyline class="line {kind}" points="{points}"/>'

    def frame() -> Iterator[str]:
        yield text(24, 36, f"How much of “{CONCEPT}” is in the hidden state, layer by layer", "title")
        yield box(x(layers[0]) - 8, top - 8, x(last) - x(layers[0]) + 16, bottom - top + 8, "acts")
        yield text(x(layers[0]), top + 8, "control acts here, at the dots", "quiet")
        for tick in range(int(low), int(high) + 1):
            yield f'<line class="grid" x1="{left}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
            yield text(left - 12, y(tick) + 5, f"{tick}", "quiet", anchor="end")
        for layer in range(first, last + 1):
            yield text(x(layer), bottom + 22, f"{layer}", "quiet", anchor="middle")
        yield text((left + right) / 2, bottom + 44, "layer", "quiet", anchor="middle")

    parts = list(frame())
    for strength, feature in zip(STRENGTHS, steered, strict=True):
        at = y(strength)
        parts += [
            f'<line class="setpoint" x1="{x(layers[0]):.1f}" x2="{right + 12}" y1="{at:.1f}" y2="{at:.1f}"/>',
            text(right + 18, at + 5, f"setpoint, strength {strength:g}", "quiet"),
            curve(feature, "under"),
            *(f'<circle class="dot" cx="{x(k):.1f}" cy="{y(feature[k]):.1f}" r="3.5"/>' for k in layers),
        ]
    parts += [curve(unsteered, "unsteered"), text(right + 18, y(unsteered[last]) + 5, "not steered", "quiet")]
    parts.append(text(right + 18, y(float(np.median(steered[:, last]))) + 5, "steered", "quiet"))
    said = "In strengths: 0 is the level of texts without the concept, 1 of those with it."
    said = f"{said} SmolLM2, medians over {PROMPTS} prompts"
    parts.append(text(24, bottom + 74, said, "quiet"))
    return drawing(
        bottom + 96, parts, f"The feature of {CONCEPT} over the layers: not steered, steered, and the setpoints"
    )


def wrapped(answer: str) -> list[str]:
    """The lines of an answer as it is drawn, with an ellipsis where its tokens ended."""
    whole = " ".join(answer.split())
    return textwrap.wrap(whole if whole.endswith((".", "!", "?")) else f"{whole}\N{NO-BREAK SPACE}...", 48)


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="9"/>'


def drawing(height: float, parts: Sequence[str], title: str) -> str:
    """A card of WIDTH with a background of its own, so that it can be read on any page."""
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" role="img">'
    card = box(0.5, 0.5, WIDTH - 1, height - 1, "card")
    return "\n".join([opening, f"<title>{escape(title)}</title>", STYLE, card, *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()

"""How many prompts to linearise at? Gains and steered text against their number, their subject, and a single prompt.

    python benchmarks/jacobian_prompts.py          # about a quarter of an hour on two cores

Text is sampled from four openings (temperature 0.8, top-p 0.9, no penalty, fixed seeds). `share` is that of samples
with a word of the concept's family, `perplexity` that of the samples under the unsteered model, `distinct-2` the share
of different bigrams within a sample.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import click

import mlx_lqr  # first, so that MLX gets its BLAS
from mlx_lqr.backends.protocol import Model

# isort: split
import numpy as np

OPENINGS = ("Once upon a time,", "I went outside and", "The most important thing is", "Yesterday my friend told me")
FAMILY = re.compile(
    r"\b(dogs?|pupp(y|ies)|hounds?|terriers?|leash|bark(s|ed|ing)?|canines?|retrievers?|poodles?)\b", re.I
)
COUNTS = (1, 2, 4, 8, 16, 32)


def samples(model: Model, controller: mlx_lqr.Controller | None, strength: float, count: int, tokens: int) -> list[str]:
    openings = [OPENINGS[i % len(OPENINGS)] for i in range(count)]
    drawing: mlx_lqr.Options = {"temperature": 0.8, "top_p": 0.9, "frequency_penalty": 0.0, "seed": 0}
    return mlx_lqr.batch_generate(
        model, openings, controller=controller, strength=strength, max_tokens=tokens, **drawing
    )


def perplexity(model: Model, texts: Sequence[str]) -> float:
    pairs = []
    for i, text in enumerate(texts):
        opening, (continuation,) = model.tokenizer.continuations(OPENINGS[i % len(OPENINGS)], [text])
        if continuation:
            pairs.append((opening, continuation))
    return float(np.exp(-np.concatenate(model.log_probabilities(pairs)).mean()))


def distinct_2(model: Model, texts: Sequence[str]) -> float:
    shares = []
    for text in texts:
        tokens = model.tokenizer.encode(text, add_special_tokens=False)
        pairs = list(itertools.pairwise(tokens))
        shares.append(len(set(pairs)) / max(1, len(pairs)))
    return float(np.mean(shares))


def row(
    model: Model, name: str, cosine: str, controller: mlx_lqr.Controller | None, strength: float, count: int
) -> None:
    texts = samples(model, controller, strength, count, tokens=40)
    share = np.mean([bool(FAMILY.search(text)) for text in texts])
    print(
        f"| {name} | {cosine} | {share:.2f} | {perplexity(model, texts):.1f} | {distinct_2(model, texts):.2f} |",
        flush=True,
    )


@click.command()
@click.option("--samples", "count", default=32, show_default=True)
@click.option("--strength", default=2.5, show_default=True)
@click.option("--q", default=1.0, show_default=True, help="q = qf, with r = 1.")
@click.option("--lowest", default=20, show_default=True, help="Control acts from this layer up.")
def main(count: int, strength: float, q: float, lowest: int) -> None:
    """Print a Markdown table for the concept "dog" on SmolLM2-135M-Instruct."""
    model = mlx_lqr.load("demo", dtype="float32")
    positive, negative = mlx_lqr.bundled_prompts("dog")
    layers = range(lowest, model.num_layers)
    order = np.random.default_rng(0).permutation(len(positive))
    shuffled = [positive[i] for i in order]
    sets = {f"{n} of the concept's sentences": shuffled[:n] for n in COUNTS}
    sets["nominal: the opening 'Once upon a time,'"] = [OPENINGS[0]]
    sets["8 sentences without the concept"] = negative[:8]
    sets["8 sentences of another concept (ocean)"] = mlx_lqr.bundled_prompts("ocean")[0][:8]
    sets["8 sentences of another contrast (formal)"] = mlx_lqr.bundled_prompts("formal")[0][:8]
    contrast = mlx_lqr.contrast(model, positive, negative)
    controllers = {}
    for name, prompts in sets.items():
        stored = mlx_lqr.linearize(model, prompts)
        controllers[name] = mlx_lqr.compile(
            mlx_lqr.solve(stored, q, 1.0, q, layers=layers), contrast, "dog", setpoint="paper", feedback=1.0
        )
    reference = controllers[f"{COUNTS[-1]} of the concept's sentences"].gain[lowest:, :, 0]
    print("| linearised at | cosine of g_k to 32's: median, least | share | perplexity | distinct-2 |")
    print("|---|---|---|---|---|")
    row(model, "not steered", "", None, 0.0, count)
    for name, controller in controllers.items():
        g = controller.gain[lowest:, :, 0]
        cosines = (g * reference).sum(axis=1) / (np.linalg.norm(g, axis=1) * np.linalg.norm(reference, axis=1))
        row(model, name, f"{np.median(cosines):.3f}, {cosines.min():.3f}", controller, strength, count)


if __name__ == "__main__":
    main()

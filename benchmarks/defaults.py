"""What `fit` takes where nothing is said, beside the paper's choice: concepts that no other measurement has used.

    python benchmarks/defaults.py demo
    python benchmarks/defaults.py GEMMA-FOLDER --concepts church,football

Share of texts with a word of the concept's family / perplexity over that of the unsteered texts, both under the model
itself, for 16 texts of 20 tokens after the openings that are there to tune on.
"""

from __future__ import annotations

import click

import mlx_lqr  # first, so that MLX gets its BLAS
from mlx_lqr import tasks
from mlx_lqr.tasks.concept import bundled_openings

CONCEPTS = "church,football,love,cloud"
STRENGTHS = (1.0, 2.0, 3.0)
PROMPTS, JACOBIAN_PROMPTS = 40, 4
CHOICES = {
    "paper's": {"layers": "all", "q": 0.1, "qf": 0.1, "setpoint": "paper", "feedback": 1.0},
    "paper's setpoint alone": {"setpoint": "paper", "feedback": 1.0},
    "fit's": {},
    "fit's at q/r = 1": {"q": 1.0, "qf": 1.0},
}


@click.command(help=__doc__)
@click.argument("source")
@click.option("--concepts", default=CONCEPTS, show_default=True)
def main(source: str, concepts: str) -> None:
    model = mlx_lqr.load(source, dtype="float32")
    columns = " | ".join(f"strength {strength:g}" for strength in STRENGTHS)
    print(f"{model.name}\n\n| concept | choice | {columns} |\n|---|---|---|---|---|")
    for concept in concepts.split(","):
        positive, negative = (prompts[:PROMPTS] for prompts in mlx_lqr.bundled_prompts(concept))
        jacobians = mlx_lqr.linearize(model, positive[:JACOBIAN_PROMPTS])
        task = tasks.concept(
            tasks.word_family(concept),
            openings=bundled_openings("tuning")[:8],
            decoding=tasks.Decoding(20, 0.8, samples=2),
            damage=[],
        )
        (unsteered,) = tasks.evaluate(model, task).results()
        for name, options in CHOICES.items():
            controller = mlx_lqr.fit(model, positive, negative, concept=concept, jacobians=jacobians, **options)
            results = tasks.evaluate(model, task, tasks.NamedSteering(name, controller), STRENGTHS).results()
            cells = [
                f"{one.metrics['prevalence'].value:.2f} / "
                f"{one.metrics['perplexity'].value / unsteered.metrics['perplexity'].value:.2f}"
                for one in results
            ]
            print(f"| {concept} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

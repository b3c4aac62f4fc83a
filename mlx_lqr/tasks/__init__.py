"""Evaluation: does steering do what it should, and what does it cost? (needs no tensor framework of its own)

task = tasks.concept(tasks.word_family("dog"), damage=[tasks.NeutralText(), tasks.Capability.bundled()])
steering = tasks.named_steering([("dog.safetensors", 1.0)])
evaluation = tasks.evaluate(model, task, steering, strengths=[0, 1, 2, 3], output="dog.jsonl")
for result in evaluation.results(): result.strength, result.metrics["prevalence"], result.change["perplexity"]

space = tasks.alqr_space(model, contrast, jacobians, concept="dog")
tuned = tasks.tune(model, task, space, damage="perplexity", limit=1.3, folder="dog-tuning")
tuned.steering.save("dog.safetensors")  # with the recommended strength; tuned.trials has every evaluation
"""

from mlx_lqr.tasks.bootstrap import Estimate, Metric, difference, estimate
from mlx_lqr.tasks.chat import chat
from mlx_lqr.tasks.concept import concept, word_family
from mlx_lqr.tasks.damage import Capability, NeutralText
from mlx_lqr.tasks.generations import Decoding, Judge
from mlx_lqr.tasks.refusal import refusal, refuses
from mlx_lqr.tasks.run import Evaluation, Result, Task, evaluate
from mlx_lqr.tasks.spaces import alqr_space, baseline_space
from mlx_lqr.tasks.steering import NamedSteering, Steered, named_steering
from mlx_lqr.tasks.toxicity import toxicity
from mlx_lqr.tasks.truthfulness import truthfulness
from mlx_lqr.tasks.tuning import Candidate, Space, Trial, Tuned, tune

__all__ = [
    "Candidate",
    "Capability",
    "Decoding",
    "Estimate",
    "Evaluation",
    "Judge",
    "Metric",
    "NamedSteering",
    "NeutralText",
    "Result",
    "Space",
    "Steered",
    "Task",
    "Trial",
    "Tuned",
    "alqr_space",
    "baseline_space",
    "chat",
    "concept",
    "difference",
    "estimate",
    "evaluate",
    "named_steering",
    "refusal",
    "refuses",
    "toxicity",
    "truthfulness",
    "tune",
    "word_family",
]

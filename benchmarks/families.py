"""Which architectures of mlx-lm can be steered, tried on tiny models with random weights.

    python benchmarks/families.py                         # the configurations that the tests use too
    python benchmarks/families.py configs.json            # {name: config.json} of your own
    python benchmarks/families.py configs.json --only qwen3_next --only gpt_oss

Every model is written to a folder, loaded from it, fitted with both costs, steered, decoded in a batch and in a chat.
A column says "yes", or why not. The last two are relative errors against differences of mlx-lm's whole model: of single
A_k, and of the product of all.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from tokenizers import Tokenizer, models, pre_tokenizers

import mlx_lqr  # first, so that MLX gets its BLAS
from mlx_lqr import InputError
from mlx_lqr.backends.mlx.measured_model import MeasuredModel
from mlx_lqr.backends.protocol import Model
from mlx_lqr.errors import first_line
from mlx_lqr.runtime import Chat

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm import utils as library

CONFIGS = Path(__file__).parents[1] / "tests" / "helpers" / "families.json"
POSITIVE, NEGATIVE = [[1, 2, 3, 9, 7], [4, 5, 6, 8, 7]], [[6, 7, 3, 2, 8], [8, 3, 1, 1, 8]]
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 6, 7]]
TEMPLATE = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
TOKENS = 8
COLUMNS = ("load", "fit state", "fit feature", "generate", "batch", "chat")


def written(config: dict[str, Any], folder: Path, seed: int = 0) -> Path:
    """A folder with a random model of this config, its norms and biases random too, and a tokenizer of words."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(seed)
    family = config["model_type"]
    names = vars(library).get("MODEL_ARCHITECTURE_REMAPPING", {})
    named = [names[family, kind] for kind in config.get("architectures", ()) if (family, kind) in names]
    family = next(iter(named), library.MODEL_REMAPPING.get(family, family))
    architecture: Any = importlib.import_module(f"mlx_lm.models.{family}")
    module = architecture.Model(architecture.ModelArgs.from_dict(config))

    def drawn(_: str, weight: Any) -> Any:
        if not isinstance(weight, mx.array) or not mx.issubdtype(weight.dtype, mx.floating):
            return weight
        if weight.ndim == 1:
            return weight + 0.1 * mx.random.normal(weight.shape)
        return weight if mx.any(weight).item() else mx.random.normal(weight.shape) * weight.shape[-1] ** -0.5

    module.update(tree_map_with_path(drawn, module.parameters()))
    weights = {name: weight for name, weight in tree_flatten(module.parameters()) if isinstance(weight, mx.array)}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    words = Tokenizer(models.WordLevel({f"w{token}": token for token in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


def tried(config: dict[str, Any], place: Path) -> dict[str, str]:
    """What each step of the way came to, by column."""
    row: dict[str, str] = {}
    kept: dict[str, Any] = {}

    def step(column: str, work: Callable[[], Any]) -> bool:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                kept[column] = work()
            row[column] = "yes"
        except InputError as error:
            row[column] = f"refused: {error}"
        except (Exception, SystemExit) as error:
            row[column] = f"CRASH: {type(error).__name__}: {first_line(error) if isinstance(error, Exception) else ''}"
        return row[column] == "yes"

    if not step("load", lambda: mlx_lqr.load(written(config, place), backend="mlx")):
        return row
    model: Model = kept["load"]
    if isinstance(model, MeasuredModel):
        row["A_k"], row["chain"] = f"{model.measurement.jacobian:.0e}", f"{model.measurement.chain:.1e}"
        row["caches"] = "merged" if model.measurement.merges else "one by one"
    for cost in ("state", "feature"):
        step(f"fit {cost}", lambda cost=cost: mlx_lqr.fit(model, POSITIVE, NEGATIVE, cost=cost, layers="all"))
    steering = {"controller": kept.get("fit feature"), "max_tokens": TOKENS}
    step("generate", lambda: _alone(model, PROMPTS[0], steering))
    step("batch", lambda: _batch_agrees(model, steering))
    step("chat", lambda: _chat_agrees(model, kept.get("fit feature")))
    return row


def _alone(model: Model, prompt: list[int], options: dict[str, Any]) -> list[int | None]:
    return [piece.token for piece in mlx_lqr.stream(model, prompt, **options)]


def _batch_agrees(model: Model, options: dict[str, Any]) -> None:
    answers: list[list[int | None]] = [[] for _ in PROMPTS]
    for i, piece in mlx_lqr.batch_stream(model, PROMPTS, **options):
        answers[i].append(piece.token)
    if answers != [_alone(model, prompt, options) for prompt in PROMPTS]:
        raise AssertionError("other tokens than each prompt alone")


def _chat_agrees(model: Model, controller: Any) -> None:
    chat = Chat(model, options={"max_tokens": TOKENS})
    if controller is not None:
        chat.add(controller)
    for question in ("w1 w2 w3", "w4 w5"):
        tokens = [piece.token for piece in chat.answer(question)]
        again = _alone(
            model, model.tokenizer.chat(chat.messages[:-1]), {"controller": controller, "max_tokens": TOKENS}
        )
        if tokens != again:
            raise AssertionError("other tokens than decoded anew")


@click.command(help=__doc__)
@click.argument("configs", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=CONFIGS)
@click.option("--only", multiple=True, help="The configurations to try; by default all.")
def main(configs: Path, only: tuple[str, ...]) -> None:
    table = json.loads(configs.read_text("utf-8"))
    rows: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as place:
        os.environ["MLX_LQR_CACHE"] = str(Path(place) / "cache")
        for name in only or table:
            start = time.perf_counter()
            rows[name] = tried(table[name], Path(place) / name)
            cells = [rows[name].get(column, "") for column in (*COLUMNS, "caches", "A_k", "chain")]
            print("|", " | ".join([name, *cells, f"{time.perf_counter() - start:.1f} s"]), "|", flush=True)
            for file in (Path(place) / name).glob("*"):
                file.unlink()
    for column in COLUMNS:
        print(f"{column}: {sum(row.get(column) == 'yes' for row in rows.values())} of {len(rows)}")


if __name__ == "__main__":
    main()

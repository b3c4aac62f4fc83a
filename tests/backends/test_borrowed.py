"""What is taken from other libraries' private or renamed parts: one list, which holds and is whole."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from helpers.backends import tiny_on
from helpers.controllers import controller_for
from helpers.prompts import PROMPT
from helpers.tiny import COMMON, families
from oldest import PYPROJECT, oldest

import mlx_lqr
from mlx_lqr import InputError
from mlx_lqr.backends import borrowed
from mlx_lqr.backends.borrowed import BORROWED, Borrowed, Moment, check_borrowed
from mlx_lqr.backends.checkpoint.config import model_config
from mlx_lqr.backends.mlx import family as mlx_family
from mlx_lqr.backends.mlx.library import import_mlx_lm, model_classes
from mlx_lqr.backends.torch import decoder as torch_decoder
from mlx_lqr.backends.torch.backend import OLDEST

ROOT = PYPROJECT.parent
SOURCES = [file for folder in ("mlx_lqr", "runtime", "convert") for file in sorted((ROOT / folder).rglob("*.py"))]
EXTRAS = {"lm-eval": "lm_eval", "mlx evaluator": "lm_eval", "llama": "llama_cpp"}
"""By moment, what need not be installed"""
HERE = [row for row in BORROWED if row.moment not in EXTRAS]


@pytest.mark.parametrize("row", BORROWED, ids=lambda row: row.place)
def test_all_that_is_borrowed_is_there(row: Borrowed) -> None:
    if row.moment in EXTRAS:
        pytest.importorskip(EXTRAS[row.moment])
    assert row.missing() is None
    user = row.user.partition(":")[0].replace("mlx_lqr.convert", "convert").replace(".", "/")
    assert (ROOT / f"{user}.py").is_file()
    assert row.moment in get_args(Moment)
    assert re.search(rf'"{row.package}>=[\d.]+,<[\d.]+', PYPROJECT.read_text("utf-8")), "has no upper bound"


@pytest.mark.parametrize("row", HERE, ids=lambda row: row.place)
def test_what_has_gone_or_changed_is_said(row: Borrowed) -> None:
    """Renamed as a whole, a parameter, an attribute, its module: each is missing by its name."""
    module, _, path = row.place.partition(":")
    changed = {
        f"{module}:{path}_renamed": replace(row, place=f"{module}:{path}_renamed"),
        f"{module}_renamed:{path}": replace(row, place=f"{module}_renamed:{path}"),
    }
    if row.parameters:
        changed[f"the parameter renamed of {row.place}"] = replace(row, parameters=(*row.parameters, "renamed"))
    if row.attributes:
        changed[f"{row.place}.renamed"] = replace(row, attributes=(*row.attributes, "renamed"))
    assert {name: other.missing() for name, other in changed.items()} == {name: name for name in changed}


MOMENTS: dict[Moment, Any] = {
    "mlx": lambda: tiny_on("mlx", "llama"),
    "mlx steer": lambda: steered("mlx"),
    "torch": lambda: tiny_on("torch", "llama"),
    "torch steer": lambda: steered("torch"),
    "convert": lambda: mlx_lqr.convert.convert,
}


def steered(backend: str) -> None:
    model = tiny_on(backend, "llama")
    with mlx_lqr.steer(model, controller_for(model)):
        pass


@pytest.mark.parametrize("moment", ["mlx", "mlx steer", "torch", "torch steer"])
def test_a_backend_that_lacks_something_says_so_in_one_line(moment: Moment, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Borrowed(
        "mlx-lm" if "mlx" in moment else "transformers", "json:gone", "mlx_lqr.backends.mlx.model: all", moment
    )
    monkeypatch.setattr(borrowed, "BORROWED", (gone,))
    check_borrowed.cache_clear()
    try:
        with pytest.raises(InputError, match=rf"^{gone.package} [\d.]+ has no json:gone: ") as refusal:
            MOMENTS[moment]()
    finally:
        check_borrowed.cache_clear()
    assert "\n" not in str(refusal.value)


def test_an_unknown_argument_of_attention_is_refused() -> None:
    """As the window would be under another name: left out, every layer would see everything."""
    model = tiny_on("torch", "gemma3_text")
    attention = model.blocks[0].self_attn
    forward = type(attention).forward

    def renamed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, local_window=6, **kwargs)

    attention.forward = renamed.__get__(attention)
    try:
        with pytest.raises(InputError, match="gives attention the argument local_window"):
            model.logits(PROMPT)
    finally:
        del attention.forward


@pytest.mark.parametrize("part", ["norm", "rotary_emb", "layers", "o_proj", "hidden_states"])
def test_a_model_with_a_renamed_part_is_refused(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = mlx_lqr.load(_folder(), backend="torch", dtype="float32").module  # type: ignore[attr-defined]
    body = module.base_model
    if part == "hidden_states":
        monkeypatch.setattr(type(body.layers[0]), "forward", lambda self, states, **kwargs: states)
    else:
        holder = body.layers[0].self_attn if part == "o_proj" else body
        holder.renamed = getattr(holder, part)
        delattr(holder, part)
    with pytest.raises(InputError, match=rf"^transformers .*({part}|in another way)"):
        mlx_lqr.steer(module, controller_for(tiny_on("torch", "llama")))


@families
def test_steps_that_look_at_numbers_are_not_recorded(family: str) -> None:
    """Told by what the model is made of, not by keys of its config, whose absence would say no."""
    module = tiny_on("torch", family).module
    assert torch_decoder._can_be_recorded(module) == (family not in ("mixtral", "qwen3_moe"))
    if family == "llama":
        rotary = module.base_model.rotary_emb
        kind, rotary.rope_type = rotary.rope_type, "dynamic"
        assert not torch_decoder._can_be_recorded(module)
        rotary.rope_type = kind


@pytest.mark.parametrize(("owner", "part"), [("Attention", "rope"), ("MLP", "gate_proj")])
def test_what_a_config_changes_has_to_be_there(owner: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = getattr(import_mlx_lm("models.llama"), owner)
    build = kind.__init__

    def renamed(self: Any, *args: Any) -> None:
        build(self, *args)
        self["renamed"] = self.pop(part)

    monkeypatch.setattr(kind, "__init__", renamed)
    config = {"model_type": "llama", **COMMON, "hidden_act": "gelu"}
    with pytest.raises(InputError, match=rf"^mlx-lm .* has no {part}"):
        mlx_family.complete(_built(config), model_config(config))


def _built(config: dict[str, Any]) -> Any:
    Model, ModelArgs = model_classes("llama")
    return Model(ModelArgs.from_dict(config))


def _folder() -> Path:
    from helpers.backends import tiny_folder

    return tiny_folder("llama")


def private_names(tree: ast.AST) -> Iterator[str]:
    """Private attributes that are read or set, or named in getattr and the like, and private names imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("mlx_lqr"):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def own_names(tree: ast.AST) -> Iterator[str]:
    """Names that the source defines itself: functions, classes, fields, and attributes that are assigned to `self`."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            yield node.attr


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def test_every_private_name_of_another_library_is_on_the_list() -> None:
    trees = {file: ast.parse(file.read_text("utf-8")) for file in SOURCES}
    own = {name for tree in trees.values() for name in own_names(tree)}
    listed = {name for row in BORROWED for name in (*re.split(r"[.:]", row.place), *row.attributes, *row.sets)}
    used = {
        (str(file.relative_to(ROOT)), name)
        for file, tree in trees.items()
        for name in private_names(tree)
        if name.startswith("_") and not name.startswith("__") and name != "_exit"  # which os documents
    }
    foreign = {(file, name) for file, name in used if name not in own}
    assert {name for _, name in foreign} >= {"_attn_implementation_internal", "_temporal_order", "_idx", "_score_fn"}
    assert sorted((file, name) for file, name in foreign if name not in listed) == []


LIBRARIES = {
    "mlx-lm": ("mlx_lqr/backends/mlx/library.py", "mlx_lqr/backends/mlx/evaluator.py"),
    "transformers": ("mlx_lqr/backends/torch/library.py",),
    "llama-cpp-python": ("mlx_lqr/backends/llama/library.py",),
    "lm-eval": ("mlx_lqr/tasks/lm_eval.py", "mlx_lqr/backends/mlx/evaluator.py"),
}
"""Where each library's private or renamed parts are touched."""


def imported(tree: ast.AST) -> Iterator[str]:
    """What is imported, as `module:name`, by statements and by `import_mlx_lm`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"{alias.name}:" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}:{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "import_mlx_lm":
            yield "mlx_lm:"


def test_each_library_is_touched_in_one_place() -> None:
    everywhere = {file for files in LIBRARIES.values() for file in files}
    listed = {name for row in BORROWED for name in (*re.split(r"[.:]", row.place), *row.attributes, *row.sets)}
    for row in BORROWED:
        user = row.user.partition(":")[0].replace(".", "/")
        assert f"{user}.py" in LIBRARIES[row.package], row.place
    for file in SOURCES:
        path, tree = str(file.relative_to(ROOT)), ast.parse(file.read_text("utf-8"))
        if path == "mlx_lqr/backends/borrowed.py":  # looks whether it is all there
            continue
        private = {name for name in private_names(tree) if name.startswith("_") and name in listed}
        own = set(own_names(tree))
        assert path in everywhere or private <= own, (path, private - own)
        for name in imported(tree):
            for row in BORROWED:
                module, _, attribute = row.place.partition(":")
                whole = row.package in ("mlx-lm", "lm-eval", "llama-cpp-python")  # and not some of its parts
                same = name.split(".")[0].split(":")[0] == module.split(".")[0]
                if (whole and same) or name == f"{module}:{attribute.split('.')[0]}":
                    assert path in LIBRARIES[row.package], (path, name)


def test_the_oldest_versions_are_those_of_pyproject() -> None:
    versions = oldest(PYPROJECT.read_text("utf-8"))
    for package, numbers in OLDEST.items():
        assert versions[package] == ".".join(map(str, numbers))
    assert {"mlx", "mlx-lm", "torch", "tokenizers", "numpy"} <= set(versions)
    with pytest.raises(ValueError, match="'rich' has no lower bound"):
        oldest('dependencies = [\n  "rich",\n]\ntorch = []\n')

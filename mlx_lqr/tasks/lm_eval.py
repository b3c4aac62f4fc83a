"""The tasks of lm-eval (EleutherAI's lm-evaluation-harness) on a steered model, through mlx-lm's own evaluator.

    chosen = lm_eval.load_tasks(["arc_easy", "hellaswag"])
    evaluation = lm_eval.evaluate(lm_eval.load_evaluator("demo"), chosen, steering, strengths=[0, 1, 2])
    evaluation.results[2.0]["arc_easy"]["acc,none"]

The last token of a context and everything after it is steered, so that log-likelihoods are those of
`Steered.log_probabilities`. lm-eval reads the task, makes the prompts and computes the metrics; none of that is ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_lqr.backends.borrowed import check_borrowed
from mlx_lqr.backends.protocol import Progress
from mlx_lqr.errors import InputError, first_line
from mlx_lqr.loading import named_adapter, resolve
from mlx_lqr.runtime import steer
from mlx_lqr.tasks.records import Row, digest, kept
from mlx_lqr.tasks.steering import NamedSteering, check_strengths

if TYPE_CHECKING:
    from mlx_lqr.backends.mlx.evaluator import Evaluator


@dataclass(frozen=True)
class Settings:
    """How lm-eval runs its tasks; the defaults are those of `mlx_lm.evaluate`."""

    limit: int | None = None
    """At most this many documents of each task"""
    num_shots: int | None = None
    """Solved examples before each question; None is the task's own number"""
    seed: int = 123
    confirm_run_unsafe_code: bool = False
    """Allow tasks that run the code that the model writes"""


@dataclass(frozen=True, eq=False)
class Tasks:
    """Tasks loaded by lm-eval."""

    manager: Any
    """Its `TaskManager`"""
    loaded: dict[str, Any]
    """name as given -> what `TaskManager.load` returned for it"""


@dataclass(frozen=True, eq=False)
class LMEvaluation:
    """lm-eval's results at every strength."""

    method: str
    """The steering's name"""
    header: Row
    results: dict[float, dict[str, Row]]
    """By strength and task, including the parts of a group: lm-eval's own entries, such as {"acc,none": 0.5, ...}"""


def evaluate(
    evaluator: Evaluator,
    tasks: Tasks,
    steering: NamedSteering | None = None,
    strengths: Sequence[float] = (0.0,),
    *,
    settings: Settings | None = None,
    output: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> LMEvaluation:
    """Run lm-eval's tasks at every strength.

    Args:
        evaluator: what `load_evaluator` returned.
        tasks: what `load_tasks` returned.
        steering: what steers; None for the unsteered model, which only has strength 0.
        strengths: 0 is the unsteered model.
        settings: by default those of `mlx_lm.evaluate`.
        output: a file of JSON lines; a task's results are appended as soon as it is done. If it exists, the results in
            it are not computed again. More strengths may be added to it later.
        progress: called as progress(f"Strength {s:g}: {task}", tasks done, all tasks).

    Raises:
        InputError: a controller of another model or that `steer` refuses, a strength other than 0 without steering, a
            task that lm-eval refuses, or an output that was made with other settings or that another mlx-lqr writes.
        OverflowingError: activations overflow at a strength.
    """
    settings = settings or Settings()
    wanted = check_strengths(evaluator.model, steering, strengths)
    runs = [(strength, name) for strength in wanted for name in tasks.loaded]
    with kept(_describe(evaluator, tasks, steering, settings), output) as records:
        for done, (strength, name) in enumerate(runs):
            if progress:
                progress(f"Strength {strength:g}: {name}", done, len(runs))
            if not records.of(strength, name):
                with _steered(evaluator, steering, strength):
                    results = _run(evaluator, tasks, name, settings)
                records.append(strength, name, [{"results": results}])
    by_strength: dict[float, dict[str, Row]] = {strength: {} for strength in wanted}
    for strength, name in runs:
        by_strength[strength].update(records.of(strength, name)[0]["results"])
    return LMEvaluation(steering.name if steering is not None else "unsteered", records.header, by_strength)


def load_tasks(names: Sequence[str], include_path: str | PathLike[str] | None = None) -> Tasks:
    """Load lm-eval's tasks and their documents.

    Args:
        names: lm-eval's tasks, groups or tags.
        include_path: a folder with your own tasks (YAML files). lm-eval runs the Python functions that they name.

    Raises:
        InputError: lm-eval is not installed, a name is unknown, or a task cannot be loaded.
    """
    _check_installed()
    if not names:
        raise InputError("name at least one of lm-eval's tasks, such as arc_easy")
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"{include_path} is not a folder: give the one that holds your tasks' YAML files")
    manager = _manager(names, include_path)
    loaded = {}
    for name in dict.fromkeys(names):
        if name not in manager.task_index:
            raise InputError(f"lm-eval has no task {name}: `lm_eval ls tasks` lists them, --include-path adds your own")
        try:
            with _no_metric_from_here():
                loaded[name] = manager.load([name])
        except Exception as error:  # from the hub, a file, or a task's own code
            raise InputError(f"lm-eval cannot load the task {name}: {first_line(error)}") from error
    return Tasks(manager, loaded)


def load_evaluator(
    source: str | PathLike[str],
    *,
    dtype: str | None = None,
    adapter: str | PathLike[str] | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    apply_chat_template: bool | None = None,
    progress: Progress | None = None,
) -> Evaluator:
    """Load a model as mlx-lm does, for its evaluator. It runs on MLX.

    Args:
        source, dtype, adapter, progress: see `mlx_lqr.load`.
        batch_size: how many texts are generated, or scored without a context, side by side.
        max_tokens: tokens per text, at most; None is the task's own number.
        apply_chat_template: None applies it if the model has one.

    Raises:
        InputError: lm-eval is not installed, the source cannot be used, or mlx-lm cannot load or we cannot steer it.
    """
    _check_installed()
    adapted, suffix = named_adapter(adapter)
    folder, name = resolve(source, progress=progress)
    from mlx_lqr.backends.mlx.evaluator import Evaluator

    options = {"batch_size": batch_size, "max_tokens": max_tokens, "use_chat_template": apply_chat_template}
    return Evaluator(folder, name + suffix, dtype, adapted, **options)


def _check_installed() -> None:
    for package in ("lm_eval", "mlx_lm"):
        if importlib.util.find_spec(package) is None:
            name = package.replace("_", "-")
            raise InputError(f"lm-eval's tasks need {name}, which is not installed: pip install 'mlx-lqr[lm-eval]'")


def _manager(names: Sequence[str], include_path: str | PathLike[str] | None) -> Any:
    """lm-eval's index of tasks. Its own tasks, which take ten seconds to read, are left out if they are not needed."""
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return TaskManager()
    try:
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        return own if set(names) <= set(own.all_subtasks) else TaskManager(include_path=str(include_path))
    except Exception as error:  # a YAML file can raise anything
        raise InputError(f"lm-eval cannot read the tasks in {include_path}: {first_line(error)}") from error


def _steered(evaluator: Evaluator, steering: NamedSteering | None, strength: float) -> AbstractContextManager[None]:
    if steering is None or strength == 0:
        return nullcontext()
    return steer(evaluator.model, steering.controller, steering.strength(strength))


def _run(evaluator: Evaluator, tasks: Tasks, name: str, settings: Settings) -> Row:
    """lm-eval's results for one task, or for a group and its parts."""
    check_borrowed("lm-eval")
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable

    loaded = tasks.loaded[name]
    try:
        with redirect_stdout(sys.stderr), _no_metric_from_here():  # mlx-lm prints its progress
            results = simple_evaluate(
                evaluator,
                tasks=[loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values()),
                task_manager=tasks.manager,
                num_fewshot=settings.num_shots,
                limit=settings.limit,
                log_samples=False,
                apply_chat_template=evaluator.use_chat_template,
                fewshot_as_multiturn=False,
                random_seed=settings.seed,
                numpy_random_seed=settings.seed,
                torch_random_seed=settings.seed,
                fewshot_random_seed=settings.seed,
                confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
            )
    except ValueError as error:
        raise InputError(f"lm-eval refuses the task {name}: {first_line(error)}") from error
    entries = {**results["results"], **results.get("groups", {})}
    return json.loads(json.dumps(entries, default=handle_non_serializable), parse_constant=lambda _: None)


@contextmanager
def _no_metric_from_here() -> Iterator[None]:
    """Tasks that call `evaluate.load("rouge")` would run a ./rouge/rouge.py: a name alone means the hub's."""
    scripts = any((folder / f"{folder.name}.py").is_file() for folder in Path.cwd().iterdir())
    if not scripts or importlib.util.find_spec("evaluate") is None:
        yield
        return
    library: Any = importlib.import_module("evaluate")
    load = library.load

    def elsewhere(path: str, *arguments: Any, **options: Any) -> Any:
        if "/" not in path and Path(path).exists():
            raise InputError(f"the current folder has a {path}, which would be run as a metric: use another folder")
        return load(path, *arguments, **options)

    library.load = elsewhere
    try:
        yield
    finally:
        library.load = load


def _describe(evaluator: Evaluator, tasks: Tasks, steering: NamedSteering | None, settings: Settings) -> Row:
    """Everything that the results depend on except the strength."""
    return {
        "task": "lm-eval",
        "model": {"name": evaluator.model.name, "fingerprint": evaluator.model.fingerprint, **evaluator.options},
        "steering": steering.settings if steering is not None else None,
        "parts": {name: {"rows": 1, "digest": _content(loaded)} for name, loaded in tasks.loaded.items()},
        "settings": asdict(settings),
        "versions": {package: metadata.version(package) for package in ("mlx-lqr", "lm-eval", "mlx-lm")},
    }


def _content(loaded: Any) -> str:
    """A digest of a task's settings and documents, which changes when someone edits them."""
    content = {}
    for name, task in loaded["tasks"].items():
        # functions without source code show as their address, which changes with every run
        config = {key: value for key, value in task.dump_config().items() if " at 0x" not in str(value)}
        content[name] = [config, list(task.eval_docs)]
    return digest(json.loads(json.dumps(content, default=str)))

"""A task is one file and one line of the registry: every command that runs tasks has those that are listed there."""

from __future__ import annotations

import click
import pytest

from mlx_lqr.commands import main
from mlx_lqr.tasks.registry import TASKS

ELSEWHERE = {"eval": {"lm-eval"}}
"""Commands that are no tasks of ours: lm-eval brings its own."""


@pytest.mark.parametrize("name", ["eval", "compare", "tune"])
def test_every_task_is_a_command_of_what_runs_tasks(name: str) -> None:
    group = main.commands[name]
    assert isinstance(group, click.Group)
    assert set(group.commands) - ELSEWHERE.get(name, set()) == set(TASKS)
    for task, kind in TASKS.items():
        parameters = {parameter.name: parameter for parameter in group.commands[task].params}
        for option in kind.options:
            assert option.name in parameters
            assert parameters[option.name].required == option.required
            if not option.required:
                assert parameters[option.name].default == option.default

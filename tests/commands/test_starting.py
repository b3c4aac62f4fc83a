"""How a command starts and ends: nothing comes from the current folder, and Ctrl-C leaves no traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.backends import tiny_folder
from helpers.platforms import posix

from mlx_lqr.convert import sources
from mlx_lqr.errors import InputError
from mlx_lqr.tasks.scorers import DEFAULT, load_scorer

ROOT = Path(__file__).parents[2]
PLANTED = (
    *("click", "filelock", "gguf", "huggingface_hub", "jinja2", "lm_eval", "matplotlib", "mlx", "mlx_lm", "numpy"),
    *("pip", "profanity_check", "prompt_toolkit", "rich", "safetensors", "scipy", "threadpoolctl", "tokenizers"),
    *("torch", "transformers", "argparse", "json", "signal", "subprocess", "tempfile", "typing"),
)
LAUNCHERS = {
    "package": ("-m", "mlx_lqr", "generate"),
    "one word": ("-Bmmlx_lqr", "generate"),
    "runtime": ("-m", "mlx_lqr.runtime"),
    "cli.py": ("cli.py", "generate"),
}


def plant(folder: Path) -> Path:
    """A folder of modules that leave a mark in it when they are imported."""
    folder.mkdir()
    for name in PLANTED:
        code = f"open({str(folder / 'imported')!r}, 'a').write('{name} ')\nraise ImportError('{name} was planted')\n"
        (folder / f"{name}.py").write_text(code)
    return folder


def started(*command: str, folder: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(path)} if path is not None else None
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_no_command_imports_from_the_current_folder(launcher: str, tmp_path: Path) -> None:
    folder = plant(tmp_path / "current")
    if launcher == "cli.py":
        shutil.copy(ROOT / "cli.py", folder)
        for name in ("mlx_lqr", "runtime", "convert"):
            (folder / name).symlink_to(ROOT / name)
    done = started(*LAUNCHERS[launcher], str(tiny_folder("llama")), "-p", "w1", "-n", "1", folder=folder)
    assert not (folder / "imported").exists(), (folder / "imported").read_text()
    assert done.returncode == 0, done.stderr


def test_other_programs_keep_their_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import mlx_lqr, signal\nimport beside\nprint(signal.getsignal(signal.SIGINT))")
    (tmp_path / "beside.py").write_text("")
    done = started("-m", "mine", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "default_int_handler" in done.stdout


def test_the_download_and_the_default_scorer_do_not_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = plant(tmp_path / "current")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    (tmp_path / "new").mkdir()
    with pytest.raises(InputError, match="cannot fetch"):
        sources._download(tmp_path / "new")
    monkeypatch.setitem(sys.modules, "profanity_check", None)  # as if it were not installed
    del sys.modules["profanity_check"]
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not Path(entry, "profanity_check").exists()])
    with pytest.raises(InputError, match="alt-profanity-check"):
        load_scorer(DEFAULT)
    assert not (folder / "imported").exists()
    (folder / "mine.py").write_text("def score(texts):\n    return [0.5] * len(texts)\n")
    assert load_scorer("mine:score")(["a"]) == [0.5]
    assert str(folder) not in sys.path


INTERRUPTS = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"


@posix
@pytest.mark.parametrize("launcher", ["package", "runtime"])
def test_ctrl_c_during_the_start_says_nothing(launcher: str, tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text(INTERRUPTS)  # which every command imports at its start
    done = started(*LAUNCHERS[launcher], "--help", folder=tmp_path, path=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


PROGRAM = """
import atexit, os, signal, time
import mlx_lqr.concepts
def interrupted():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
def exec_interrupted():  # as namedtuple does, after which Python has its own idea of an exit status
    exec("interrupted()", globals())
def import_interrupted():  # as a compiled module does
    try:
        interrupted()
    except KeyboardInterrupt as stop:
        raise ImportError("while initializing the extension") from stop
{when}
from mlx_lqr.commands import main
main(["concepts"])
"""


@posix
@pytest.mark.parametrize(
    ("when", "says"),
    [
        ("mlx_lqr.concepts.bundled_concepts = interrupted", "Stopped.\n"),
        ("mlx_lqr.concepts.bundled_concepts = exec_interrupted", "Stopped.\n"),
        ("mlx_lqr.concepts.bundled_concepts = import_interrupted", "Stopped.\n"),
        ("atexit.register(interrupted)", ""),
    ],
)
def test_ctrl_c_in_the_work_is_a_line_and_at_the_end_none(when: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "mlx-lqr").write_text(PROGRAM.format(when=when))
    done = started("mlx-lqr", folder=tmp_path)
    assert (done.returncode, done.stderr) == (130, says)

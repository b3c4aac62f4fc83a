"""The wheel as a stranger gets it: built, installed without extras into a fresh environment, and its commands run.

    python tests/built_wheel.py

It fails if a command does, if a module of the core cannot be imported, or if anything comes from the checkout.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_PACKAGED = (".*", "__pycache__", "build", "*.egg-info", "site")

CONTROLLED = "mlx-lqr generate demo -p Once -n 8 -c dog.safetensors:2"
COMMANDS = (
    "mlx-lqr --version",
    "mlx-lqr concepts",
    "mlx-lqr fit demo --concept dog --cost feature -o dog.safetensors",
    "mlx-lqr show dog.safetensors",
    "python -m mlx_lqr.runtime demo -p Once -n 8 -c dog.safetensors:2",
)

IMPORTS = """
import importlib, pkgutil, sys
import mlx_lqr
for module in pkgutil.walk_packages(mlx_lqr.__path__, "mlx_lqr."):
    if module.name == "mlx_lqr.__main__":
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        extras = "llama_cpp", "lm_eval", "matplotlib", "pydantic", "starlette", "torch", "uvicorn"
        assert error.name in extras, module
ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "mlx_lqr"}
elsewhere = [name for name, module in ours.items() if not module.__file__.startswith(sys.prefix)]
assert not elsewhere, elsewhere
print(len(ours), "modules of mlx_lqr", mlx_lqr.__version__)
"""
"""All modules that need no extra are imported, and stand in the environment."""


def built(folder: Path) -> Path:
    """The wheel, built into `folder` from a copy, so that nothing is left behind and no earlier build comes along."""
    copy = folder / "source"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_PACKAGED), symlinks=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(copy)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="mlx-lqr-wheel-") as temporary:
        folder = Path(temporary).resolve()
        environment, work = folder / "environment", folder / "work"
        venv.create(environment, with_pip=True)
        work.mkdir()
        programs = environment / ("Scripts" if sys.platform == "win32" else "bin")
        variables = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
        variables.pop("PYTHONPATH", None)

        def run(*command: str) -> str:
            print("$", " ".join(command).partition("\n")[0], flush=True)
            program = [str(programs / command[0]), *command[1:]]
            return subprocess.run(program, cwd=work, env=variables, check=True, stdout=subprocess.PIPE).stdout.decode()

        run("python", "-m", "pip", "install", "--quiet", str(built(folder)))
        print(run("python", "-c", IMPORTS))
        for command in COMMANDS:
            assert run(*command.split()).strip(), f"{command} printed nothing"
        steered, plain = run(*CONTROLLED.split()), run(*CONTROLLED.partition(" -c ")[0].split())
        assert steered != plain, f"the controller changed nothing: {plain}"


if __name__ == "__main__":
    main()

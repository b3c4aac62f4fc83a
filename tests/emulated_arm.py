"""The edge runtime on 64-bit ARM: installed there as a user installs it, it writes the tokens that it writes here.

    python tests/emulated_arm.py [FOLDER]

QEMU runs Debian's Python for arm64 on an x86-64 Debian machine, in an environment into which its pip installs
llama-cpp-python, which is compiled for it here, and the wheel of this checkout without dependencies. The model is
SmolLM2 as its GGUF file in 4 bits and the same weights in float32. In float32 the tokens have to be those of llama.cpp
here. In 4 bits processors may round differently, and the logits have to be close.

FOLDER, build/arm by default, keeps what takes long to make. Only the packages of Debian that run here are installed
into the system, and only by root.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from built_wheel import built
from helpers.gguf_float32 import in_float32

from mlx_lqr.convert.sources import demo_gguf_file

EMULATOR, COMPILER = "qemu-aarch64-static", "aarch64-linux-gnu-gcc"
HERE = {
    EMULATOR: "qemu-user-static",
    COMPILER: "gcc-aarch64-linux-gnu",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "cmake": "cmake",
    "make": "make",
}
"""Program -> the package of Debian that has it"""
THERE = "python3-venv", "libgomp1", "libstdc++6"
"""Debian's packages for arm64; the libraries are those that llama.cpp is linked with"""
CMAKE = {
    "CMAKE_SYSTEM_NAME": "Linux",
    "CMAKE_SYSTEM_PROCESSOR": "aarch64",
    "CMAKE_C_COMPILER": COMPILER,
    "CMAKE_CXX_COMPILER": "aarch64-linux-gnu-g++",
    "GGML_NATIVE": "OFF",  # any 64-bit ARM: NEON and no more
    **dict.fromkeys(("LLAVA_BUILD", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_SERVER"), "OFF"),
    **dict.fromkeys(("LLAMA_BUILD_TESTS", "LLAMA_BUILD_TOOLS"), "OFF"),
}
PACKAGE = "llama_cpp_python"
PROMPT, COUNT = "Once upon a time,", 24

PROGRAM = """
import json, platform, re, sys
from pathlib import Path
import numpy as np
from mlx_lqr.backends.llama.native import why_not
from mlx_lqr.loading import load, load_steering
from mlx_lqr.methods.steering import law_of
from mlx_lqr.runtime import stream

file, controller, prompt, count, logits = sys.argv[1:]
model, steering = load(file, backend="llama"), load_steering(controller)
start = model.tokenizer.encode(prompt)
answers, seen = {}, {}
for name, own in ("unsteered", None), ("steered", steering):
    pieces = list(stream(model, prompt, controller=own, max_tokens=int(count), temperature=0))
    tokens = [piece.token for piece in pieces if piece.token is not None]
    answers[name] = {"tokens": tokens, "text": "".join(piece.text for piece in pieces)}
    (seen[name],) = model.logits_along([(start, tokens)], law=own and law_of(own))
np.savez(logits, **seen)
peak = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())
print(json.dumps({"machine": platform.machine(), "in_python": why_not(), "peak_kb": int(peak[1]), "answers": answers}))
"""
"""Decodes greedily with and without the controller; saves the logits (1 + n, V) around the tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("build/arm"))
    folder = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    install_tools()
    arm = Emulated(folder)
    arm.install(llama_wheel(folder / "wheels"), our_wheel(folder))
    print(arm.describe(), flush=True)

    controller = folder / "ocean.safetensors"
    if not controller.is_file():
        fit = "-m", "mlx_lqr", "fit", "demo", "--concept", "ocean", "--cost", "feature", "-o", str(controller)
        subprocess.run([sys.executable, *fit], check=True)
    packed, plain = demo_gguf_file(), folder / "float32.gguf"
    if not plain.is_file():
        in_float32(packed, plain)
    compare(arm, plain, controller, "float32", exact=True)
    compare(arm, packed, controller, "4 bits", exact=False)


def compare(arm: Emulated, model: Path, controller: Path, name: str, *, exact: bool) -> None:
    """Both machines' tokens and logits, on ARM with the hook in C and with the one in Python.

    Args:
        exact: whether the tokens have to be the same; otherwise the logits have to be close as long as the tokens are.
    """
    program = "-c", PROGRAM, str(model), str(controller), PROMPT, str(COUNT)
    single = {"OMP_NUM_THREADS": "1"}
    here, here_logits = answered([sys.executable, *program], arm.folder / "here.npz", {**os.environ, **single})
    assert here["machine"] == platform.machine()
    for compiler in (True, False):
        command, variables = arm.command(*program, compiler=compiler)
        there, logits = answered(command, arm.folder / "there.npz", {**variables, **single})
        hook = "laws in Python" if there["in_python"] else "laws in C"
        assert there["machine"] == "aarch64"
        assert there["in_python"] == ("" if compiler else "no C compiler is here")
        for which, answer in there["answers"].items():
            expected = here["answers"][which]["tokens"]
            same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(answer["tokens"], expected, strict=False))))
            apart = float(np.abs(logits[which][: same + 1] - here_logits[which][: same + 1]).max())
            print(f"{name}, {hook}, {which}: {same} of {len(expected)} tokens the same, logits differ by {apart:.2g}")
            print(f"  {answer['text']!r}", flush=True)
            assert apart < (1e-2 if exact else 2.0)
            assert not exact or answer["tokens"] == expected
        assert there["answers"]["steered"]["tokens"] != there["answers"]["unsteered"]["tokens"]
        print(f"  resident {there['peak_kb'] / 1e3:.0f} MB with the emulator; here {here['peak_kb'] / 1e3:.0f} MB")
    options = "-p", PROMPT, "-c", str(controller), "-n", str(COUNT), "--temperature", "0"
    command, variables = arm.command("-m", "mlx_lqr.runtime", str(model), *options, compiler=True)
    said = subprocess.run(command, env={**variables, **single}, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert said == there["answers"]["steered"]["text"] + "\n", said


def answered(
    command: Sequence[str], logits: Path, variables: Mapping[str, str]
) -> tuple[Any, Mapping[str, np.ndarray]]:
    """What the program above prints, and the logits (1 + n, V) by name."""
    done = subprocess.run([*command, str(logits)], env=variables, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout), np.load(logits)


class Emulated:
    """A Python environment of Debian for arm64, in `folder`, and its emulator."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.emulator = folder, str(shutil.which(EMULATOR))
        self.root, self.environment, self.programs = folder / "debian", folder / "environment", folder / "programs"
        if not self.root.is_dir():
            unpack_debian(folder, self.root)
        (self.programs / "none").mkdir(parents=True, exist_ok=True)
        compiler = self.programs / "cc"
        if not compiler.is_symlink():
            compiler.symlink_to(str(shutil.which(COMPILER)))

    def command(self, *arguments: str, compiler: bool) -> tuple[list[str], dict[str, str]]:
        """How Python is run there, and with what variables; with the compiler for ARM as its `cc`, or with none."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        variables |= {
            "QEMU_LD_PREFIX": str(self.root),
            "PATH": str(self.programs if compiler else self.programs / "none"),
            "MLX_LQR_CACHE": str(self.folder / ("cache" if compiler else "cache-none")),
        }
        return [self.emulator, str(self.environment / "bin" / "python"), *arguments], variables

    def run(self, *arguments: str) -> str:
        command, variables = self.command(*arguments, compiler=False)
        return subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE, text=True).stdout

    def install(self, llama: Path, ours: Path) -> None:
        """A new environment with what the documentation names, by pip there."""
        (pip,) = (self.root / "usr/share/python-wheels").glob("pip-*.whl")
        python = next((self.root / "usr/bin").glob("python3.[0-9]*[0-9]"))
        shutil.rmtree(self.environment, ignore_errors=True)
        shutil.rmtree(self.folder / "cache", ignore_errors=True)
        _, variables = self.command(compiler=False)
        making = [self.emulator, str(python), "-m", "venv", "--without-pip", str(self.environment)]
        subprocess.run(making, env=variables, check=True)
        for wanted in ([str(llama)], ["--no-deps", str(ours)]):
            self.run(f"{pip}/pip", "install", "--quiet", "--only-binary=:all:", *wanted)

    def describe(self) -> str:
        """Versions, and megabytes on disk."""
        (packages,) = self.environment.glob("lib/python3*/site-packages")
        lines = []
        for own in metadata.distributions(path=[str(packages)]):
            size = sum(Path(str(file.locate())).stat().st_blocks * 512 for file in own.files or [])
            lines.append(f"{own.metadata['Name']} {own.version}: {size / 1e6:.1f} MB")
        emulator = subprocess.run([self.emulator, "--version"], check=True, capture_output=True, text=True).stdout
        python = self.run("-c", "import platform; print('Python', platform.python_version(), 'on', platform.machine())")
        return "\n".join([emulator.partition("\n")[0], python.strip(), *sorted(lines)])


def install_tools() -> None:
    """What this needs of Debian, for this machine."""
    assert platform.machine() == "x86_64", "this needs an x86-64 machine"
    if missing := [package for program, package in HERE.items() if shutil.which(program) is None]:
        command = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
        if os.getuid() != 0:
            sys.exit(f"As root: {' '.join(command)}")
        subprocess.run(["apt-get", "update", "--quiet"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def unpack_debian(folder: Path, root: Path) -> None:
    """Debian's packages for arm64 with all that they need, of the release that runs here, unpacked into `root`.

    They are not installed: no script of theirs runs, and the system's own apt does not know of them.
    """
    release = platform.freedesktop_os_release()
    if release["ID"] != "debian":
        sys.exit(f"This needs Debian, and not {release['NAME']}")
    state = folder / "apt"
    for name in ("lists/partial", "archives/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    key = "/usr/share/keyrings/debian-archive-keyring.gpg"
    sources = f"deb [signed-by={key}] http://deb.debian.org/debian {release['VERSION_CODENAME']} main\n"
    (state / "sources.list").write_text(sources)
    settings = {
        **{f"APT::{name}": "arm64" for name in ("Architecture", "Architectures")},
        "APT::Sandbox::User": "",
        **{f"Dir::{name}": str(state) for name in ("State", "Cache")},
        "Dir::State::status": str(state / "status"),
        "Dir::Etc::sourcelist": str(state / "sources.list"),
        **{f"Dir::Etc::{name}": "-" for name in ("parts", "sourceparts")},
    }
    options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
    subprocess.run(["apt-get", *options, "-qq", "update"], check=True)
    install = "--yes", "--download-only", "--no-install-recommends", "install", *THERE
    subprocess.run(["apt-get", *options, "-qq", *install], check=True, stdout=subprocess.DEVNULL)
    unfinished = root.with_suffix(".unfinished")
    for package in sorted((state / "archives").glob("*.deb")):
        subprocess.run(["dpkg", "--extract", str(package), str(unfinished)], check=True)
    unfinished.rename(root)


def llama_wheel(folder: Path) -> Path:
    """llama-cpp-python for arm64, in the version that is installed here; compiled where `folder` does not have it."""
    version = metadata.version(PACKAGE)
    if not (made := list(folder.glob(f"{PACKAGE}-{version}-*_aarch64.whl"))):
        build = {"CMAKE_ARGS": " ".join(f"-D{name}={value}" for name, value in CMAKE.items())}
        build["_PYTHON_HOST_PLATFORM"] = "linux-aarch64"  # what the wheel is tagged with
        # pip must neither take the wheel for this machine from its cache nor put this one there.
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-cache-dir", "--no-binary", PACKAGE]
        command += ["--wheel-dir", str(folder), f"{PACKAGE}=={version}"]
        subprocess.run(command, env={**os.environ, **build}, check=True)
        made = list(folder.glob(f"{PACKAGE}-{version}-*_aarch64.whl"))
    (wheel,) = made
    return wheel


def our_wheel(folder: Path) -> Path:
    """The wheel of this checkout as it is."""
    fresh = folder / "ours"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    return built(fresh)


if __name__ == "__main__":
    main()

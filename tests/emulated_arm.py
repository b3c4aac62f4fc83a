"""The edge runtime on 64-bit ARM: installed there as a user installs it, it writes the tokens that it writes here.

    python tests/emulated_arm.py [FOLDER]

QEMU runs Debian's Python for arm64 on an x86-64 Debian machine, in an environment into which its pip installs
llama-cpp-python, which is compiled for it here, and the wheel of this checkout without dependencies. The model is
SmolLM2 as its GGUF file in 4 bits and the same weights in float32. In float32 the tokens have to be those of llama.cpp
here. In 4 bits it quantises activations too, which turns the last bit of a float into a step of an 8-bit number now and
then, and every machine has last bits of its own; so logits may differ as much as such bits move them here.

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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from built_wheel import built
from helpers.gguf_float32 import in_float32

from mlx_lqr.convert.sources import demo_gguf_file
from mlx_lqr.loading import load

EMULATOR, COMPILER = "qemu-aarch64-static", "aarch64-linux-gnu-gcc"
HERE = {
    EMULATOR: "qemu-user-static",
    COMPILER: "gcc-aarch64-linux-gnu",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
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
    root = folder / "debian"
    if not root.is_dir():
        unpack_debian(folder, root)
    arm = emulated(folder, root, llama_wheel(folder / "wheels"), our_wheel(folder))
    print(*versions_and_sizes(arm, folder), sep="\n", flush=True)

    controller = folder / "ocean.safetensors"
    if not controller.is_file():
        fit = "-m", "mlx_lqr", "fit", "demo", "--concept", "ocean", "--cost", "feature", "-o", str(controller)
        subprocess.run([sys.executable, *fit], check=True)
    packed, plain = demo_gguf_file(), folder / "float32.gguf"
    if not plain.is_file():
        in_float32(packed, plain)
    compare(arm, plain, controller, "float32", exact=True)
    steered = compare(arm, packed, controller, "4 bits", exact=False)

    command = "-m", "mlx_lqr.runtime", str(packed), "-c", str(controller), "--temperature", "0"
    assert arm.run(*command, "-p", PROMPT, "-n", str(COUNT)) == steered + "\n"
    print("in its template:", arm.run(*command, "-p", "What is blue?", "-n", "8", "--chat").strip())


def compare(arm: Machine, model: Path, controller: Path, name: str, *, exact: bool) -> str:
    """Both machines' tokens and logits, on ARM with the laws in C and then in Python; returns the steered text there.

    Args:
        exact: whether the tokens have to be the same. Otherwise the logits before the first that is not may be apart by
            twice what rounding moves them here.
    """
    here = Machine([sys.executable], dict(os.environ), arm.work)
    expected, expected_logits = answered(here, model, controller)
    moved = moved_by_rounding(model)
    print(f"{name}, here: resident {expected['peak_kb'] / 1e3:.0f} MB; a millionth moves logits by up to {moved:.2g}")
    text = ""
    for laws, machine in ("C", arm), ("Python", arm.without_compiler()):
        got, logits = answered(machine, model, controller)
        assert (got["machine"], got["in_python"]) == ("aarch64", "" if laws == "C" else "no C compiler is here")
        for which, answer in got["answers"].items():
            tokens, wanted = answer["tokens"], expected["answers"][which]["tokens"]
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, wanted, strict=False)))
            apart = float(np.abs(logits[which] - expected_logits[which])[: same + 1].max())
            print(
                f"{name}, laws in {laws}, {which}: {same} of {len(wanted)} tokens the same, logits within {apart:.2g}"
            )
            print(f"  {answer['text']!r}", flush=True)
            assert apart < (1e-3 if exact else 2 * moved)
            assert tokens == wanted or not exact
        print(f"  resident {got['peak_kb'] / 1e3:.0f} MB, the emulator's own among them")
        assert got["answers"]["steered"]["tokens"] != got["answers"]["unsteered"]["tokens"]
        text = text or got["answers"]["steered"]["text"]
        assert text == got["answers"]["steered"]["text"], "the laws in C and in Python differ"
    return text


def moved_by_rounding(file: Path) -> float:
    """How far the prompt's last logits move here, at most, where the first block's output changes by a millionth."""
    model = load(file, backend="llama")
    tokens = model.tokenizer.encode(PROMPT)
    plain = model.logits(tokens)
    moved = [model.logits(tokens, law=Rounding(seed), steer_all=True) for seed in range(8)]
    return float(np.abs(np.stack(moved) - plain).max())


class Rounding:
    """A law that multiplies each number of the first block's output by 1 + 1e-6 or by 1 - 1e-6."""

    layers = (0,)
    site = "block"
    replayable = False
    acts = True

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)

    def to(self, *_: Any, **__: Any) -> Rounding:
        return self

    def aim(self) -> None:
        pass

    def __call__(self, layer: int, z: np.ndarray, output: np.ndarray) -> np.ndarray:
        return output * (1 + self.generator.choice([-1e-6, 1e-6], output.shape)).astype(np.float32)


def answered(machine: Machine, model: Path, controller: Path) -> tuple[Any, Mapping[str, np.ndarray]]:
    """What the program above prints on a machine, and the logits (1 + n, V) by name."""
    logits = machine.work / "logits.npz"
    printed = machine.run("-c", PROGRAM, str(model), str(controller), PROMPT, str(COUNT), str(logits))
    with np.load(logits) as saved:
        return json.loads(printed), dict(saved)


@dataclass(frozen=True)
class Machine:
    """A Python, the variables that it sees, and the folder in which it runs, away from the checkout."""

    python: list[str]
    variables: dict[str, str]
    work: Path

    def run(self, *arguments: str) -> str:
        """What it prints."""
        variables = {**self.variables, "OMP_NUM_THREADS": "1"}
        command = [*self.python, *arguments]
        return subprocess.run(
            command, cwd=self.work, env=variables, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    def without_compiler(self) -> Machine:
        """The same with no program on its path and nothing compiled before."""
        variables = {**self.variables, "PATH": str(self.work), "MLX_LQR_CACHE": str(self.work)}
        return replace(self, variables=variables)


def emulated(folder: Path, root: Path, llama: Path, ours: Path) -> Machine:
    """Debian's Python for arm64 under `root`, in a new environment with what the documentation names, by pip there.

    The compiler for ARM is on its path as `cc`. It runs on this machine.
    """
    environment, programs, work = folder / "environment", folder / "programs", folder / "work"
    for stale in (environment, programs, work):
        shutil.rmtree(stale, ignore_errors=True)
    programs.mkdir()
    work.mkdir()
    (programs / "cc").symlink_to(str(shutil.which(COMPILER)))
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables |= {"QEMU_LD_PREFIX": str(root), "PATH": str(programs), "MLX_LQR_CACHE": str(programs / "cache")}
    emulator = str(shutil.which(EMULATOR))
    (python,) = (root / "usr/bin").glob("python3.*[0-9]")
    Machine([emulator, str(python)], variables, work).run("-m", "venv", "--without-pip", str(environment))
    machine = Machine([emulator, str(environment / "bin/python")], variables, work)
    (pip,) = (root / "usr/share/python-wheels").glob("pip-*.whl")
    for wanted in ([str(llama)], ["--no-deps", str(ours)]):
        machine.run(f"{pip}/pip", "install", "--quiet", "--only-binary=:all:", *wanted)
    return machine


def versions_and_sizes(arm: Machine, folder: Path) -> Iterator[str]:
    """What runs there, and how many megabytes each package takes on disk."""
    emulator = subprocess.run([arm.python[0], "--version"], check=True, capture_output=True, text=True).stdout
    yield emulator.partition("\n")[0]
    yield arm.run("-c", "import platform; print(platform.python_version(), platform.machine())").strip()
    (packages,) = folder.glob("environment/lib/python3*/site-packages")
    for own in sorted(metadata.distributions(path=[str(packages)]), key=lambda own: own.metadata["Name"].lower()):
        size = sum(Path(str(file.locate())).stat().st_blocks * 512 for file in own.files or [])
        yield f"{own.metadata['Name']} {own.version}: {size / 1e6:.1f} MB"


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
    codename = release["VERSION_CODENAME"]
    known = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(SITE) $(CODENAME)"], check=True, capture_output=True, text=True
    ).stdout
    site = next(line.split()[0] for line in known.splitlines() if line.split()[1:] == [codename])
    state = folder / "apt"
    for name in ("lists/partial", "archives/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    key = "/usr/share/keyrings/debian-archive-keyring.gpg"
    sources = f"deb [signed-by={key}] {site} {codename} main\n"
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
    shutil.rmtree(unfinished, ignore_errors=True)
    for name in ("bin", "lib", "sbin"):
        (unfinished / "usr" / name).mkdir(parents=True)
        (unfinished / name).symlink_to(f"usr/{name}")
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

"""What only a Mac can tell, as one Markdown table to paste into an issue.

    make test-metal                              # on a Mac: tests, then decoding, start-up and synthesis
    python benchmarks/metal.py --quick --no-tests    # a few rounds of the benchmarks alone, on any machine

The benchmarks are those of this folder, each in a process of its own; what they print becomes the table's rows.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import click

FOLDER = Path(__file__).parent
TESTS = ["-m", "pytest", "-n", "2", "--dist", "loadfile"]
BENCHMARKS = {
    "decode.py": ["--tokens", "16", "--rounds", "2"],
    "startup.py": ["--rounds", "1"],
    "synthesis.py": ["--rounds", "1", "--no-torch", "--no-scaling"],
}
"""Each with its options for a quick look."""
NUMBER = re.compile(r"\d")


def machine() -> str:
    """Chip, memory, system and versions, in one line."""
    import mlx.core as mx

    device = mx.default_device()
    told = mx.device_info()
    system = f"macOS {platform.mac_ver()[0]}" if platform.mac_ver()[0] else platform.platform(terse=True)
    parts = [f"{chip()} ({'GPU' if device == mx.gpu else 'CPU'})", system, f"Python {platform.python_version()}"]
    if "memory_size" in told:
        parts.insert(1, f"{told['memory_size'] / 2**30:.0f} GB")
    return ", ".join([*parts, *(f"{name} {metadata.version(name)}" for name in ("mlx", "mlx-lm", "mlx-lqr"))])


def chip() -> str:
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return names[0] if names else platform.machine()


def rows(output: str) -> Iterator[tuple[str, str, str]]:
    """What was measured, the number, and what stands beside it, from lines whose columns are two spaces apart."""
    for line in output.splitlines():
        name, *columns = re.split(r"\s{2,}", line.strip())
        if columns and NUMBER.search(columns[0]):
            yield name, columns[0], ", ".join(columns[1:])


def run(arguments: list[str]) -> tuple[int, str]:
    """The exit status of a Python program and its output, which is shown as it comes."""
    click.echo(f"$ python {' '.join(arguments)}", err=True)
    lines = []
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, cwd=FOLDER.parent
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            click.echo(line, nl=False, err=True)
            lines.append(line)
    return process.returncode, "".join(lines)


@click.command()
@click.option("--quick", is_flag=True, help="Few rounds: enough to see that everything runs.")
@click.option("--tests/--no-tests", "with_tests", default=True, help="Run the test suite first.")
def main(quick: bool, with_tests: bool) -> None:
    """Run tests and benchmarks and print one table; the exit status is 1 where any of them failed."""
    table: list[tuple[str, str, str]] = []
    failed = False
    if with_tests:
        status, output = run(TESTS)
        failed |= status != 0
        table.append(("tests", output.strip().rpartition("\n")[2].strip("= "), "all"))
        table += [(line.partition(" - ")[0], "", "") for line in output.splitlines() if line.startswith("FAILED")]
    for name, options in BENCHMARKS.items():
        status, output = run([str(FOLDER / name), *(options if quick else [])])
        failed |= status != 0
        table += [(f"**{name}**", "failed" if status else "", ""), *rows(output)]
    click.echo(f"\n{machine()}\n\n| what | measured | aim |\n|---|---|---|")
    for row in table:
        click.echo("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()

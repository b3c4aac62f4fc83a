"""The pages of the documentation as programs: their fenced blocks in reading order, and what running them prints."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from click.testing import CliRunner
from markdown_it import MarkdownIt
from markdown_it.token import Token

from mlx_lqr.commands import main
from mlx_lqr.runtime.__main__ import main as runtime

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
COMMANDS, RUNTIME = "mlx-lqr", "python -m mlx_lqr.runtime"


@dataclass(frozen=True)
class Block:
    """A fenced block, and the HTML comment right before it, which readers do not see."""

    page: Path
    line: int
    language: str
    text: str
    mark: str

    @property
    def place(self) -> str:
        return f"{named(self.page)}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block: a line each, but for what a backslash or a here-document continues."""
        return [command for command in _commands(self.text) if shlex.split(command, comments=True)]


def named(page: Path) -> str:
    """A page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def continued(page: Path) -> Path | None:
    """The page that this one goes on from, in whose folder and with whose Python names its blocks run."""
    mark = re.match(r"<!-- continues: (\S+) -->", page.read_text("utf-8"))
    return (page.parent / mark[1]).resolve() if mark else None


def chains() -> list[list[Path]]:
    """The pages in the order in which they are read: each list begins with a page that stands alone."""
    following = {continued(page): page for page in PAGES if continued(page) is not None}
    lists = [[page] for page in PAGES if continued(page) is None]
    for pages in lists:
        while pages[-1] in following:
            pages.append(following[pages[-1]])
    return lists


def hook() -> ModuleType:
    """docs/pages.py, which makes pages of the site and parts of them."""
    spec = importlib.util.spec_from_file_location("pages", DOCS / "pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    fenced = []
    comment = ""
    for token in _tokens(page):
        if token.type == "html_block":
            comment = token.content.strip().removeprefix("<!--").removesuffix("-->").strip()
        elif token.type == "fence":
            assert token.map is not None
            fenced.append(Block(page, token.map[0] + 1, token.info.strip(), token.content, comment))
            comment = ""
        else:
            comment = ""
    return fenced


def quoted(page: Path) -> list[str]:
    """What stands in single backquotes on a page."""
    return [token.content for token in _inline(page) if token.type == "code_inline"]


def links(page: Path) -> list[str]:
    """Where the links and pictures of a page lead."""
    places = [token.attrGet("href") or token.attrGet("src") for token in _inline(page)]
    return [str(place) for place in places if place is not None]


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    tokens = MarkdownIt("commonmark").parse(text)
    headings = [text.content for mark, text in itertools.pairwise(tokens) if mark.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def indented(page: Path) -> list[str]:
    """The blocks of a page that are set off by spaces alone."""
    return [token.content for token in _tokens(page) if token.type == "code_block"]


def _tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").parse(page.read_text("utf-8"))


def _inline(page: Path) -> list[Token]:
    return [child for token in _tokens(page) for child in token.children or ()]


def _commands(text: str) -> Iterator[str]:
    lines = iter(text.splitlines())
    for line in lines:
        command = line
        while command.endswith("\\"):
            command = command.removesuffix("\\") + next(lines)
        if document := re.search(r"<<\s*'?(\w+)'?", command):
            for part in lines:
                command += "\n" + part
                if part == document[1]:
                    break
        yield command


@dataclass(frozen=True)
class Output:
    stdout: str
    stderr: str


@dataclass
class Session:
    """A folder and the Python names that the blocks of a page have made there.

    Args:
        smaller: options that make a command cheaper, by how the command begins; the longest beginning counts.
        typed: what a person types, by how the command begins.
    """

    folder: Path
    smaller: Mapping[str, str]
    typed: Mapping[str, str]
    names: dict[str, Any] = field(default_factory=dict)
    printed: dict[str, Output] = field(default_factory=dict)

    def run(self, block: Block) -> Output:
        """What a Python block prints, or the last command of a shell block, which may be marked as one that fails."""
        if block.language == "python":
            return self.python(block)
        output = Output("", "")
        for command in block.commands:
            status = 2 if block.mark == "fails" and command == block.commands[-1] else 0
            output = self.printed[command] = self.command(command, status)
        return output

    def python(self, block: Block) -> Output:
        source = compile("\n" * block.line + block.text, str(block.page), "exec")
        with _inside(self.folder), _captured() as captured:
            exec(source, self.names)
        return Output(*(stream.getvalue() for stream in captured))

    def command(self, command: str, status: int = 0) -> Output:
        """Run a command in this process where it is one of ours, and in a shell where not.

        Raises:
            AssertionError: it ended with another status.
        """
        *before, last = re.split(r"\s\|\s", command)
        program = program_of(last)
        if program is None:
            done = subprocess.run(
                ["bash", "-ec", command], capture_output=True, text=True, cwd=self.folder, check=False
            )
            assert done.returncode == status, f"{command}\n{done.stderr}"
            return Output(done.stdout, done.stderr)
        typed = self.command(" | ".join(before)).stdout if before else _by_beginning(self.typed, last)
        arguments = [*arguments_of(last), *shlex.split(_by_beginning(self.smaller, last))]
        with _inside(self.folder):
            if program == COMMANDS:
                result = CliRunner().invoke(main, arguments, input=typed)
                assert result.exit_code == status, f"{command}\n{result.output}\n{result.exception!r}"
                return Output(result.stdout, result.stderr)
            with _captured() as captured:
                ended = runtime(arguments)
        output = Output(*(stream.getvalue() for stream in captured))
        assert ended == status, f"{command}\n{output.stderr}"
        return output


def program_of(command: str) -> str | None:
    """Which of our programs a command runs."""
    return next((name for name in (RUNTIME, COMMANDS) if command.startswith(name + " ")), None)


def arguments_of(command: str) -> list[str]:
    """The arguments of one of our programs in a command."""
    program = program_of(command)
    assert program is not None
    return shlex.split(command.removeprefix(program), comments=True)


def _by_beginning(table: Mapping[str, str], command: str) -> str:
    return table.get(max((key for key in table if command.startswith(key)), key=len, default=""), "")


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _captured() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    streams = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        yield streams

"""The pages of the site that nobody writes: command reference, table of methods, changes, how to contribute.

mkdocs calls the `on_...` functions (mkdocs.yml names this file as its hook). `generated` alone says what there is, and
needs no mkdocs, so that the tests check links against it.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_lqr.commands import main
from mlx_lqr.methods import table

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = "reference/commands"
FROM_ROOT = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md"}
"""Pages that are files at the top of the repository."""
MARK = re.compile(r"^<!-- ((not run|measured|continues): .*|fails) -->\n", re.MULTILINE)
"""What the tests read beside a block of a page."""
TABLE_OF_METHODS = "The table is made from the registry of methods when the site is built (`make docs`).\n"
"""The line of methods.md in whose place the table stands."""


def generated() -> dict[str, str]:
    """The text of each generated page, by its path in docs/."""
    pages = {f"{COMMANDS}/{page}.md": text for page, text in _commands()}
    for page, file in FROM_ROOT.items():
        pages[page] = (ROOT / file).read_text("utf-8").replace("](docs/", "](").replace("](README.md", "](index.md")
    return pages


def _commands() -> Iterator[tuple[str, str]]:
    """A page for each command, named `fit` or `eval-lm-eval`, and the list of all."""
    context = main.make_context("mlx-lqr", [], resilient_parsing=True)
    rows = []
    for name, command, inner in _below(context):
        page = name.replace(" ", "-")
        rows.append(f"| [`{name}`]({page}.md) | {_cell(_help(command).partition(chr(10) + chr(10))[0])} |")
        yield page, _command_page(name, command, inner)
    lines = [
        "# Commands",
        "",
        "Every command says the same in a terminal: `mlx-lqr COMMAND --help`.",
        "",
        "| command | what it does |",
        "|---|---|",
        *rows,
        "",
        "A mistake is one line on stderr and exit status 2. Ctrl-C ends with status 130.",
    ]
    yield "index", "\n".join(lines) + "\n"


def _below(context: click.Context, before: str = "") -> Iterator[tuple[str, click.Command, click.Context]]:
    group = context.command
    assert isinstance(group, click.Group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=context)
        yield f"{before}{name}", command, inner
        if isinstance(command, click.Group):
            yield from _below(inner, f"{before}{name} ")


def _command_page(name: str, command: click.Command, context: click.Context) -> str:
    parts = [f"# mlx-lqr {name}", _help(command), f"```text\n{command.get_usage(context)}\n```"]
    for title, rows in _options(command, context):
        cells = [f"| `{option}` | {_cell(text)} |" for option, text in rows]
        what = "argument" if title == "Arguments" else "option"
        parts.append("\n".join([f"## {title}", "", f"| {what} | what it does |", "|---|---|", *cells]))
    if isinstance(command, click.Group):
        names = [f"- [`{name} {below}`]({name}-{below}.md)" for below in command.list_commands(context)]
        parts.append("\n".join(["## Commands", "", *names]))
    return "\n\n".join(parts) + "\n"


class _Sections(click.HelpFormatter):
    """A formatter that keeps the lists of a help text, each with its heading, instead of laying them out."""

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[tuple[str, list[tuple[str, str]]]] = []
        self._heading = ""

    def write_heading(self, heading: str) -> None:
        self._heading = heading

    def write_dl(self, rows: Any, *_: Any, **__: Any) -> None:
        self.sections.append((self._heading, list(rows)))


def _options(command: click.Command, context: click.Context) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The options as `--help` groups them: (heading, [(option, help)])."""
    formatter = _Sections()
    command.format_options(context, formatter)
    below = command.list_commands(context) if isinstance(command, click.Group) else []
    for heading, rows in formatter.sections:
        if rows and rows[0][0].strip() not in below:
            yield heading or "Options", rows


def _help(command: click.Command) -> str:
    """The help text, a line for each paragraph."""
    return re.sub(r"(?<=\S)\n(?=\S)", " ", inspect.cleandoc(command.help or "").partition("\f")[0])


def _cell(text: str) -> str:
    return re.sub(r"([|<\[])", r"\\\1", " ".join(text.split()))


def on_startup(**_: object) -> None:
    """Lay out the package as it installs, before the reference is told to look there."""
    package = ROOT / "build" / "package" / "mlx_lqr"
    shutil.rmtree(package.parent, ignore_errors=True)
    shutil.copytree(ROOT / "mlx_lqr", package, copy_function=os.symlink)
    for name in ("runtime", "convert"):
        (package / name).symlink_to(ROOT / name)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill in the commands."""
    assert config.nav is not None
    for section in config.nav:
        for entry in section.get("Reference", ()):
            if "Commands" in entry:
                below = [f"{COMMANDS}/{page}.md" for page, _ in _commands() if page != "index"]
                entry["Commands"] = [f"{COMMANDS}/index.md", *below]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for page, text in generated().items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """A page without what only the tests read, and with the table of methods."""
    wide = f'<div class="wide" markdown>\n\n{table()}\n\n</div>\n'
    return _without_escapes(MARK.sub("", markdown)).replace(TABLE_OF_METHODS, wide)


def _without_escapes(markdown: str) -> str:
    """The code in cells of tables as this renderer wants it: GitHub reads `\\|` there, where it shows the backslash."""

    def row(line: re.Match[str]) -> str:
        return re.sub(r"`[^`]*`", lambda code: code[0].replace("\\|", "|"), line[0])

    return re.sub(r"^\|.*$", row, markdown, flags=re.MULTILINE)

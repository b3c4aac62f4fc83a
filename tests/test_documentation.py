"""README.md and docs/ hold what they say: each command and each Python block runs, in order, in an empty folder.

Blocks share a page's folder and Python names; a page that begins with `<!-- continues: PAGE -->` goes on with those of
another. A ```text block is what the last command before it prints. A comment before a block tells what readers need not
see: `<!-- not run: REASON -->`; `<!-- fails -->` for a last command that is a mistake; or `<!-- measured: HOW -->` for
numbers that take longer to measure than a test may, which are checked for their columns and words.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import pytest
from helpers.chance import allow_unseeded
from helpers.documentation import (
    COMMANDS,
    DOCS,
    PAGES,
    ROOT,
    RUNTIME,
    Block,
    Output,
    Session,
    anchors,
    arguments_of,
    blocks,
    chains,
    continued,
    hook,
    indented,
    links,
    named,
    quoted,
)
from helpers.shown_output import difference, unlike

import mlx_lqr
from mlx_lqr.analysis import inputs, spectra
from mlx_lqr.backends.mlx.model import MLXModel
from mlx_lqr.backends.protocol import Model, Trace
from mlx_lqr.commands import main
from mlx_lqr.commands.kept_controllers import kept_controller
from mlx_lqr.convert.sources import demo_model
from mlx_lqr.methods import calibration
from mlx_lqr.methods.steering import Steering
from mlx_lqr.runtime.__main__ import _parser as runtime_parser
from mlx_lqr.tasks.damage import Capability, NeutralText

NOT_RUN = {
    "installs": r"git clone|make |pip install |uv tool install |source ",
    "needs a CUDA GPU": r"mlx-lqr .*--device cuda",
    "fetches from the hub": r"mlx-lqr eval lm-eval ",
    "uses the hub": r"mlx-lqr push (?!.*--dry-run)|mlx-lqr .* -c hf:",
    "needs llama.cpp": r"llama-cli ",
    "serves until it is stopped": r"mlx-lqr serve ",
    "asks a server": r"llm |lm_eval ",
    "needs a model of your own": r"(mlx-lqr \w+|python -m mlx_lqr\.runtime) \S+\.gguf ",
    "needs an adapter of your own": r"mlx-lqr \w+ \S+ .*--adapter my-adapter\b",
    "needs several machines": r"mlx\.launch |scp ",
    "takes long": r"python (-m )?benchmarks\b",
}
"""Why a command is not run, and how such commands look."""
INSTEAD = {"make demo": "mlx-lqr demo -n 22"}
"""What runs for a command that does not."""
SMALLER = {
    "mlx-lqr chat": "-n 4",
    "mlx-lqr chat demo -c dog.safetensors:3x -n 40": "",
    "mlx-lqr certify": "--strengths 1",
    "mlx-lqr compare": "--limit 1 --samples 1 -n 6 --strengths 2",
    "mlx-lqr eval": "--limit 1 -n 4 --strengths 2",
    "mlx-lqr eval concept": "--limit 1 --samples 1 -n 4 --strengths 2",
    "mlx-lqr eval truthfulness": "--limit 1 -n 4 --strengths 2 --examples 1",
    "mlx-lqr fit demo --concept dog --q": "--jacobian-prompts 1",
    "mlx-lqr fit demo --concept-word": "--jacobian-prompts 1",
    "mlx-lqr fit demo --concept dog --cost state": "--no-calibration",
    "mlx-lqr fit demo --concept polite": "--cost feature --jacobian-prompts 1",
    "mlx-lqr fit demo --concept refusal": "--cost feature --jacobian-prompts 1",
    "mlx-lqr fit demo --concept truth": "--cost feature --jacobian-prompts 1",
    "mlx-lqr fit demo --positive": "--jacobian-prompts 1",
    "mlx-lqr generate": "-n 6",
    'mlx-lqr generate demo -p "Once upon a time," -c dog.safetensors -n 30': "",
    'mlx-lqr generate demo -p "Once upon a time," -n 9000': "",
    'mlx-lqr generate demo -p "Once upon a time," -c dog.safetensors:0.8 -n 30 --backend torch': "-n 6",
    "mlx-lqr linearity": "--strengths 3",
    "mlx-lqr linearize": "--nominal 'Once upon a time,'",
    "mlx-lqr tune": "--limit 2 --samples 1 --evaluations 1 -n 12 --strengths 0,4 --at-most 10 --jacobian-prompts 1",
    "python -m mlx_lqr.runtime": "-n 6",
}
"""Options that a command gets here besides its own, by how it begins, so that it takes seconds."""
TYPED = {"mlx-lqr chat": "Hello\n/strength 3\nAnd now?\n/track\n/help\n/quit\n"}
CALIBRATE = calibration.calibrate
IN_FULL = {"dog"}
"""Concepts whose texts the pages show; of the others six prompts a side are enough here."""


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The same activations and matrices are computed once, whichever page asks; measures take few samples."""
    import matplotlib  # here, so that the tests without it are collected

    matplotlib.use("Agg")
    cache = tmp_path_factory.mktemp("cache")  # with nothing in it that another run has fitted
    (cache / "demo").mkdir()
    (cache / "demo" / demo_model().name).symlink_to(demo_model())
    prompts_of, half_sentences, questions = mlx_lqr.bundled_prompts, inputs.default_prompts, Capability.bundled()
    sentences = NeutralText()._sentences[:1]

    def few_prompts(concept: str) -> tuple[list[str], list[str]]:
        positive, negative = prompts_of(concept)
        return (positive, negative) if concept in IN_FULL else (positive[:6], negative[:6])

    def few_half_sentences(count: int, without: Sequence[str] = ()) -> list[str]:
        return half_sentences(2, without)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_LQR_CACHE", str(cache))
        patch.setattr(MLXModel, "residuals", once(MLXModel.residuals, _residuals_key))
        patch.setattr(MLXModel, "jacobian", once(MLXModel.jacobian, _jacobian_key))
        linearity = sys.modules["mlx_lqr.analysis.linearity"]
        patch.setattr(linearity, "dominant_modes", once(spectra.dominant_modes, lambda A, m: (A.tobytes(), m)))
        for module in [module for name, module in sys.modules.items() if name.startswith("mlx_lqr")]:
            if vars(module).get("bundled_prompts") is prompts_of:
                patch.setattr(module, "bundled_prompts", few_prompts)
            if vars(module).get("default_prompts") is half_sentences:
                patch.setattr(module, "default_prompts", few_half_sentences)
        commands = [module for name, module in sys.modules.items() if name.startswith("mlx_lqr.commands.")]
        for module in [calibration, *commands]:
            if vars(module).get("calibrate") is CALIBRATE:
                patch.setattr(module, "calibrate", once(_calibrate, _steering_key))
        patch.setattr("mlx_lqr.tasks.damage.POSITIONS", 2)
        allow_unseeded(patch, seed=0)
        patch.setattr(NeutralText, "_sentences", property(lambda self: sentences))
        patch.setattr(Capability, "bundled", classmethod(lambda cls: cls(questions.questions[:1])))
        yield


def once(function: Callable[..., Any], key: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which computes nothing a second time; `key` is of its positional arguments."""
    known: dict[Any, Any] = {}

    def remembering(*given: Any, progress: object = None, **options: Any) -> Any:
        if any(options.values()):
            return function(*given, **options)
        name = key(*given)
        if name not in known:
            known[name] = function(*given)
        return known[name]

    return remembering


def _residuals_key(model: MLXModel, rows: Sequence[Sequence[int]]) -> tuple[str, str]:
    return model.fingerprint, str(rows)


def _jacobian_key(model: MLXModel, trace: Trace, layer: int) -> tuple[str, bytes, int]:
    return model.fingerprint, trace.residual.tobytes(), layer


def _steering_key(model: Model, steering: Steering) -> tuple[str, str, tuple[str, ...], tuple[bytes, ...]]:
    arrays = tuple(array.tobytes() for _, array in sorted(steering.arrays.items()))
    return model.fingerprint, steering.method, steering.concepts, arrays


def _calibrate(model: Model, steering: Steering) -> mlx_lqr.Calibration:
    """On one text of each kind, but where pages show the strength."""
    with pytest.MonkeyPatch.context() as patch:
        if steering.concepts[0] not in IN_FULL or steering.method != "alqr":
            for texts in ("SENTENCES", "QUESTIONS", "OPENINGS"):
                patch.setattr(calibration, texts, vars(calibration)[texts][:1])
        return CALIBRATE(model, steering)


@pytest.fixture(scope="module", autouse=True)
def served(quick: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whoever asks the server of the pages asks one with the concept ocean, which begins with the first client."""
    import openai  # here, and the server, so that the tests without them are collected
    from helpers.serving import listening

    from mlx_lqr.serving.app import application
    from mlx_lqr.serving.guard import Access
    from mlx_lqr.serving.service import Service

    client = openai.OpenAI
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:

        @functools.cache
        def port() -> int:
            service = Service(mlx_lqr.load("demo"), tmp_path_factory.mktemp("served"))
            stack.callback(service.close)
            service.controllers.add("ocean", kept_controller(service.model, "ocean", lambda *_: None)[1])
            return stack.enter_context(listening(application(service, Access())))

        def connected(*, base_url: str, **options: Any) -> openai.OpenAI:
            assert base_url == "http://127.0.0.1:8080/v1"
            return client(base_url=base_url.replace("8080", str(port())), **options)

        patch.setattr(openai, "OpenAI", connected)
        yield


class Reading:
    """Pages that are carried out block by block, up to the block that is asked for."""

    def __init__(self, pages: Sequence[Path], folder: Path) -> None:
        self.session = Session(folder, SMALLER, TYPED)
        self._blocks = [block for page in pages for block in blocks(page)]
        self._outputs: list[Output] = []
        self._broken: str | None = None

    def output(self, block: Block) -> Output:
        """What a block prints. A block after one that failed is not run."""
        index = self._blocks.index(block)
        while len(self._outputs) <= index:
            if self._broken is not None:
                pytest.fail(f"{self._broken} failed, so that nothing after it has run")
            following = self._blocks[len(self._outputs)]
            try:
                self._outputs.append(self._run(following))
            except BaseException:
                self._broken = following.place
                raise
        return self._outputs[index]

    def finish(self) -> None:
        self.output(self._blocks[-1])

    def printed(self, beginning: str) -> Output:
        """What the command of the pages that begins so prints."""
        self.finish()
        (command,) = (command for command in self.session.printed if command.startswith(beginning))
        return self.session.printed[command]

    def _run(self, block: Block) -> Output:
        if block.language == "text":  # the output of what stands before it
            return self._outputs[-1]
        if not block.mark.startswith("not run"):
            return self.session.run(block)
        output = Output("", "")
        following = self._blocks[self._blocks.index(block) + 1 :]
        if not following or following[0].language != "text":
            return output
        for command in block.commands:
            program = next((INSTEAD[known] for known in INSTEAD if command.startswith(known)), None)
            if program is not None:
                output = self.session.command(program)
        return output


@pytest.fixture(scope="module")
def readings(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Reading]:
    together = [(pages, Reading(pages, tmp_path_factory.mktemp(pages[0].stem))) for pages in chains()]
    return {page: reading for pages, reading in together for page in pages}


BLOCKS = [block for pages in chains() for page in pages for block in blocks(page)]
PROGRAMS = [block for block in BLOCKS if block.language in ("sh", "python")]
SHOWN = [block for block in BLOCKS if block.language == "text"]


def place(block: Block) -> str:
    return block.place


@pytest.mark.parametrize("block", PROGRAMS, ids=place)
def test_a_block_runs(block: Block, readings: dict[Path, Reading]) -> None:
    readings[block.page].output(block)


@pytest.mark.parametrize("block", SHOWN, ids=place)
def test_output_is_as_shown(block: Block, readings: dict[Path, Reading]) -> None:
    output = readings[block.page].output(block)
    printed = output.stderr if block.text.startswith(("Note:", "Error:")) else output.stdout
    assert printed.strip(), "nothing was printed"
    compare = unlike if block.mark.startswith("measured: ") else difference
    assert compare(block.text, printed) is None, compare(block.text, printed)


@pytest.mark.parametrize(
    ("shown", "printed", "alike"),
    [
        ("layer 24: 0.20 ...", "layer 24:   0.205 and more", True),
        ("layer 24: 0.20 ...", "layer 25:   0.205 and more", False),
        ("layer 24: 0.20 ...", "layer 24:   0.25 and more", False),
        ("Wrote it (142 kB)", "Wrote it (141 kB)", True),
        ("Wrote it (142 kB)", "Wrote it (97 kB)", False),
        ("...\nlast", "first\nsecond\nlast", True),
        ("first\nlast", "first\nsecond\nlast", False),
    ],
)
def test_what_counts_as_shown(shown: str, printed: str, alike: bool) -> None:
    assert (difference(shown, printed) is None) == alike


@pytest.mark.parametrize(
    ("shown", "alike"),
    [
        ("trial  layers  strength  relative", True),
        ("trial  layers  strength", False),
        ("7  last third  2.5  0.44 (0.28 to 0.59)  1.23  *", True),
        ("7  last third  2.5  0.44  1.23  *", False),
        ("7  2.5  0.44 (0.28 to 0.59)  1.23", False),
    ],
)
def test_what_counts_as_a_measured_table(shown: str, alike: bool) -> None:
    printed = "trial  layers  strength  relative\n    1    auto      3.00  0.1 (0.0 to 0.2)  1.00"
    assert (unlike(shown, printed) is None) == alike


@pytest.mark.parametrize("block", BLOCKS, ids=place)
def test_a_mark_is_needed_and_known(block: Block) -> None:
    kind, _, reason = block.mark.partition(": ")
    if block.language == "sh":
        reasons = {reason for reason, form in NOT_RUN.items() for line in block.commands if re.match(form, line)}
        assert reasons == ({reason} if kind == "not run" else set())
        assert kind in ("", "not run", "fails")
        if kind == "not run":
            assert all(re.match(NOT_RUN[reason], line) for line in block.commands), "a command here could be run"
    elif block.language == "text":
        assert kind in ("", "measured")
    else:
        assert (block.language, block.mark) == ("python", "")


UNRUN = [line for block in PROGRAMS if block.mark.startswith("not run") for line in block.commands]


@pytest.mark.parametrize("command", UNRUN)
def test_a_command_that_is_not_run_would_be_understood(command: str) -> None:
    for one in command.split("&&"):
        words = shlex.split(one, comments=True)
        match words:
            case ["git", "clone", *_] | ["cd", _] | ["source", ".venv/bin/activate"]:
                pass
            case ["llm", *_] | ["lm_eval", *_] | ["llama-cli", *_]:
                pass
            case ["make", target]:
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
            case ["pip", "install", *_] | ["uv", "tool", "install", *_]:
                for extra in ",".join(re.findall(r"\.\[([\w,-]+)\]", one)).split(","):
                    assert not extra or re.search(rf"^{extra} = ", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
            case ["python", "-m", "mlx_lqr.runtime", *arguments]:
                runtime_parser().parse_args(arguments)
            case ["python", script, *arguments]:
                parsed(benchmark(script), arguments)
            case ["mlx.launch", *_]:
                end = words.index("--")
                assert words[end + 1] == "mlx-lqr"
                parsed(main, words[end + 2 :])
            case _:
                parsed(main, arguments_of(one.strip()))


def benchmark(script: str) -> click.Command:
    """The command of a benchmark's file."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        spec.loader.exec_module(module)
    return module.main


def parsed(command: click.Command, arguments: list[str]) -> None:
    """Parse arguments without running anything.

    Raises:
        click.UsageError: an option or a command that there is not.
    """
    context = command.make_context(command.name, list(arguments))
    if isinstance(command, click.Group):
        _, inner, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert inner is not None
        parsed(inner, rest)


def options_of(command: click.Command) -> dict[str, set[str]]:
    """The options of a command and of those below it, by their names: {"fit": {"--q", ...}, "eval concept": ...}."""
    if isinstance(command, click.Group):
        below = {name: options_of(one) for name, one in command.commands.items()}
        return {f"{name} {rest}".strip(): options for name, one in below.items() for rest, options in one.items()}
    parameters = command.get_params(click.Context(command))  # those of the methods are none of command.params
    return {"": {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}}


OPTIONS = options_of(main)
HOOK = hook()
GENERATED: dict[Path, str] = {DOCS / page: text for page, text in HOOK.generated().items()}
OF_RUNTIME = {option for action in runtime_parser()._actions for option in action.option_strings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_option_named_is_there(page: Path) -> None:
    known = set().union(*OPTIONS.values(), OF_RUNTIME, {"--help"})
    for text in quoted(page):
        named = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", text))
        if text.startswith("-"):
            assert named <= known, text
        elif text.startswith(f"{COMMANDS} "):
            words = text.split()[1:]
            below = [options for name, options in OPTIONS.items() if name.split()[0] == words[0]]
            assert below, f"no such command: {text}"
            own = OPTIONS.get(" ".join(words[:2])) or set().union(*below)
            assert named <= own, text
        elif text.startswith(RUNTIME):
            assert named <= {*OF_RUNTIME, "-m"}, text


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_name_and_file_is_there(page: Path) -> None:
    for text in quoted(page):
        for name in re.findall(r"\b(?:mlx_lqr|mlx_lm|tasks)(?:\.[A-Za-z_]\w*)+", text):
            module, *attributes = ("mlx_lqr." * name.startswith("tasks") + name).split(".")
            value: Any = importlib.import_module(module)
            for attribute in attributes:
                if not hasattr(value, attribute):
                    importlib.import_module(f"{value.__name__}.{attribute}")
                value = getattr(value, attribute)
        for file in re.findall(r"[\w/]+\.py\b", text) + re.findall(r"^(?:mlx_lqr|runtime|convert)/[\w/]*$", text):
            assert any((folder / file).exists() for folder in (ROOT, ROOT / "mlx_lqr")), text
        for target in re.findall(r"^make ([\w-]+)", text):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), text


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists() or target in GENERATED, link
        assert not anchor or anchor in anchors(GENERATED.get(target) or target.read_text("utf-8")), link


def test_a_page_that_goes_on_says_so_and_is_read_once() -> None:
    assert Counter(page for pages in chains() for page in pages) == Counter(PAGES)
    for page in PAGES:
        before = continued(page)
        assert before is None or before in PAGES


def test_the_readme_is_short_and_soon_shows_a_result() -> None:
    page = ROOT / "README.md"
    assert len(page.read_text("utf-8").splitlines()) <= 150
    first = next(block for block in blocks(page) if block.language == "text")
    assert first.line + len(first.text.splitlines()) <= 45


def test_every_command_and_option_is_in_the_reference() -> None:
    pages = {file.stem: text for file, text in GENERATED.items() if file.parent.name == "commands"}
    for name, options in OPTIONS.items():
        text = pages[name.replace(" ", "-")]
        assert all(re.search(rf"(?<![\w-]){option}(?![\w-])", text) for option in options if option[0] == "-"), name
        assert re.search(rf"^\| \[`{name}`\]\(", pages["index"], re.MULTILINE)


def test_the_page_of_methods_gets_its_table_and_no_reader_sees_a_mark() -> None:
    text = HOOK.on_page_markdown((DOCS / "methods.md").read_text("utf-8"))
    assert all(f"| `{name}` |" in text for name in mlx_lqr.METHODS)
    for page in PAGES:
        assert "<!--" not in HOOK.on_page_markdown(page.read_text("utf-8"))


def test_the_budgets_are_those_of_the_page() -> None:
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \|$", (DOCS / "guide" / "fit.md").read_text("utf-8"), re.MULTILINE)
    assert {name: float(nats) for name, nats in rows} == mlx_lqr.BUDGETS


def test_every_public_name_is_in_the_reference() -> None:
    names = ("mlx_lqr", "mlx_lqr.tasks", "mlx_lqr.analysis", "mlx_lqr.serving")
    modules = {module: importlib.import_module(module) for module in names}
    public = {f"{module}.{name}" for module in modules for name in modules[module].__all__}
    page = (DOCS / "reference" / "python.md").read_text("utf-8")
    assert Counter(re.findall(r"^::: (\S+)$", page, re.MULTILINE)) == Counter(public)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_nothing_to_run_stands_outside_the_fences(page: Path) -> None:
    assert not [text for text in indented(page) if re.search(r"mlx[-_]lqr|python|pip ", text)]


def test_what_is_said_of_the_first_results(readings: dict[Path, Reading]) -> None:
    page = readings[ROOT / "README.md"]
    page.finish()
    assert 200_000 < (page.session.folder / "ocean.safetensors").stat().st_size < 220_000
    assert "Steered: coffee" in page.printed("mlx-lqr chat demo -c coffee.safetensors").stderr
    assert set(mlx_lqr.bundled_concepts()) <= set(page.printed("mlx-lqr concepts").stdout.split())


def test_what_the_guide_says_of_its_commands(readings: dict[Path, Reading]) -> None:
    page = readings[DOCS / "index.md"]
    assert set(mlx_lqr.bundled_concepts()) <= set(page.printed("mlx-lqr concepts").stdout.split())
    rows = [json.loads(row) for row in page.printed("mlx-lqr generate demo --prompts").stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["Once upon a time,", "My neighbor told me"]
    assert all(row["concepts"] == {"ocean": 0.8} and {"tracking", "control"} <= row.keys() for row in rows)
    chat = page.printed("mlx-lqr chat demo -c ocean.safetensors").stderr
    assert "Steered: ocean 3." in chat
    assert "/strength" in chat
    assert mlx_lqr.Controller.load(page.session.folder / "dog.safetensors").active_layers == (24, 25, 26, 27, 28, 29)
    shown = page.printed("mlx-lqr show ocean.safetensors").stdout
    assert "q = 10, r = 1, qf = 10, feature cost" in shown
    assert "centred" in shown
    assert "recommended" in page.session.command("mlx-lqr show tuned.safetensors").stdout
    assert {file.suffix for file in (page.session.folder / "pictures").iterdir()} == {".json", ".png", ".svg"}
    assert (page.session.folder / "comparison" / "concept-comparison.png").is_file()


def test_what_is_said_of_backends(readings: dict[Path, Reading]) -> None:
    page = readings[DOCS / "backends" / "small.md"]
    of_torch = page.printed('mlx-lqr generate demo -p "Once upon a time," -c dog.safetensors:0.8 -n 30 --backend torch')
    assert of_torch.stdout == page.printed(RUNTIME).stdout != ""


def test_what_is_said_of_python(readings: dict[Path, Reading]) -> None:
    page = readings[DOCS / "guide" / "python.md"]
    page.finish()
    names = page.session.names
    assert 200_000 < (page.session.folder / "ocean.safetensors").stat().st_size < 220_000
    assert names["both"].concepts == ("ocean", "dog")
    assert len(names["texts"]) == 2
    assert names["text"] == names["same"] != ""
    assert names["recording"].feature_error().shape == (20, 30, 1)
    assert names["recording"].push().shape == (20, 30)


@pytest.mark.parametrize(
    ("task", "measures"),
    [
        ("concept", {"prevalence"}),
        ("refusal", {"refused_unsafe", "refused_safe", "discernment"}),
        ("truthfulness", {"mc1", "mc2", "closer_to_true"}),
        ("toxicity", {"harmless", "mean_toxicity"}),
    ],
)
def test_what_is_said_of_evaluation(task: str, measures: set[str], readings: dict[Path, Reading]) -> None:
    page = readings[DOCS / "guide" / "evaluate.md"]
    rows = {row.split()[0] for row in page.printed(f"mlx-lqr eval {task}").stdout.splitlines()}
    assert measures | {"perplexity", "distinct_1", "distinct_2", "distinct_3", "repetition", "kl", "capability"} <= rows
    (summary,) = (page.session.folder / "results").glob(f"{task}-*.summary.json")
    unsteered, steered = json.loads(summary.read_text())["strengths"]
    assert unsteered["strength"] == 0
    assert steered["change"].keys() >= measures

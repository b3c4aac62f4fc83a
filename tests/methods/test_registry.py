"""The registry: a method of another package works everywhere, and what is no method is one clear line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.backends import tiny_folder, tiny_on
from tokenizers import Tokenizer, models, pre_tokenizers

import mlx_lqr
from mlx_lqr import METHODS, InputError, tasks
from mlx_lqr.commands import main
from mlx_lqr.methods import table
from mlx_lqr.methods.registry import GROUP, OWN

SETS = [[1, 2, 3], [4, 5, 6], [7, 9]], [[9, 8, 7], [6, 5], [11, 12]]
PLUGIN = """
from dataclasses import replace

import numpy as np

from mlx_lqr.methods import Addition, BaselineMethod, Option, Paper, StrengthScale, contrasted


class Ramp(BaselineMethod):
    name = "ramp"
    title = "a ramp of mean differences"
    papers = (Paper("Nobody", 2026, "0000.00000"),)
    formula = "`y + s slope k e`"
    options = (Option("slope", float, 0.1, "How fast it grows.", tries=(0.1, 0.2), kept=True),)
    strengths = StrengthScale("1 is the whole ramp", span=(0.0, 5.0), suggested=3.0)
    tensors = {"shift": "Tdm"}

    def fit(self, problem, options):
        sets = contrasted(problem, self.layers)
        ramp = options["slope"] * np.arange(problem.model.num_layers, dtype=np.float32)[:, None]
        tensors = {"shift": (sets.active * ramp * sets.outputs)[:, :, None]}
        return replace(self.blank(problem, options), tensors=tensors, active_layers=sets.layers)

    def law(self, steering, strength):
        return Addition(steering, strength)
"""


class Installer:
    """Packages of methods, for the time of a test, as pip leaves them: a module and what importlib.metadata reads."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        monkeypatch.syspath_prepend(str(folder))
        self.forget()

    def forget(self) -> None:
        self.monkeypatch.setattr(METHODS, "_others", None)
        self.monkeypatch.setattr(METHODS, "_loaded", {})

    def __call__(self, package: str, source: str, **methods: str) -> None:
        module = package.replace("-", "_")
        (self.folder / f"{module}.py").write_text(source)
        described = self.folder / f"{module}-1.0.dist-info"
        described.mkdir()
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name} = {module}:{attribute}" for name, attribute in methods.items()]
        (described / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]))
        self.forget()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installer]:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    before = set(sys.modules)
    yield Installer(folder, monkeypatch)
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(folder) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_our_own_methods_are_what_the_list_says() -> None:
    for name in OWN:
        assert METHODS[name].name == name
    assert list(METHODS)[: len(OWN)] == list(OWN)
    assert "magic" not in METHODS
    assert METHODS.get("magic") is None
    with pytest.raises(InputError, match=f"^there is no method 'magic': choose one of {', '.join(METHODS)}$"):
        METHODS["magic"]


def test_a_method_of_another_package_is_fitted_like_ours(install: Installer, tmp_path: Path) -> None:
    install("steer-by-ramp", PLUGIN, ramp="Ramp")
    assert list(METHODS) == [*OWN, "ramp"]
    model = tiny_on("mlx", "llama")
    steering: Any = mlx_lqr.fit_baseline(model, "ramp", *SETS, concept="one", slope=0.5)
    assert steering.numbers == {"slope": 0.5}
    steering.save(tmp_path / "ramp.safetensors")
    loaded: Any = mlx_lqr.load_steering(tmp_path / "ramp.safetensors")
    assert np.array_equal(loaded.tensors["shift"], steering.tensors["shift"])
    prompt = [1, 2, 3]
    steered, plain = (model.logits(prompt, law=mlx_lqr.methods.law_of(loaded, strength)) for strength in (3.0, 0.0))
    assert np.array_equal(plain, model.logits(prompt))
    assert not np.allclose(steered, plain)
    with pytest.raises(InputError, match="actadd has no slope: it belongs to ramp"):
        mlx_lqr.fit_baseline(model, "actadd", *SETS, slope=1.0)
    with pytest.raises(InputError, match="ramp has no heads: it belongs to iti"):
        mlx_lqr.fit_baseline(model, "ramp", *SETS, heads=1)
    space = tasks.baseline_space(model, "ramp", *SETS)
    assert space.factors["slope"] == [0.1, 0.2]
    assert set(space.factors["layers"]) >= {"all", "last third"}
    assert space.candidate({name: values[-1] for name, values in space.factors.items()}).strengths == (0.0, 5.0)
    assert mlx_lqr.methods.combine([loaded, mlx_lqr.fit_baseline(model, "ramp", *SETS, concept="two")]).concepts == (
        "one",
        "two",
    )


def test_the_commands_know_it_too(install: Installer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("steer-by-ramp", PLUGIN, ramp="Ramp")
    folder = tiny_folder("llama")
    tokenizer = Tokenizer(models.WordLevel({f"w{token}": token for token in range(64)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    monkeypatch.chdir(tmp_path)
    for name, texts in (("one", ["w1 w2 w3", "w1 w4", "w2 w1"]), ("rest", ["w7 w8 w9", "w10 w4", "w12 w11"])):
        Path(f"{name}.txt").write_text("\n".join(texts))
    Path("openings.txt").write_text("w20 w21\nw22")
    sets = "--positive", "one.txt", "--negative", "rest.txt", "--method", "ramp"

    def run(*arguments: Any, status: int = 0) -> str:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == status, (result.output, result.exception)
        return result.output

    assert "--slope FLOAT" in run("fit", "--help")
    assert "[ramp: 0.1]" in run("tune", "concept", "--help")
    fitted = run("fit", folder, *sets, "--slope", 0.7, "-o", "ramp.safetensors")
    assert "-c ramp.safetensors\n" in fitted  # which recommends a strength
    given = "-p", "w1 w2", "-c", "ramp.safetensors:3", "-n", 4, "--seed", 1
    answer = json.loads(run("generate", folder, *given, "--json"))
    assert answer["concepts"] == {"one": 3.0}
    shown = run("show", "ramp.safetensors")
    assert "method     a ramp of mean differences" in shown
    assert "gains      slope = 0.7" in shown
    assert json.loads(run("show", "ramp.safetensors", "--json"))["numbers"] == {"slope": 0.7}
    task = "--words", "w21,w32,w36", "--openings", "openings.txt", "--samples", 1, "-n", 4, "--evaluations", 2
    search = "--at-most", 9, "--slope", 0.2, "-o", "tuned.safetensors", "--json"
    result = CliRunner().invoke(main, [str(a) for a in ("tune", "concept", folder, *sets, *task, *search)])
    trials = json.loads(result.stdout)["trials"]
    assert {trial["options"]["slope"] for trial in trials} == {0.2}
    assert all(0 < trial["strength"] <= 5 for trial in trials)
    refused = run("fit", folder, *sets[:-1], "actadd", "--slope", 1, "-o", "x", status=2)
    assert "--slope is not for the method actadd: it belongs to ramp" in refused
    assert (
        "| `ramp` | a ramp of mean differences: [Nobody 2026](https://arxiv.org/abs/0000.00000) | `y + s slope k e` | "
        "`--slope` (0.1) | `last` | all | 1 is the whole ramp | 3 |"
    ) in table().splitlines()


def test_a_file_of_a_method_that_is_gone(install: Installer, tmp_path: Path) -> None:
    install("steer-by-ramp", PLUGIN, ramp="Ramp")
    mlx_lqr.fit_baseline(tiny_on("mlx", "llama"), "ramp", *SETS).save(tmp_path / "file")
    (install.folder / "steer_by_ramp-1.0.dist-info" / "entry_points.txt").unlink()
    install.forget()
    with pytest.raises(InputError, match="is of the method 'ramp', which is not installed: install the package"):
        mlx_lqr.load_steering(tmp_path / "file")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("raise ImportError('no module named telepathy')", r"cannot be loaded \(no module named telepathy\)"),
        ("other = 1", "cannot be loaded"),
        ("class Ramp: ...", "is not a subclass of mlx_lqr.methods.Method"),
        (PLUGIN[: PLUGIN.index("    def law")], "does not define law$"),
        (PLUGIN[: PLUGIN.index("    def fit")], "does not define fit, law$"),
        (PLUGIN.replace("    strengths =", "    other ="), "does not define strengths$"),
        (PLUGIN.replace("    tensors =", "    other ="), "does not define tensors$"),
        (PLUGIN.replace('name = "ramp"', 'name = "stairs"'), "calls itself 'stairs'"),
    ],
)
def test_what_is_no_method_is_refused_by_the_name_of_its_package(install: Installer, source: str, says: str) -> None:
    install("steer-by-ramp", source, ramp="Ramp")
    with pytest.raises(InputError, match=f"^the method 'ramp' of the package steer-by-ramp {says}"):
        METHODS["ramp"]
    result = CliRunner().invoke(main, ["fit", "--help"])
    assert result.exit_code == 2
    assert result.output.startswith("Error: the method 'ramp' of the package steer-by-ramp")
    assert METHODS["actadd"].title == "ActAdd / CAA"  # ours go on


def test_a_name_that_is_taken_is_refused(install: Installer) -> None:
    install("steer-by-ramp", PLUGIN, actadd="Ramp")
    with pytest.raises(InputError, match="steer-by-ramp adds a method 'actadd', which mlx-lqr has already"):
        list(METHODS)


def test_two_packages_with_one_method_are_refused(install: Installer) -> None:
    install("steer-by-ramp", PLUGIN, ramp="Ramp")
    install("steeper-ramp", PLUGIN, ramp="Ramp")
    with pytest.raises(InputError, match=r"adds a method 'ramp', which ste\S+ has already"):
        list(METHODS)


def test_an_option_that_means_something_else_in_another_method_is_refused(install: Installer) -> None:
    install("steer-by-ramp", PLUGIN.replace('"slope", float, 0.1', '"heads", float, 0.1'), ramp="Ramp")
    result = CliRunner().invoke(main, ["fit", "--help"])
    assert result.exit_code == 2
    assert "the methods iti and ramp mean different things by --heads" in result.output


def test_other_packages_are_not_asked_before_a_method_is() -> None:
    code = (
        "import importlib.metadata\n"
        "def asked(**_): raise AssertionError('asked')\n"
        "importlib.metadata.entry_points = asked\n"
        "import mlx_lqr, mlx_lqr.commands\n"
        "assert mlx_lqr.METHODS['actadd'].title and mlx_lqr.METHODS['alqr'].title\n"
        "try: list(mlx_lqr.METHODS)\n"
        "except AssertionError: pass\n"
        "else: raise SystemExit('not asked at all')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_options_are_checked_before_anything_is_run() -> None:
    model: Any = None
    for method, options, says in (
        ("alqr", {"cost": "free"}, "cost must be 'state' or 'feature' or 'adaptive', not 'free'"),
        ("alqr", {"q": -1.0}, "q"),
        ("alqr", {"jacobian_prompts": 0}, "jacobian_prompts must be at least 1, not 0"),
        ("proportional", {"kp": float("nan")}, "kp must be a finite number"),
        ("proportional", {"kp": "much"}, "kp must be a finite number, not 'much'"),
        ("iti", {"heads": 0}, "heads must be at least 1, not 0"),
        ("mean-act", {"incremental": 3}, "incremental must be True or False, not 3"),
    ):
        with pytest.raises(InputError, match=says):
            mlx_lqr.fit_baseline(model, method, *SETS, **options)  # type: ignore[arg-type]


def test_none_and_a_flag_left_as_it_is_are_no_options() -> None:
    model = tiny_on("mlx", "llama")
    plain: Any = mlx_lqr.fit_baseline(model, "actadd", *SETS)
    same: Any = mlx_lqr.fit_baseline(
        model, "actadd", *SETS, source_layer=None, heads=None, incremental=True, numbers={}
    )
    assert np.array_equal(plain.tensors["shift"], same.tensors["shift"])


def test_a_controller_is_fitted_by_its_name_as_by_fit() -> None:
    model = tiny_on("mlx", "llama")
    named: Any = mlx_lqr.fit_baseline(model, "alqr", *SETS, concept="one", q=2.0, cost="feature", layers=[1, 2])
    expected = mlx_lqr.fit(model, *SETS, concept="one", q=2.0, cost="feature", layers=[1, 2])
    assert isinstance(named, mlx_lqr.Controller)
    for name, numbers in expected.arrays.items():
        assert np.array_equal(named.arrays[name], numbers)

"""Controllers on the Hugging Face hub, against a stand-in on this machine: up with a page, and down once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.backends import tiny_on
from helpers.command_line import refused, run
from helpers.controllers import controller_for
from helpers.hub import Hub, hub

import mlx_lqr
from mlx_lqr.convert.hub import hub_name
from mlx_lqr.errors import InputError
from mlx_lqr.lqr.strength import BUDGETS, Calibration
from mlx_lqr.sharing.card import card
from mlx_lqr.sharing.upload import Upload
from mlx_lqr.tasks.records import FORMAT
from mlx_lqr.tasks.steering import NamedSteering

MARK = "<!-- mlx-lqr: dog.safetensors -->"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with controllers of two concepts."""
    folder = tmp_path_factory.mktemp("controllers")
    model = tiny_on("mlx", "llama")
    strengths = {budget: 1.0 + number for number, budget in enumerate(BUDGETS)}
    calibration = Calibration(strengths, {budget: 0.1 * strength for budget, strength in strengths.items()})
    replace(controller_for(model), concepts=("dog",)).calibrated(calibration).save(folder / "dog.safetensors")
    replace(controller_for(model, "b"), concepts=("cat",)).save(folder / "cat.safetensors")
    return folder


@pytest.fixture
def there() -> Iterator[Hub]:
    with hub() as there:
        yield there


class Commands:
    """mlx-lqr with the stand-in for its hub."""

    def __init__(self, there: Hub, home: Path) -> None:
        self.there, self.home = there, home

    def __call__(self, *arguments: object, **how: Any) -> tuple[int, str, str]:
        with pytest.MonkeyPatch.context() as patch:
            self.there.connected(self.home, patch, **how)
            result = run(*arguments)
        return result.exit_code, result.stdout, result.stderr

    def refused(self, *arguments: object, **how: Any) -> str:
        status, _, said = self(*arguments, **how)
        assert status == 2, said
        assert "Traceback" not in said
        lines = said.strip().splitlines()
        assert len(lines) == 1, lines
        return lines[0]


@pytest.fixture
def mlx_lqr_there(there: Hub, tmp_path: Path) -> Commands:
    return Commands(there, tmp_path / "home")


def test_up_with_a_page_and_down_once(there: Hub, mlx_lqr_there: Commands, files: Path) -> None:
    status, said, errors = mlx_lqr_there("push", files / "dog.safetensors", "me/dog", "--base-model", "org/tiny")
    assert status == 0, errors
    assert f"to {there.address}/me/dog" in said
    assert "mlx-lqr chat org/tiny -c hf:me/dog/dog.safetensors" in said
    kept = there.repos["me/dog"]
    assert kept["dog.safetensors"] == (files / "dog.safetensors").read_bytes()
    assert kept["dog.png"].startswith(b"\x89PNG")
    page = kept["README.md"].decode()
    assert page.startswith("---\nbase_model: org/tiny\nlibrary_name: mlx-lqr\ntags:\n- activation-steering\n")
    for words in (
        "A-LQR",
        "gentle 1 (0.1 nats)",
        "recommended strength | 2",
        "hf:me/dog/dog.safetensors",
        "](dog.png)",
    ):
        assert words in page
    shown = [mlx_lqr_there("show", "hf:me/dog/dog.safetensors", "--json") for _ in range(2)]
    assert json.loads(shown[0][1]) == json.loads(run("show", files / "dog.safetensors", "--json").stdout)
    assert shown[0] == shown[1]
    fetched = [path for method, path in there.requests if method == "GET" and path.endswith("dog.safetensors")]
    assert len(fetched) == 1
    there.requests.clear()
    assert mlx_lqr_there("show", "hf:me/dog/dog.safetensors", "--json", offline=True)[1] == shown[0][1]
    assert not there.requests


def test_a_second_controller_joins_the_page_of_the_first(there: Hub, mlx_lqr_there: Commands, files: Path) -> None:
    for name in ("dog", "cat", "dog"):
        assert mlx_lqr_there("push", files / f"{name}.safetensors", "me/pets", "--private-repo")[0] == 0
    assert there.private["me/pets"]
    page = there.repos["me/pets"]["README.md"].decode()
    assert page.count(MARK) == page.count("<!-- mlx-lqr: cat.safetensors -->") == 1
    assert page.count("---\n") == 2
    there.repos["me/mine"] = {"README.md": b"# My own page\n"}
    assert "has a README.md that mlx-lqr did not write" in mlx_lqr_there.refused(
        "push", files / "dog.safetensors", "me/mine"
    )
    assert there.repos["me/mine"] == {"README.md": b"# My own page\n"}
    assert mlx_lqr_there("push", files / "dog.safetensors", "me/mine", "--force")[0] == 0
    assert MARK in there.repos["me/mine"]["README.md"].decode()


def test_what_was_measured_stands_on_the_page(there: Hub, mlx_lqr_there: Commands, files: Path, tmp_path: Path) -> None:
    dog = files / "dog.safetensors"
    summary = tmp_path / "concept-dog.summary.json"
    evaluated: dict[str, Any] = {
        "format": FORMAT,
        "task": "concept",
        "control": "prevalence",
        "steering": NamedSteering("dog", mlx_lqr.load_steering(dog)).settings,
        "strengths": [
            {"strength": strength, "metrics": {name: {"value": value, "low": 0.1, "high": None} for name in names}}
            for strength, value, names in (
                (0.0, 0.125, ("kl|", "prevalence", "tokens")),
                (2.0, 0.5, ("kl|", "prevalence", "tokens")),
            )
        ],
    }
    summary.write_text(json.dumps(evaluated))
    assert mlx_lqr_there("push", dog, "me/dog", "--results", summary)[0] == 0
    page = there.repos["me/dog"]["README.md"].decode()
    assert "| concept | not steered | strength 2 |\n|" in page
    assert "| prevalence | 0.125 (0.1 to -) | 0.5 (0.1 to -) |\n| kl |" in page
    assert "tokens" not in page
    for damage, says in (
        ({**evaluated, "steering": {**evaluated["steering"], "digest": "0"}}, "measured with another controller"),
        ({**evaluated, "steering": None}, "measured with another controller"),
        ({**evaluated, "strengths": []}, "is no summary that"),
        ({**evaluated, "format": 1}, "is no summary that"),
        ([], "is no summary that"),
    ):
        summary.write_text(json.dumps(damage))
        assert says in mlx_lqr_there.refused("push", dog, "me/dog", "--results", summary)
    summary.write_text("[" * 100_000)
    assert "is not valid JSON" in mlx_lqr_there.refused("push", dog, "me/dog", "--results", summary)
    assert "cannot read" in mlx_lqr_there.refused("push", dog, "me/dog", "--results", tmp_path / "none.json")


def test_what_goes_wrong_is_one_line(there: Hub, mlx_lqr_there: Commands, files: Path) -> None:
    dog, fails = files / "dog.safetensors", mlx_lqr_there.refused
    there.repos["me/other"] = {"notes.safetensors": b"nothing that steers", "big.gguf": b"GGUF"}
    assert "you are not logged in to the hub: `hf auth login`, or set HF_TOKEN" in fails(
        "push", dog, "me/dog", token=None
    )
    assert "does not let you write to me/dog" in fails("push", dog, "me/dog", token="hf_wrong")
    assert "does not let you write to you/dog" in fails("push", dog, "you/dog")
    assert "cannot reach the hub" in fails("push", dog, "me/dog", offline=True)
    assert "the hub has no repository me/none" in fails("show", "hf:me/none/dog.safetensors")
    assert "the repository me/other has no file dog.safetensors" in fails("show", "hf:me/other/dog.safetensors")
    assert fails("show", "hf:me/other/notes.safetensors").startswith(
        "Error: hf:me/other/notes.safetensors is damaged or not a safetensors file"
    )
    assert "hf:me/other/big.gguf is cut short" in fails("show", "hf:me/other/big.gguf")
    assert "was not downloaded before: check the network" in fails("show", "hf:me/dog/dog.safetensors", offline=True)
    assert "me/dog" not in there.repos


def test_in_a_process_of_its_own(there: Hub, files: Path, tmp_path: Path) -> None:
    """With nothing but the environment that the hub's client goes by; and with a hub that does not answer."""
    there.repos["me/dog"] = {"dog.safetensors": (files / "dog.safetensors").read_bytes()}
    command = [sys.executable, "-m", "mlx_lqr", "show", "hf:me/dog/dog.safetensors"]
    for address, status in ((there.address, 0), ("http://127.0.0.1:9", 0), ("http://127.0.0.1:9", 2)):
        home = tmp_path / ("home" if status == 0 else "empty")
        environment = os.environ | there.environment(home, HF_ENDPOINT=address)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
        assert done.returncode == status, done.stderr
    assert done.stderr == (
        "Error: cannot download hf:me/dog/dog.safetensors, and it was not downloaded before: check the network, or "
        "give a file\n"
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hf:", "names no file on the hub"),
        ("hf:dog.safetensors", "names no file on the hub"),
        ("hf:me/dog", "names no file on the hub"),
        ("hf:me/dog/../../x.safetensors", "names no file on the hub"),
        ("hf:me/dog//x.safetensors", "names no file on the hub"),
        ("hf:../dog/x.safetensors", "names no file on the hub"),
        ("hf:me/dog/x.bin", "of another kind than files that steer, which end in .safetensors or .gguf"),
        ("hf:me/dog/x.pkl", "of another kind"),
    ],
)
def test_names_that_can_be_nothing_on_the_hub_are_not_asked_for(name: str, says: str) -> None:
    assert says in refused("show", name)


def test_names_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
    assert hub_name("hf:me/dog/dog.safetensors") == ("me/dog", "dog.safetensors")
    assert hub_name("hf:me/dog/v2/dog.gguf") == ("me/dog", "v2/dog.gguf")
    choice = mlx_lqr.runtime.arguments.parse_controller("hf:me/dog/dog.safetensors:1.5x")
    assert (choice.file, str(choice)) == ("hf:me/dog/dog.safetensors", "hf:me/dog/dog.safetensors:1.5x")
    assert mlx_lqr.runtime.arguments.parse_controller("hf:me/dog/dog.safetensors").strengths == ()
    monkeypatch.chdir(tmp_path)  # a file of such a name is a file
    (tmp_path / "hf:x").write_bytes((files / "dog.safetensors").read_bytes())
    assert mlx_lqr.load_steering("hf:x").concepts == ("dog",)


def test_a_dry_run_asks_nobody(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", None)
    result = run("push", files / "dog.safetensors", "me/dog", "--dry-run")
    assert result.exit_code == 0, result.output
    assert MARK in result.stdout
    assert "Would be uploaded: dog.safetensors (" in result.stderr
    assert "cannot be a repository of the hub" in refused("push", files / "dog.safetensors", "dog", "--dry-run")
    assert "has to end in .safetensors or .gguf" in refused("push", files / "dog.bin", "me/dog", "--dry-run")
    assert "there is no file" in refused("push", files / "no.safetensors", "me/dog", "--dry-run")


def test_nothing_in_a_file_is_markup_on_its_page(files: Path) -> None:
    loaded: Any = mlx_lqr.load_steering(files / "cat.safetensors")
    evil = replace(loaded, concepts=("<script>a|b</script>\n# x `y`",), model_name="[x](http://evil)")
    page = card(evil, "me/cat", "cat.safetensors")
    assert "<script>" not in page
    assert "[x](http" not in page
    assert page.count("\n# ") == 1
    with pytest.raises(InputError, match="rename it"):
        Upload(Path("cat.txt"), "me/cat")


def test_the_server_opens_no_names_of_requests(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a client sends is bytes; where names are looked up, hf: means nothing."""
    from mlx_lqr.serving.controllers import Controllers
    from mlx_lqr.serving.failures import RequestError

    monkeypatch.setattr("socket.socket.connect", None)
    held = Controllers(tiny_on("mlx", "llama"), tmp_path / "kept")
    held.upload("dog", (files / "dog.safetensors").read_bytes())
    for name in ("hf:me/dog/dog.safetensors", str(files / "cat.safetensors")):
        with pytest.raises(RequestError, match="no controller is for"):
            held.strengths({name: 1.0})
        with pytest.raises(RequestError, match="letters, digits"):
            held.upload(name, b"")
    with pytest.raises(InputError):
        held.upload("x", b"hf:me/dog/dog.safetensors")

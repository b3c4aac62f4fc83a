"""Two commands at once on one output: one does its work as if it were alone, the other does as well or is refused."""

from __future__ import annotations

import hashlib
import string
from pathlib import Path

from helpers.backends import tiny_folder
from helpers.pairs import run_pairs
from helpers.platforms import posix
from tokenizers import Tokenizer, models

pytestmark = posix
QUICK = ("--words", "a,b", "--limit", "1", "--samples", "1", "-n", "2")
WORK = {
    "eval": ("eval", "concept", "{model}", *QUICK, "-o", "{out}"),
    "tune": ("tune", "concept", "{model}", "--concept", "dog", *QUICK, "--evaluations", "1", "-o", "{out}/c"),
    "linearize": ("linearize", "{model}", "--nominal", "Once", "-o", "{out}/j"),
    "fit": ("fit", "{model}", "--concept", "dog", "--method", "actadd", "--no-calibration", "-o", "{out}/c"),
}


def hashes(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_one_is_right_and_the_other_right_or_refused(tmp_path: Path) -> None:
    model = tiny_folder("llama")
    letters = ["?", *string.ascii_letters, *" .,'"]
    tokenizer = models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[], unk_token="?")
    Tokenizer(tokenizer).save(str(model / "tokenizer.json"))

    def command(name: str, out: Path) -> list[str]:
        out.mkdir(exist_ok=True)
        return [part.format(model=model, out=out) for part in WORK[name]]

    alone = run_pairs([(command(name, tmp_path / name), ["--version"]) for name in WORK])
    names = ["eval", "tune", "linearize", "fit", "eval", "linearize"]
    places = [tmp_path / f"{name}-{i}" for i, name in enumerate(names)]
    ended = run_pairs([(command(name, place),) * 2 for name, place in zip(names, places, strict=True)])
    expected = {name: (end[0][0], hashes(tmp_path / name)) for name, end in zip(WORK, alone, strict=True)}
    for name, place, pair in zip(names, places, ended, strict=True):
        status, files = expected[name]
        refused = [says for code, says in pair if code == 2 and "Error: another mlx-lqr writes" in says]
        assert len(refused) < 2, pair
        assert sum(code == status for code, says in pair if says not in refused) == 2 - len(refused), pair
        assert hashes(place) == files, (name, pair)

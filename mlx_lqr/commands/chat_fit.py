"""/fit: fit a concept while a chat goes on, and steer towards it."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from mlx_lqr.backends.capabilities import RECORDER, require
from mlx_lqr.backends.protocol import Progress, Recorder
from mlx_lqr.commands.chat_state import Conversation
from mlx_lqr.commands.fit import note_prompts, note_separation
from mlx_lqr.commands.kept_controllers import controllers_folder, kept_controller
from mlx_lqr.commands.output import say
from mlx_lqr.commands.progress import progress_bars
from mlx_lqr.commands.values import expanded
from mlx_lqr.concepts import bundled_prompts
from mlx_lqr.errors import InputError
from mlx_lqr.files.atomic import reserved
from mlx_lqr.files.prompts import read_prompts
from mlx_lqr.launched import refuse_several
from mlx_lqr.loading import able_to_fit
from mlx_lqr.lqr.concept_prompts import framed
from mlx_lqr.lqr.contrast import Contrast
from mlx_lqr.lqr.fit import fit
from mlx_lqr.methods.calibration import recommended
from mlx_lqr.methods.steering import Steering

USAGE = "/fit NAME for one that /concepts lists, or /fit NAME POSITIVE NEGATIVE [FILE] for two files of prompts"
_NAME = re.compile(r"\w[\w.-]{0,99}")


@dataclass(frozen=True)
class Wanted:
    """What is to be fitted."""

    concept: str
    positive: list[str]
    negative: list[str]
    output: Path | None
    """The file that a person named"""


def fit_and_add(conversation: Conversation, line: str) -> str:
    """Fit what the words after /fit ask for, calibrated, and add it to what steers. Returns the file that it is in.

    A bundled concept is fitted once for a model; the next time its file is read.

    Raises:
        InputError: the words, a file or a prompt cannot be used; what steers is as it was.
    """
    refuse_several("a concept is fitted in a chat")
    model = require(conversation.chat.model, RECORDER, "fit controllers")
    concept, *files = _words(line)
    with progress_bars() as progress:
        if files:
            file, steering = _fitted(model, _wanted(concept, files), progress)
        else:
            bundled_prompts(concept)  # refuses what is none
            file, steering = kept_controller(model, concept, progress)
    conversation.add(str(file), steering)
    return str(file)


def _words(line: str) -> list[str]:
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise InputError(f"{error}: {USAGE}") from None
    if len(words) not in (1, 3, 4):
        raise InputError(USAGE)
    return words


def _wanted(concept: str, files: list[str]) -> Wanted:
    if not _NAME.fullmatch(concept):
        raise InputError(f"a concept cannot be called {concept!r}: use letters, digits, dots and dashes")
    positive, negative, *output = (Path(expanded(file)) for file in files)
    return Wanted(concept, read_prompts(positive), read_prompts(negative), output[0] if output else None)


def _fitted(model: Recorder, wanted: Wanted, progress: Progress) -> tuple[Path, Steering]:
    file = wanted.output or _kept(model, wanted)
    contrasts: list[Contrast] = []
    with reserved(file, "controller"):
        prompts = framed(model, (wanted.positive, wanted.negative))
        able = able_to_fit(model, progress=progress)
        controller = fit(able, *prompts, concept=wanted.concept, progress=progress, on_contrast=contrasts.append)
        steering, doubts = recommended(model, controller, "normal", prompts, progress)
        steering.save(file)
    for doubt in doubts:
        say(f"Note: {doubt}", err=True)
    note_prompts(model, wanted.positive, wanted.negative)
    note_separation(contrasts, steering.active_layers)
    return file, steering


def _kept(model: Recorder, wanted: Wanted) -> Path:
    """Where a controller is kept that is given no file. Other prompts of the same name have another one, which
    another chat may be using, or a session.
    """
    prompts = json.dumps([wanted.positive, wanted.negative]).encode()
    name = f"{wanted.concept}-{model.fingerprint}-{hashlib.sha256(prompts).hexdigest()[:12]}.safetensors"
    return controllers_folder() / "own" / name

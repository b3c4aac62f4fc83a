"""A conversation with a steered model: messages, controllers and their strengths, and the transcript."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from mlx_lqr.backends.protocol import Decoder, fresh_seed
from mlx_lqr.backends.text.text_tokenizer import Message, common_length, has_answer
from mlx_lqr.errors import InputError
from mlx_lqr.methods.alqr import LinearFeedback
from mlx_lqr.methods.law import AdjustableLaw
from mlx_lqr.methods.recording import RecordedFeedback, Recording
from mlx_lqr.methods.steering import Steering, in_conversation, only_controller
from mlx_lqr.runtime.chat_steering import ChatSteering
from mlx_lqr.runtime.decode import MAX_TOKENS, room_after
from mlx_lqr.runtime.forgetting import remembered
from mlx_lqr.runtime.generate import Options, Piece, stream
from mlx_lqr.runtime.monitor import Excess, largest_excess
from mlx_lqr.runtime.tracking import TrackedAnswer, track_answer
from mlx_lqr.runtime.transcript import Given, read_transcript, transcript_entries, write_transcript
from mlx_lqr.runtime.turn import Turn

NO_ANSWER = "there is no answer yet: say something first"


@dataclass
class Chat(ChatSteering):
    """One conversation. Everything may change between two answers; strengths may also change during one.

    Raises:
        InputError: options that cannot be used for decoding.
    """

    messages: list[Message] = field(default_factory=list)
    options: Options = field(default_factory=Options)
    """How answers are decoded. Controller and strength come from the chat; `max_tokens` is cut to what fits. Every
    answer is drawn with `seed`; without one, each with another."""
    _turn: Turn | None = field(default=None, init=False, repr=False)
    _given: list[Given] = field(default_factory=list, init=False, repr=False)
    """How each answer of the conversation was steered."""
    _alone: AbstractContextManager[object] = field(default_factory=threading.Lock, init=False, repr=False)
    """Held while the decoder of an answer works, or is taken over by the next one."""
    _forgotten: int = field(default=0, init=False, repr=False)
    """How many of the oldest messages after the system prompt the model no longer reads, whole turns of two."""
    _seed: int | None = field(default_factory=fresh_seed, init=False, repr=False)
    """The last answer was drawn with it where `options` has none, and so is what it is compared with."""

    def __post_init__(self) -> None:
        stream(self.model, [0], **self._decoding(None, 1))  # refuses wrong options without decoding anything

    def set_strength(self, strength: float, concept: str | None = None) -> None:
        """Set the strength of one concept, or of all. An answer being decoded follows from its next step on.

        Raises:
            InputError: the strength is not finite, the concept is not loaded, or there is no controller.
        """
        super().set_strength(strength, concept)
        law = self._turn.decoder.law if self._turn is not None else None
        if self._turn is not None and self._turn.controllers is self._controllers and isinstance(law, AdjustableLaw):
            law.strength = tuple(self._strengths.values())

    def answer(self, text: str) -> Iterator[Piece]:
        """The model's answer, piece by piece. If it is interrupted, the part so far stays in the conversation.

        Raises:
            InputError: at the first piece, the conversation cannot be answered; it stays as it was. Later, the next
                answer has begun, here or in another thread.
            OverflowingError: later, activations overflow.
        """
        reply = {"role": "assistant", "content": ""}
        try:
            with self._alone:
                self.messages += [{"role": "user", "content": text}, reply]
                turn, pieces = self._begin(self._prompt(), reply)
            for piece in turn.recorded(pieces, self._alone):
                reply["content"] += piece.text
                yield piece
        except InputError:
            if not reply["content"] and self.messages[-1] is reply:
                del self.messages[-2:]
            raise

    def regenerate(self) -> Iterator[Piece]:
        """Another answer to the last question, piece by piece. The old one stays where not a piece of it comes.

        Raises:
            InputError: at the first piece, there is no answer yet; or see `answer`.
        """
        self._check_answered()
        before = self.messages[-2:]
        del self.messages[-2:]
        count = len(self.messages)
        try:
            yield from self.answer(before[0]["content"])
        finally:
            if len(self.messages) == count or not self.messages[-1]["content"]:
                self.messages[count:] = before

    def undo(self) -> str:
        """Forget the last question and its answer, and return the question.

        Raises:
            InputError: there is no answer yet.
        """
        self._check_answered()
        with self._alone:
            if self._turn is not None and self._turn.reply is self.messages[-1]:
                self._turn.is_over = True
            question = self.messages[-2]["content"]
            del self.messages[-2:]
        return question

    def set_options(self, options: Options) -> None:
        """Decode with these options from the next answer on; those that are not named stay as they are.

        Raises:
            InputError: options that cannot be used for decoding, of which then none is set.
        """
        before = self.options
        self.options = {**before, **options}
        try:
            self.__post_init__()
        except InputError:
            self.options = before
            raise

    @property
    def system_prompt(self) -> str | None:
        """The system prompt."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else None

    @system_prompt.setter
    def system_prompt(self, text: str | None) -> None:
        others = [message for message in self.messages if message["role"] != "system"]
        self.messages = others if text is None else [{"role": "system", "content": text}, *others]

    def steered(self) -> Iterator[Piece]:
        """The answer to the last message with the present steering. The conversation stays as it is.

        If the answer in the conversation was steered in this way, it is that one; otherwise it is decoded again, with
        the same random numbers.

        Raises:
            InputError: there is no answer yet, or nothing steers.
        """
        prompt = self._answered()
        controller = self._in_force()
        if controller is None:
            raise InputError("nothing steers: /add FILE first")
        turn = self._turn
        strength = tuple(self._strengths.values())
        if (
            turn is not None
            and turn.reply is self.messages[-1]
            and turn.controllers is self._controllers
            and set(turn.strengths) == {strength}
        ):
            return iter([Piece(self.messages[-1]["content"], None)])
        return stream(self.model, prompt, **self._decoding(controller, len(prompt)))

    def unsteered(self) -> Iterator[Piece]:
        """The answer to the last message without steering, drawn with the same random numbers. The conversation stays
        as it is.

        Raises:
            InputError: there is no answer yet.
        """
        prompt = self._answered()
        return stream(self.model, prompt, **self._decoding(None, len(prompt)))

    def track(self) -> TrackedAnswer:
        """Feature and setpoint at the last token of the last answer, steered as when it was decoded.

        Raises:
            InputError: there is no answer yet, or it was not steered by an A-LQR controller.
        """
        turn = self._turn
        if turn is None or not self.messages or turn.reply is not self.messages[-1]:
            raise InputError("there is no answer of this session to track yet: say something first")
        if turn.controller is None:
            raise InputError("the last answer was not steered: /add FILE, then ask again")
        controller = only_controller(turn.controller, "tracked")
        assert isinstance(turn.law, LinearFeedback)
        return track_answer(
            self.model,
            turn.prompt,
            turn.tokens,
            controller,
            turn.strengths,
            law=turn.law.silent() if isinstance(turn.law, RecordedFeedback) else turn.law,
            rolling=turn.rolling,
        )

    def excess(self) -> Excess | None:
        """Where the last answer was furthest outside the region in which its controllers' linear model was checked.

        None if nothing steered, or no controller has such a region (`mlx-lqr linearity -c FILE --write` adds it).
        """
        turn = self._turn
        if turn is None or turn.controller is None or not turn.controller.checked:
            return None
        return largest_excess(only_controller(turn.controller, "checked"), *turn.measured())

    def restart(self) -> None:
        """Forget the conversation, except for the system prompt."""
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self._given, self._forgotten = [], 0

    def save(self, path: str | PathLike[str], *, force: bool = False, session: Mapping[str, Any] | None = None) -> None:
        """Write the transcript as JSON: the model, the present strengths, and every message, each answer with the
        strengths it was steered with. The file is its owner's alone to read, and becomes so where it was not.

        Args:
            force: overwrite a file of any kind, not only a transcript.
            session: entries that make the transcript a session (see `runtime.session`).

        Raises:
            InputError: the file cannot be written, or is of another kind.
        """
        entries = transcript_entries(self.model.name, self._strengths, self.messages, self._given)
        write_transcript(path, {**entries, **(session or {})}, force=force)

    def load(self, path: str | PathLike[str]) -> list[str]:
        """Continue the conversation of a transcript. Its strengths are restored for concepts that are loaded.

        Returns:
            What does not match, one line each: another model, concepts that are not loaded.

        Raises:
            InputError: the file was not written by `save`. The conversation then stays as it is.
        """
        name, strengths, self.messages, self._given = read_transcript(path)
        self._forgotten = 0
        for concept in self._strengths.keys() & strengths.keys():
            self.set_strength(strengths[concept], concept)
        notes = []
        if name != self.model.name:
            notes.append(f"the transcript is of {name}; {self.model.name} continues it")
        if missing := [concept for concept in strengths if concept not in self._strengths]:
            notes.append(f"the transcript was steered by {', '.join(missing)}, which is not loaded now: /add FILE")
        return notes

    def _check_answered(self) -> None:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise InputError(NO_ANSWER)

    def _answered(self) -> list[int]:
        """The prompt of the conversation's last answer."""
        self._check_answered()
        return self._prompt()

    def _prompt(self) -> list[int]:
        """All that the model reads before the last answer: in a rolling chat, of what fits the context."""
        before, read = self.messages[:-1], self.model.tokenizer.chat
        if not self._rolling:
            self._forgotten = 0
            return read(before)
        answer = self.options.get("max_tokens", MAX_TOKENS)
        prompt, self._forgotten = remembered(before, self._forgotten, read, self.model.context_length, answer)
        return prompt

    def _in_force(self) -> Steering | None:
        """What steers the last answer: with more feedback where there are answers before it."""
        controller = self.controller
        return in_conversation(controller) if controller is not None and has_answer(self.messages) else controller

    def _decoding(self, controller: Steering | None, prompt_length: int) -> Options:
        options: Options = {**self.options, "controller": controller}
        if controller is not None:
            options["strength"] = [self._strengths[name] for name in controller.concepts]
        if options.get("seed") is None:
            options["seed"] = self._seed
        if not self._rolling:
            room = room_after(self.model, prompt_length)
            if room < 1:
                raise InputError(
                    f"the conversation no longer fits the model's context of {self.model.context_length} tokens: "
                    "begin another with /new, or let the context roll (--overflow roll)"
                )
            options["max_tokens"] = min(options.get("max_tokens", MAX_TOKENS), room)
        return options

    def _begin(self, prompt: list[int], reply: Message) -> tuple[Turn, Iterator[Piece]]:
        controller, self._seed = self._in_force(), fresh_seed()
        options = self._decoding(controller, len(prompt))
        decoder = self._decoder_for(prompt, controller)
        if controller is not None and controller.checked:
            options["record"] = Recording()
        pieces = stream(self.model, prompt, decoder=decoder, **options)
        if self._turn is not None:
            self._turn.is_over = True
        self._turn = Turn(prompt, reply, self._controllers, controller, decoder, self._rolling, options.get("record"))
        self._given.append(Given(reply, tuple(self._strengths), self._turn.strengths))
        return self._turn, pieces

    def _decoder_for(self, prompt: list[int], controller: Steering | None) -> Decoder:
        """The last decoder, if it holds some of the prompt unsteered, cut back to that; otherwise a new one."""
        turn = self._turn
        penalised = self.options.get("repetition_penalty", 1.0) != 1  # needs a decoder that has seen every token
        steers_all = controller is not None and controller.positions == "all"
        if turn is not None and turn.rolling == self._rolling and not (penalised or steers_all):
            common = common_length(turn.clean, prompt[:-1])
            if common and turn.decoder.rewind(common):
                return turn.decoder
        return self.model.decoder(rolling=self._rolling)

    @property
    def _rolling(self) -> bool:
        return self.options.get("overflow") == "roll"

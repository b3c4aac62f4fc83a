"""What clients send: OpenAI's fields and ours, checked.

A field that would change the answer and is not supported is refused by name; what changes nothing is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mlx_lqr.backends.protocol import Sampling
from mlx_lqr.backends.text.text_tokenizer import Message
from mlx_lqr.errors import InputError
from mlx_lqr.files.text import is_unicode
from mlx_lqr.runtime.stopping import StopStrings
from mlx_lqr.serving.failures import RequestError, unusable
from mlx_lqr.serving.requests import PromptScores

MAX_CHOICES = 16
"""Answers to one request"""
MAX_STOPS = 16
MAX_TOP = 20
"""Likeliest tokens whose log-probabilities are told"""
DEFAULT_TOKENS = 1024
"""Of an answer where nobody says how many; fewer where the context has no room for as many"""
MAX_PROMPTS = 1000
"""Of each kind, to fit a controller"""

IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
"""Fields that change no answer here"""
NEUTRAL: Mapping[str, Sequence[Any]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""Fields that are not supported, each with the values that ask for nothing"""
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _unicode(text: str) -> str:
    if not is_unicode(text):
        raise ValueError("it has half a surrogate pair, which is no character")
    return text


def _text_of(content: Any) -> Any:
    """A message's content as one text: parts of the type "text" are joined."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"this model reads text alone, and a part is of the type {kind!r}")
        texts.append(part["text"])
    return "".join(texts)


def _one_or_several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompts(prompt: Any) -> Any:
    """A completion's prompts as a list, each a text or token ids, where there may be one alone."""
    if prompt in ("", []):
        raise ValueError("it is empty: give a text")
    alone = isinstance(prompt, str) or (isinstance(prompt, list) and isinstance(prompt[0], int))
    return [prompt] if alone else prompt


def _strength(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str | None):
        raise ValueError("a strength is a number, a text such as gentle or 1.5x, or null")
    return value


Strengths = dict[str, Annotated[float | str | None, BeforeValidator(_strength)]]
"""By concept"""
Text = Annotated[str, AfterValidator(_unicode)]
Name = Annotated[str, Field(min_length=1, max_length=200)]


class Body(BaseModel):
    """A JSON object that a client sends."""

    model_config = ConfigDict(strict=True, extra="allow")

    def check_others(self) -> None:
        """Refuse fields that are not ours and would change the answer."""
        for name, value in (self.model_extra or {}).items():
            if value is not None and name not in IGNORED and value not in NEUTRAL.get(name, ()):
                raise RequestError(400, f"{name} is not supported here: leave it out", param=name, code="unsupported")


class ChatMessage(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: Annotated[Text, BeforeValidator(_text_of)]

    def message(self) -> Message:
        if self.role not in ROLES:
            raise RequestError(400, f"there is no role {self.role!r} here: use {', '.join(ROLES)}", param="messages")
        if (self.model_extra or {}).get("tool_calls"):
            raise RequestError(400, "tool_calls are not supported here: leave them out", param="messages")
        return {"role": ROLES[self.role], "content": self.content}


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class Decoding(Body):
    """What both kinds of completion have."""

    model: Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[list[Text], BeforeValidator(_one_or_several), Field(max_length=MAX_STOPS)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    steering: Strengths | None = None
    track: bool | None = None

    def sampling(self) -> Sampling:
        """How tokens are drawn: as the library does where the client says nothing."""
        given = {name: getattr(self, name) for name in Sampling.__dataclass_fields__ if hasattr(self, name)}
        try:
            return Sampling(**{name: value for name, value in given.items() if value is not None})
        except InputError as error:
            raise unusable(error) from None

    def stops(self) -> tuple[str, ...]:
        try:
            return StopStrings.check(self.stop or ())
        except InputError as error:
            raise unusable(error, "stop") from None

    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatBody(Decoding):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None

    def limit(self) -> int | None:
        """How many tokens at most, if the client says so."""
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise RequestError(400, "max_tokens and max_completion_tokens differ: give one of them", param="max_tokens")
        return new if new is not None else old

    def prompt_scores(self, index: int) -> PromptScores | None:
        """A conversation is not scored."""
        return None

    def top(self) -> int | None:
        """For how many of the likeliest tokens log-probabilities are wanted; None for none at all."""
        if not self.logprobs and self.top_logprobs:
            raise RequestError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Decoding):
    """POST /v1/completions"""

    prompt: Annotated[list[Text] | list[list[int]], BeforeValidator(_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None

    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    steer_from: Annotated[int, Field(ge=0)] | list[Annotated[int, Field(ge=0)]] | None = None
    """The first token of the prompt, or of each prompt, that is steered while it is scored"""

    def limit(self) -> int | None:
        if self.max_tokens == 0 and not self.scores_prompt:
            raise RequestError(400, "max_tokens 0 needs echo and logprobs: nothing else is told", param="max_tokens")
        return self.max_tokens

    def top(self) -> int | None:
        return self.logprobs

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's own tokens are told with their log-probabilities."""
        return bool(self.echo) and self.logprobs is not None

    def prompt_scores(self, index: int) -> PromptScores | None:
        """How prompt `index` is to be scored, if it is."""
        if not self.scores_prompt:
            if self.steer_from is not None:
                raise RequestError(400, "steer_from needs echo and logprobs: it is about scores", param="steer_from")
            return None
        asked = self.steer_from or 0
        if isinstance(asked, list) and len(asked) != len(self.prompt):
            message = f"{len(asked)} numbers for {len(self.prompt)} prompts: give one number, or one for each"
            raise RequestError(400, message, param="steer_from")
        first = asked[index] if isinstance(asked, list) else asked
        return PromptScores(self.logprobs or 0, first)


class SteeringBody(BaseModel):
    """POST /v1/steering/{id}"""

    model_config = ConfigDict(strict=True, extra="forbid")

    steering: Strengths


class FitBody(BaseModel):
    """POST /v1/controllers"""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: Name
    positive: Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
    negative: Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
    stream: bool | None = None
    chat_prompts: bool | None = None


B = TypeVar("B", bound=BaseModel)


def parsed(kind: type[B], value: Any) -> B:
    """A client's JSON value as this kind of request.

    Raises:
        RequestError: 400, which names the field.
    """
    try:
        body = kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise RequestError(400, f"{where or 'the body'}: {message}", param=where or None) from None
    if isinstance(body, Body):
        body.check_others()
    return body

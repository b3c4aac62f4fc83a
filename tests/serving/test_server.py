"""The server's HTTP, over a real connection: OpenAI's interface, steering, controllers, and who may ask for what."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from helpers.backends import tiny_folder
from helpers.controllers import controller_for
from helpers.serving import (
    CALIBRATION,
    MESSAGES,
    PROMPT,
    Response,
    ScriptedEngine,
    ask,
    chat_folder,
    controllers_of,
    listening,
    soon,
)

import mlx_lqr
from mlx_lqr.backends.protocol import Model
from mlx_lqr.lqr.controller import Controller
from mlx_lqr.serving import Event, controllers, fitting, guard
from mlx_lqr.serving.app import application
from mlx_lqr.serving.failures import RequestError
from mlx_lqr.serving.guard import Access, is_loopback
from mlx_lqr.serving.service import Service

GREEDY = {"temperature": 0, "max_tokens": 12}


@dataclass
class Served:
    """A server that listens, and what it serves."""

    port: int
    service: Service

    @property
    def model(self) -> Model:
        return self.service.model

    @property
    def name(self) -> str:
        return self.service.name

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)

    def ask(self, method: str, path: str, body: Any = None, **options: Any) -> Response:
        response: Response = ask(self.port, method, path, body, **options)
        return response

    def chat(self, **fields: Any) -> Response:
        return self.ask("POST", "/v1/chat/completions", {"model": self.name, "messages": MESSAGES, **GREEDY, **fields})

    def text(self, concepts: dict[str, float], **options: Any) -> str:
        """What the library itself writes after PROMPT."""
        loaded = controllers_of(self.model)
        parts = [loaded[concept] for concept in loaded if concept in concepts]
        if parts:
            options["controller"] = Controller.combine(*parts)
            options["strength"] = [concepts[concept] for concept in options["controller"].concepts]
        return mlx_lqr.generate(self.model, PROMPT, **{**GREEDY, **options})


@pytest.fixture(scope="module")
def folder() -> Path:
    return chat_folder()


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A tiny model with the controllers dog and ocean; by itself the server steers towards the ocean."""
    service = Service(mlx_lqr.load(folder, backend="mlx"), tmp_path_factory.mktemp("controllers"))
    loaded = controllers_of(service.model)
    service.controllers.add("dog", loaded["dog"])
    service.controllers.add("ocean", loaded["ocean"], default=2.0)
    with listening(application(service, Access())) as port:
        yield Served(port, service)
    service.close()


@pytest.fixture
def scripted(served: Served, monkeypatch: pytest.MonkeyPatch) -> ScriptedEngine:
    """The server's engine is one that says what a test tells it."""
    engine = ScriptedEngine()
    monkeypatch.setattr(served.service, "_engine", engine)
    return engine


@pytest.mark.parametrize(
    ("model", "extra", "concepts"),
    [
        ("", {}, {"ocean": 2.0}),  # the server's default
        ("", {"steering": {}}, {}),
        ("", {"steering": {"dog": 2.5}}, {"dog": 2.5}),
        ("", {"steering": {"dog": None}}, {"dog": 1.5}),  # the recommended strength
        ("", {"steering": {"ocean": "gentle", "dog": "2x"}}, {"dog": 3.0, "ocean": 0.5}),
        ("@dog", {}, {"dog": 1.5}),
        ("@dog:-2,ocean:strong", {}, {"dog": -2.0, "ocean": 3.0}),
        ("@dog:2", {"steering": {"ocean": 1}}, {"ocean": 1.0}),  # the body goes first
    ],
)
def test_answers_are_steered_as_the_body_the_models_name_or_the_server_says(
    served: Served, model: str, extra: dict[str, Any], concepts: dict[str, float]
) -> None:
    answer = served.client.chat.completions.create(
        model=served.name + model,
        messages=MESSAGES,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=12,
        extra_body=extra,
    )
    expected = served.text(concepts)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 12, 17)
    assert concepts == {} or expected != served.text({}), "the steering shows in the text"


def test_from_the_second_answer_of_a_conversation_on_there_is_more_feedback(served: Served) -> None:
    conversation = [*MESSAGES, {"role": "assistant", "content": "w4 w5"}, {"role": "user", "content": "w6"}]
    wanted = {"dog": 2.0, "ocean": 1.0}
    answer = served.chat(messages=conversation, steering=wanted).json["choices"][0]["message"]["content"]
    prompt = served.model.tokenizer.chat(conversation)
    first = Controller.combine(*controllers_of(served.model).values())
    later = first.in_conversation()
    texts = [
        mlx_lqr.generate(
            served.model, prompt, controller=one, strength=[wanted[name] for name in one.concepts], **GREEDY
        )
        for one in (later, first)
    ]
    assert answer == texts[0] != texts[1]
    assert served.chat(steering=wanted).json["choices"][0]["message"]["content"] == served.text(wanted)


def test_a_streamed_answer_is_the_same_in_pieces(served: Served) -> None:
    chunks = list(
        served.client.chat.completions.create(
            model=served.name,
            messages=MESSAGES,  # type: ignore[arg-type]
            stream=True,
            stream_options={"include_usage": True},
            temperature=0,
            max_completion_tokens=12,
            extra_body={"steering": {"dog": 2}},
        )
    )
    *written, last = chunks
    assert written[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in written) == served.text({"dog": 2})
    assert [chunk.choices[0].finish_reason for chunk in written][-1] == "length"
    assert len({chunk.id for chunk in chunks}) == 1
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 12


def test_completions_continue_texts_and_token_ids(served: Served) -> None:
    answer = served.client.completions.create(
        model=served.name,
        prompt=[PROMPT, "w5"],
        n=2,
        seed=7,
        temperature=1.5,
        max_tokens=6,
        extra_body={"steering": {}},
    )
    expected = [
        mlx_lqr.generate(served.model, prompt, seed=7 + i, temperature=1.5, max_tokens=6)
        for i, prompt in enumerate([PROMPT, PROMPT, "w5", "w5"])
    ]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 6, "a prompt counts once"
    ids = served.client.completions.create(
        model=served.name, prompt=[60, 1, 2, 3, 62], temperature=0, max_tokens=12, extra_body={"steering": {}}
    )
    assert ids.choices[0].text == served.text({})


def test_usage_says_what_was_not_read_again(served: Served) -> None:
    prompt = [7, 9, *range(20, 40)]
    fields = {"model": served.name, "prompt": [prompt, [4, 5]], "n": 2, "max_tokens": 3, "seed": 1, "steering": {}}
    for cached in (0, len(prompt) - 1):
        for stream in (False, True):
            answers = served.ask(
                "POST",
                "/v1/completions",
                {**fields, "stream": stream, "stream_options": {"include_usage": True}},
            )
            assert answers.status == 200, answers.content
            usage = (answers.events[-1] if stream else answers.json)["usage"]
            assert usage["prompt_tokens"] == len(prompt) + 2
            assert usage["prompt_tokens_details"] == {"cached_tokens": cached}
            cached = len(prompt) - 1


def test_every_setting_of_decoding_reaches_the_engine(served: Served, scripted: ScriptedEngine) -> None:
    fields = {
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": -0.4,
        "seed": 11,
    }
    connection = ask(
        served.port,
        "POST",
        "/v1/completions",
        {"model": served.name, "prompt": "w1", **fields, "stop": "w9", "logprobs": 3, "track": True},
        whole=False,
    )
    request = scripted.ticket().request
    connection.close()
    assert {name: getattr(request.sampling, name) for name in fields} == fields
    assert (request.stop, request.top_logprobs, request.track) == (("w9",), 3, True)
    assert request.max_tokens == 256, "as many as the context has room for"


def test_log_probabilities_in_both_forms(served: Served) -> None:
    rows = served.model.logits(served.model.tokenizer.encode(PROMPT)).astype(np.float64)
    expected = rows - np.log(np.exp(rows).sum())
    likeliest = [f"w{token}" for token in np.argsort(-expected)[:3]]
    fields = {"temperature": 0, "max_tokens": 2, "steering": {}}
    chat = served.chat(**fields, logprobs=True, top_logprobs=3).json["choices"][0]["logprobs"]["content"]
    assert [entry["token"].strip() for entry in chat[0]["top_logprobs"]] == likeliest
    assert chat[0]["logprob"] == pytest.approx(expected.max(), abs=1e-4)
    assert bytes(chat[0]["bytes"]).decode() == chat[0]["token"]
    body = {"model": served.name, "prompt": PROMPT, "logprobs": 3, **fields}
    plain = served.ask("POST", "/v1/completions", body).json["choices"][0]["logprobs"]
    assert [token.strip() for token in plain["top_logprobs"][0]] == likeliest
    assert plain["token_logprobs"] == pytest.approx([entry["logprob"] for entry in chat])
    assert plain["text_offset"] == [0, len(plain["tokens"][0])]
    streamed = served.ask("POST", "/v1/completions", {**body, "stream": True}).events
    parts = [event["choices"][0]["logprobs"] or {} for event in streamed]
    offsets = [offset for part in parts for offset in part.get("text_offset", [])]
    assert offsets == plain["text_offset"]


def test_tracking_goes_with_each_token(served: Served) -> None:
    events = served.chat(stream=True, track=True, steering={"dog": 2, "ocean": 0}, max_tokens=4).events
    tracked = [event["tracking"] for event in events if "tracking" in event]
    assert len(tracked) == 4
    dog = controllers_of(served.model)["dog"]
    for one in tracked:
        assert (one["layers"], one["concepts"]) == (list(dog.active_layers), ["dog", "ocean"])
        assert [error[1] for error in one["error"]] == [None] * 3, "at strength 0 nothing is measured"
        setpoint = np.array(one["setpoint"], float)[:, 0]
        assert setpoint == pytest.approx(dog.setpoint_at([2.0])[:, 0], rel=1e-4)
        assert np.array(one["feature"], float)[:, 0] == pytest.approx(
            setpoint - np.array(one["error"], float)[:, 0], abs=1e-5
        )
        assert min(one["push"]) > 0


def test_steering_changes_while_the_answer_is_written(served: Served, scripted: ScriptedEngine) -> None:
    body = {"model": served.name, "messages": MESSAGES, "stream": True, "steering": {"ocean": 0, "dog": 1}}
    connection = ask(served.port, "POST", "/v1/chat/completions", body, whole=False)
    response = connection.getresponse()
    name = json.loads(response.readline().removeprefix(b"data: "))["id"]
    ticket = scripted.ticket()
    assert ticket.request.strength == [1, 0], "in the order of the steering's concepts"
    changed = served.ask("POST", f"/v1/steering/{name}", {"steering": {"ocean": "strong"}})
    assert changed.json == {"id": name, "steering": {"dog": 1, "ocean": 3.0}}
    assert ticket.strengths == [[1, 3.0]]
    refused = served.ask("POST", f"/v1/steering/{name}", {"steering": {"cat": 1}})
    assert (refused.status, refused.json["error"]["param"]) == (400, "steering")
    ticket.on_event(Event("w1", 1, finish="stop"))
    response.read()
    connection.close()
    assert served.ask("POST", f"/v1/steering/{name}", {"steering": {"dog": 1}}).status == 404
    assert served.ask("POST", "/v1/steering/chatcmpl-0", {"steering": {"dog": 1}}).status == 404


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slot(served: Served, scripted: ScriptedEngine, stream: bool) -> None:
    body = {"model": served.name, "messages": MESSAGES, "stream": stream, "n": 2}
    connection = ask(served.port, "POST", "/v1/chat/completions", body, whole=False)
    tickets = [scripted.ticket(0), scripted.ticket(1)]
    tickets[0].on_event(Event("w1", 1))
    assert not tickets[0].cancelled.is_set()
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    assert all(ticket.cancelled.wait(30) for ticket in tickets)


def test_failures_on_the_way_reach_the_client_as_one_line(served: Served, scripted: ScriptedEngine) -> None:
    body = {"model": served.name, "messages": MESSAGES, "n": 2}
    for stream in (False, True):
        connection = ask(served.port, "POST", "/v1/chat/completions", {**body, "stream": stream}, whole=False)
        first, second = scripted.ticket(2 * stream), scripted.ticket(2 * stream + 1)
        first.on_event(Event("", finish="error", error="the activations overflow at layer 2"))
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        assert response.status == (200 if stream else 400)
        assert '"message":"the activations overflow at layer 2"' in text
        assert second.cancelled.wait(30), "the other choice is not finished for nobody"
    scripted.full = True
    full = served.ask("POST", "/v1/chat/completions", body)
    assert full.status == 503
    assert int(full.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("fields", "param", "status"),
    [
        ({"tools": [{"type": "function"}]}, "tools", 400),
        ({"response_format": {"type": "json_object"}}, "response_format", 400),
        ({"logit_bias": {"5": 1}}, "logit_bias", 400),
        ({"n": 17}, "n", 400),
        ({"n": 0}, "n", 400),
        ({"max_tokens": 0}, "max_tokens", 400),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", 400),
        ({"temperature": "hot"}, "temperature", 400),
        ({"temperature": -1}, None, 400),
        ({"top_logprobs": 3}, "top_logprobs", 400),
        ({"stop": ["w1", ""]}, "stop", 400),
        ({"model": "gpt-4"}, "model", 404),
        ({"model": "gpt-4@dog"}, "model", 404),
        ({"steering": {"cat": 1}}, "steering", 400),
        ({"steering": {"dog": "hard"}}, "steering", 400),
        ({"steering": {"dog": True}}, "steering.dog", 400),
        ({"max_tokens": 1000}, None, 400),
        ({"messages": []}, "messages", 400),
        ({"messages": "w1"}, "messages", 400),
        ({"stop": {"a": 1}}, "stop", 400),
        ({"messages": [{"role": "tool", "content": "w1"}]}, "messages", 400),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", 400),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    served: Served, fields: dict[str, Any], param: str | None, status: int
) -> None:
    response = served.chat(**fields)
    error = response.json["error"]
    assert (response.status, error["param"]) == (status, param)
    assert len(error["message"].splitlines()) == 1
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


@pytest.mark.parametrize("prompt", [5, {"a": 1}, None, "", [], [[]], [True], ["w1", 2], [[1], "w1"], [99], [-1]])
def test_what_is_no_prompt_is_refused(served: Served, prompt: Any) -> None:
    response = served.ask("POST", "/v1/completions", {"model": served.name, "prompt": prompt})
    assert response.status == 400, response.json


def test_what_changes_nothing_is_ignored_and_parts_of_text_are_joined(served: Served) -> None:
    parts = [{"type": "text", "text": "w1 w2"}, {"type": "text", "text": " w3"}]
    harmless = {"user": "me", "store": False, "metadata": {"a": "b"}, "tools": [], "logit_bias": None, "steering": {}}
    response = served.chat(messages=[{"role": "user", "content": parts}], **harmless)
    assert response.json["choices"][0]["message"]["content"] == served.text({})


def test_what_open_webui_sends_is_answered(served: Served) -> None:
    """Its list of models, a conversation as its page streams it, and what it asks for a chat's title and tags."""
    headers = {"Authorization": "Bearer local", "X-OpenWebUI-User-Name": "me"}
    listed = served.ask("GET", "/v1/models", headers=headers).json
    assert listed["object"] == "list"
    assert all(one["id"] and one["object"] == "model" and one["owned_by"] for one in listed["data"])
    conversation = [
        {"role": "system", "content": "w9"},
        {"role": "user", "content": [{"type": "text", "text": "w1 w2"}]},
        {"role": "assistant", "content": "w4"},
        {"role": "user", "content": "w3", "id": "5e1f", "timestamp": 1},
    ]
    streamed = served.chat(
        model=f"{served.name}@dog",
        messages=conversation,
        stream=True,
        stream_options={"include_usage": True},
        temperature=0,
        max_tokens=6,
        stop=None,
        user={"name": "me", "id": "1", "role": "admin"},
        metadata={"chat_id": "c", "task": None},
        tools=[],
    )
    *chunks, last = streamed.events
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks).split()
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    task = [{"role": "user", "content": "### Task:\nGenerate a concise title\n<chat_history>\nw1\n</chat_history>"}]
    for limit in ({"max_tokens": 6}, {"max_completion_tokens": 6}):
        body = {"model": served.name, "messages": task, "stream": False, "seed": 1, **limit}
        response = served.ask("POST", "/v1/chat/completions", {**body, "metadata": {"task": "title_generation"}})
        assert response.status == 200, response.content
        title = response.json
        assert title["choices"][0]["message"]["content"].split()
        assert title["choices"][0]["finish_reason"] == "length"


def test_bodies_that_are_no_json_or_too_large(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    path, as_json = "/v1/chat/completions", {"Content-Type": "application/json"}
    assert served.ask("POST", path, b"{", headers=as_json).status == 400
    assert served.ask("POST", path, b"\xff", headers=as_json).status == 400
    assert served.ask("POST", path, b"[" * 5000, headers=as_json).status == 400
    assert served.ask("POST", path, b"{}", headers={"Content-Type": "text/plain"}).status == 415
    assert served.ask("POST", path, b"{}").status == 415
    monkeypatch.setattr(guard, "JSON_BYTES", 1 << 20)
    large = b'{"a": "' + b"x" * (1 << 20) + b'"}'
    assert served.ask("POST", path, large, headers=as_json).status == 413
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(large), large)
    assert served.ask("POST", path, chunked, headers={**as_json, "Transfer-Encoding": "chunked"}).status == 413
    assert served.ask("GET", "/v1/nothing").json["error"]["type"] == "not_found_error"
    assert served.ask("DELETE", "/v1/models").status == 405


def test_a_fault_of_ours_shows_nothing(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(served.service, "conversation", fail)
    response = served.chat()
    assert (response.status, response.json["error"]["type"]) == (500, "server_error")
    assert b"secret" not in response.content


@pytest.mark.parametrize(
    ("host", "header", "allowed"),
    [
        ("127.0.0.1", "localhost:8080", True),
        ("127.0.0.1", "127.0.0.1:8080", True),
        ("127.0.0.1", "[::1]:8080", True),
        ("127.0.0.1", "evil.example:8080", False),
        ("127.0.0.1", "localhost.evil.example", False),
        ("127.0.0.1", "", False),
        ("127.0.0.1", None, False),
        ("models.example", "models.example:80", True),
        ("0.0.0.0", "192.168.1.7:8080", True),
        ("0.0.0.0", "evil.example", False),
        ("0.0.0.0", socket.gethostname(), True),
        ("127.0.0.1", socket.gethostname() + ".evil.example", False),
    ],
)
def test_a_name_that_was_made_to_lead_here_is_refused(host: str, header: str | None, allowed: bool) -> None:
    assert Access(host).allows_host(header) is allowed


def test_hosts_of_the_loopback() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.8.9.1")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "192.168.1.7", "example.com", "")] == [False] * 5


def test_keys_hosts_and_origins_over_the_wire(served: Served) -> None:
    access = Access(key="s3cret")
    with listening(application(served.service, access, origins=("http://localhost:3000",))) as port:

        def status(path: str, **headers: str) -> int:
            return int(
                ask(port, "GET", path, headers={name.replace("_", "-"): v for name, v in headers.items()}).status
            )

        assert status("/health") == status("/") == 200
        assert status("/v1/models") == status("/metrics") == status("/v1/controllers") == 401
        assert status("/v1/models", Authorization="Bearer s3cre") == status("/v1/models", Authorization="s3cret") == 401
        assert status("/v1/models", Authorization="Bearer s3cret") == 200
        assert status("/health", Host="evil.example") == 421
        preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        for origin, allowed in (("http://localhost:3000", True), ("http://evil.example", False)):
            response = ask(port, "OPTIONS", "/v1/completions", headers={"Origin": origin, **preflight})
            assert (response.headers.get("access-control-allow-origin") == origin) is allowed
    without = served.ask("OPTIONS", "/v1/completions", headers={"Origin": "http://localhost:3000", **preflight})
    assert not [name for name in without.headers if name.startswith("access-control")]


def test_the_page_and_its_files_alone_are_given_out(served: Served) -> None:
    page = served.ask("GET", "/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for path in ("/page/..%2fengine.py", "/page/%2e%2e/engine.py", "/page/engine.py", "/page//etc/passwd"):
        assert served.ask("GET", path).status == 404


def test_models_are_listed_with_their_controllers(served: Served) -> None:
    names = [model.id for model in served.client.models.list()]
    assert names == [served.name, f"{served.name}@dog", f"{served.name}@ocean"]
    assert served.client.models.retrieve(f"{served.name}@dog").id == f"{served.name}@dog"
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("gpt-4")


def test_controllers_are_listed_taken_brought_and_deleted(served: Served, tmp_path: Path) -> None:
    dog, ocean = served.ask("GET", "/v1/controllers").json["data"]
    assert dog == {
        "id": "dog",
        "object": "controller",
        "concepts": ["dog"],
        "method": "alqr",
        "layers": [0, 1, 2],
        "strength": 1.5,
        "budgets": dict(CALIBRATION.strength),
        "default": 0.0,
    }
    assert ocean["default"] == 2.0
    taken = served.ask("GET", "/v1/controllers/dog/file")
    assert "attachment" in taken.headers["content-disposition"]
    (tmp_path / "dog.safetensors").write_bytes(taken.content)
    assert np.array_equal(Controller.load(tmp_path / "dog.safetensors").gain, controllers_of(served.model)["dog"].gain)
    assert served.ask("PUT", "/v1/controllers/hound/file", taken.content).status == 409, "dog is there already"
    assert served.ask("DELETE", "/v1/controllers/dog").json["deleted"] is True
    assert served.ask("DELETE", "/v1/controllers/dog").status == 404
    assert served.chat(steering={"dog": 1}).status == 400
    brought = served.ask("PUT", "/v1/controllers/hound/file", taken.content)
    assert brought.json == {**dog, "id": "hound"}
    kept = served.service.controllers._folder / "hound.safetensors"
    again = controllers.Controllers(served.model, kept.parent)
    assert again.load_folder() == []
    assert [one.entry() for one in again.all()] == [brought.json], "the next server finds it in the folder"
    (note,) = again.load_folder()
    assert "there is a controller 'hound' already" in note, "nothing replaces what -c has loaded"
    assert served.ask("DELETE", "/v1/controllers/hound").status == 200
    assert not kept.exists()
    served.service.controllers.add("dog", controllers_of(served.model)["dog"])


def test_files_that_are_no_controller_of_this_model_are_refused(served: Served, tmp_path: Path) -> None:
    another = mlx_lqr.load(tiny_folder("llama", seed=5), backend="mlx")
    controller_for(another).save(tmp_path / "a.safetensors")
    for content in ((tmp_path / "a.safetensors").read_bytes(), b"not at all", b""):
        response = served.ask("PUT", "/v1/controllers/cat/file", content)
        assert response.status == 400
        assert "/tmp" not in response.json["error"]["message"], "no path of this machine is told"
    good = served.ask("GET", "/v1/controllers/dog/file").content
    for name in ("..%2Fcat", "a.b", "x" * 65, "%00"):
        assert served.ask("PUT", f"/v1/controllers/{name}/file", good).status in (400, 404)
    assert list(served.service.controllers._folder.iterdir()) == []


FIT = {"name": "cat", "positive": ["w1 w2", "w3 w4"], "negative": ["w5 w6", "w7"], "chat_prompts": False}


def test_a_controller_is_fitted_with_progress(served: Served) -> None:
    *progress, last = served.ask("POST", "/v1/controllers", {**FIT, "stream": True}).events
    assert {event["object"] for event in progress} == {"controller.progress"}
    assert {"Activations", "Gains", "Calibration"} <= {event["stage"] for event in progress}
    assert all(0 <= event["done"] <= event["total"] for event in progress)
    assert (last["object"], last["concepts"]) == ("controller", ["cat"])
    assert any("2 positive and 2 negative prompts are few" in note for note in last["notes"])
    assert fitting.FRAMED not in last["notes"]
    by_default = {name: value for name, value in FIT.items() if name != "chat_prompts"}
    assert fitting.FRAMED in served.ask("POST", "/v1/controllers", by_default).json["notes"]
    assert served.ask("POST", "/v1/controllers", FIT).json["concepts"] == ["cat"], "in place of its own"
    expected = mlx_lqr.fit(served.model, FIT["positive"], FIT["negative"], concept="cat")  # type: ignore[arg-type]
    fitted = served.service.controllers.get("cat").steering
    assert np.allclose(fitted.arrays["gain"], expected.gain)
    assert served.chat(steering={"cat": None}).status == 200
    assert served.ask("POST", "/v1/controllers", {**FIT, "name": "../cat"}).status == 400
    assert served.ask("POST", "/v1/controllers", {**FIT, "positive": []}).status == 400
    assert served.ask("DELETE", "/v1/controllers/cat").status == 200


def test_servers_that_share_a_folder_write_over_nothing(served: Served, tmp_path: Path) -> None:
    a, b = (controllers.Controllers(served.model, tmp_path) for _ in range(2))
    dog, ocean = controllers_of(served.model).values()
    a.add("one", dog, keep=True)
    kept = (tmp_path / "one.safetensors").read_bytes()
    with pytest.raises(RequestError, match="take another name"):
        b.add("one", ocean, keep=True)
    b.add("one", ocean)  # not to be kept
    b.remove("one")
    assert (tmp_path / "one.safetensors").read_bytes() == kept
    a.add("one", ocean, keep=True)
    assert (tmp_path / "one.safetensors").read_bytes() != kept, "it is its own"
    a.remove("one")
    assert [*tmp_path.iterdir()] == []


def test_one_fit_at_a_time_which_ends_when_its_client_leaves(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[int] = []

    def slow_fit(*_: object, progress: Any, **__: object) -> None:
        while True:
            reports.append(1)
            progress("Gains", 0, 1)

    monkeypatch.setattr(fitting, "fit", slow_fit)
    connection = ask(served.port, "POST", "/v1/controllers", {**FIT, "stream": True}, whole=False)
    soon(lambda: bool(reports))
    assert served.ask("POST", "/v1/controllers", {**FIT, "name": "bird"}).status == 409
    assert served.chat().status == 200, "others are answered meanwhile"
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    current = served.service.fitter._current
    assert current is not None
    soon(lambda: not current.running)
    assert [one.id for one in served.service.controllers.all() if one.id == "cat"] == []


def test_metrics_count_routes_tokens_and_times(served: Served) -> None:
    def number(name: str) -> float:
        lines = served.ask("GET", "/metrics").content.decode().splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), 0.0)

    route = 'mlx_lqr_responses_total{route="/v1/chat/completions",status="200"}'
    names = route, *(f"mlx_lqr_{name}" for name in ("first_token_seconds_count", "generated_tokens_total"))
    before = [number(name) for name in names]
    served.chat(max_tokens=5)
    assert np.subtract([number(name) for name in names], before).tolist() == [1, 1, 5]
    buckets = [number(f'mlx_lqr_tokens_per_second_bucket{{le="{bound}"}}') for bound in ("1.0", "1000.0", "+Inf")]
    assert buckets == sorted(buckets)
    assert buckets[-1] == number("mlx_lqr_tokens_per_second_count") > 0


def test_a_model_without_a_chat_template_says_what_to_use(tmp_path: Path) -> None:
    service = Service(mlx_lqr.load(chat_folder(template=False), backend="mlx"), tmp_path)
    try:
        with listening(application(service, Access())) as port:
            response = ask(port, "POST", "/v1/chat/completions", {"model": service.name, "messages": MESSAGES})
    finally:
        service.close()
    assert response.status == 400
    assert "/v1/completions" in response.json["error"]["message"]

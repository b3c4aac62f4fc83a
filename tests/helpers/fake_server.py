"""A server with the HTTP of `mlx-lqr serve` and no model: scripted words, which the steering changes.

    PYTHONPATH=tests python -m helpers.fake_server

What it was asked is kept in `Fake.requests`, so that tests can look.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from helpers.serving import listening

PAGE = Path(__file__).parents[2] / "mlx_lqr" / "serving" / "page"
PLAIN = re.findall(r"\w+", "I went to the market and bought some bread and then I walked home along the road")
WORDS = {"ocean": ["waves", "tide", "shore", "salt"], "dog": ["puppy", "bark", "leash", "paw"]}
"""What a concept says, at strengths from 1 on."""
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def controller(name: str, default: float = 0.0) -> dict[str, Any]:
    return {
        "id": name,
        "object": "controller",
        "concepts": [name],
        "method": "alqr",
        "layers": [28, 29],
        "strength": 2.229,
        "budgets": {"gentle": 1.8, "normal": 2.229, "strong": 2.7},
        "default": default,
    }


@dataclass
class Fake:
    pause: float = 0.002
    """Seconds between tokens."""
    hold_at: int | None = None
    """Answers and fits stop here, at this token or step, until it is None."""
    says: list[str] = field(default_factory=lambda: PLAIN)
    """The words of an answer that is not steered, over and over."""
    layers: Sequence[int] = (28, 29)
    loading: bool = False
    """No controller is listed while it is true."""
    key: str | None = None
    full: bool = False
    controllers: dict[str, dict[str, Any]] = field(default_factory=lambda: {"ocean": controller("ocean", 2.229)})
    running: dict[str, dict[str, float]] = field(default_factory=dict)
    """Answer -> its steering."""
    requests: list[tuple[str, Any]] = field(default_factory=list)
    """Path and JSON body of each POST."""

    def app(self) -> Starlette:
        routes = [
            Route("/", lambda request: FileResponse(PAGE / "index.html")),
            Mount("/page", StaticFiles(directory=PAGE)),
            Route("/v1/models", self.models),
            Route("/v1/controllers", self.list),
            Route("/v1/controllers", self.fit, methods=["POST"]),
            Route("/v1/controllers/{name}", self.delete, methods=["DELETE"]),
            Route("/v1/controllers/{name}/file", self.file, methods=["GET", "PUT"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/steering/{name}", self.steer, methods=["POST"]),
        ]
        return Starlette(routes=routes, middleware=[Middleware(Guard, fake=self)])

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "demo", "object": "model"}]})

    async def list(self, request: Request) -> Response:
        while self.loading:
            await asyncio.sleep(0.01)
        return JSONResponse({"object": "list", "data": list(self.controllers.values())})

    async def fit(self, request: Request) -> Response:
        body = await self.asked(request)
        if len(body["positive"]) < 2:
            return refusal(400, "positive: 1 prompt is too few, give at least 2")
        return stream(self.fitting(body["name"]))

    async def fitting(self, name: str) -> AsyncIterator[dict[str, Any]]:
        for done in range(4):
            await self.held(done)
            yield {"object": "controller.progress", "stage": "Gains", "done": done, "total": 4}
        self.controllers[name] = controller(name)
        notes = ["positive prompts are longer than negative ones, by 3 words on average", "2 prompts a side are few"]
        yield {**self.controllers[name], "notes": notes}

    async def delete(self, request: Request) -> Response:
        del self.controllers[request.path_params["name"]]
        return Response(status_code=204)

    async def file(self, request: Request) -> Response:
        name = request.path_params["name"]
        if request.method == "GET":
            return Response(json.dumps(self.controllers[name]), media_type="application/octet-stream")
        try:
            loaded = json.loads(await request.body())
        except ValueError:
            return refusal(400, "this is not a safetensors file")
        self.controllers[name] = {**loaded, "id": name}
        return JSONResponse(self.controllers[name])

    async def chat(self, request: Request) -> Response:
        body = await self.asked(request)
        if self.full:
            return refusal(503, "The server is full.", {"Retry-After": "3"})
        if body["track"] and not body["steering"]:
            return refusal(400, "nothing steers, so nothing can be tracked")
        name = f"chatcmpl-{len(self.requests)}"
        self.running[name] = dict(body["steering"])
        return stream(self.writing(name, body), ended=lambda: self.running.pop(name, None))

    async def writing(self, name: str, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        shown = dict.fromkeys(self.running[name], 0.0)
        count = min(body["max_tokens"], 60)
        for number in range(count):
            await self.held(number)
            steering = self.running[name]
            word = self.says[number % len(self.says)]
            for concept, strength in steering.items():
                shown[concept] += 0.35 * (strength - shown[concept])
                if strength >= 1 and number % 2:
                    word = WORDS.get(concept, [concept] * 4)[number // 2 % 4]
            delta = {"content": word + (".\n\n" if number % 20 == 19 else " ")}
            finish = "length" if number == count - 1 else None
            chunk: dict[str, Any] = {"id": name, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
            if body["track"]:
                chunk["tracking"] = tracking(number, self.layers, steering, shown)
            yield chunk

    async def held(self, number: int) -> None:
        await asyncio.sleep(self.pause)
        while number == self.hold_at:
            await asyncio.sleep(0.01)

    async def steer(self, request: Request) -> Response:
        body = await self.asked(request)
        name = request.path_params["name"]
        if name not in self.running:
            return refusal(404, f"{name} has ended")
        self.running[name].update(body["steering"])
        return JSONResponse({"id": name, "steering": self.running[name]})

    async def asked(self, request: Request) -> Any:
        body = await request.json()
        self.requests.append((request.url.path, body))
        return body


def tracking(
    number: int, layers: Sequence[int], steering: Mapping[str, float], shown: Mapping[str, float]
) -> dict[str, Any]:
    """A feature that follows its setpoint from below, with a little noise."""
    setpoint, feature = [], []
    for layer in layers:
        scale = layer - 15
        setpoint.append([scale * strength for strength in steering.values()])
        noise = 0.1 * scale * ((number * 7 + layer) % 5 - 2)
        feature.append([scale * shown[concept] + noise if steering[concept] else None for concept in steering])
    error = [
        [s - f if f is not None else None for s, f in zip(*rows, strict=True)]
        for rows in zip(setpoint, feature, strict=True)
    ]
    push = [sum(abs(value or 0.0) for value in row) for row in error]
    fields = {"error": error, "feature": feature, "setpoint": setpoint, "push": push}
    return {"layers": list(layers), "concepts": list(steering), **fields}


def stream(events: AsyncIterator[dict[str, Any]], ended: Any = lambda: None) -> Response:
    async def lines() -> AsyncIterator[str]:
        try:
            async for event in events:
                yield f"data: {json.dumps(event)}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            ended()

    return StreamingResponse(lines(), media_type="text/event-stream")


def refusal(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)


class Guard:
    """Asks for the key below /v1, and sends the policy that the page has to do with."""

    def __init__(self, app: ASGIApp, fake: Fake) -> None:
        self.app = app
        self.fake = fake

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        given = dict(scope.get("headers", ())).get(b"authorization", b"").decode()
        if self.fake.key and scope.get("path", "").startswith("/v1/") and given != f"Bearer {self.fake.key}":
            await refusal(401, "a key is needed")(scope, receive, guarded)
        else:
            await self.app(scope, receive, guarded)


if __name__ == "__main__":
    with listening(Fake(pause=0.08).app()) as port:
        print(f"http://127.0.0.1:{port}", flush=True)
        threading.Event().wait()

"""The HTTP application: OpenAI's completions with steering, the controllers, and the page.

GET  /health, /metrics, /, /page/FILE
GET  /v1/models                       the model, and the model with each controller: NAME@CONCEPT
POST /v1/chat/completions             OpenAI's, and "steering": {"dog": 2.0}, "track": true
POST /v1/completions
POST /v1/steering/ID                  changes how a running answer is steered
GET  /v1/controllers                  and POST, to fit one; /v1/controllers/ID/file to take and to bring one
"""

from __future__ import annotations

import mimetypes
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mlx_lqr.errors import InputError
from mlx_lqr.files.json_text import parse_json
from mlx_lqr.lqr.prompts import Prompt
from mlx_lqr.serving.bodies import ChatBody, CompletionBody, FitBody, SteeringBody, parsed
from mlx_lqr.serving.failures import RequestError, unusable
from mlx_lqr.serving.guard import GONE, Access, Guard
from mlx_lqr.serving.metrics import CONTENT_TYPE
from mlx_lqr.serving.replies import ChatForm, CompletionForm, new_id
from mlx_lqr.serving.service import Service
from mlx_lqr.serving.streaming import EventStream, GoneError, until_gone

PLACEHOLDER = b"<!doctype html><title>mlx-lqr</title><p>mlx-lqr serves a model here: /v1/chat/completions"


def application(service: Service, access: Access, *, origins: tuple[str, ...] = ()) -> ASGIApp:
    """The application that serves a model.

    Args:
        service: the model, its engine and its controllers.
        access: who may ask.
        origins: pages from elsewhere that may ask, such as "http://localhost:3000".
    """
    routes = [
        Route("/health", health),
        Route("/", page),
        Route("/page/{file}", page),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/steering/{id}", steer, methods=["POST"]),
        Route("/v1/controllers", controllers),
        Route("/v1/controllers", fit_controller, methods=["POST"]),
        Route("/v1/controllers/{id}", remove_controller, methods=["DELETE"]),
        Route("/v1/controllers/{id}/file", controller_file),
        Route("/v1/controllers/{id}/file", put_controller_file, methods=["PUT"]),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            RequestError: _failed,
            InputError: _refused,
            HTTPException: _not_served,
            GoneError: _gone,
            Exception: _broken,
        },
    )
    app.state.service = service
    paths: dict[object, str] = {route.endpoint: route.path for route in routes}

    def count(endpoint: object, status: int) -> None:
        service.counts.count(paths.get(endpoint, "other"), status)

    guarded: ASGIApp = Guard(app, access, count)
    if origins:
        headers = ["Authorization", "Content-Type"]
        methods = ["GET", "POST", "PUT", "DELETE"]
        guarded = CORSMiddleware(guarded, allow_origins=origins, allow_methods=methods, allow_headers=headers)
    return guarded


async def health(request: HTTPRequest) -> Response:
    return JSONResponse({"status": "ok"})


async def page(request: HTTPRequest) -> Response:
    """A file of the page; its name is looked up, and no path is made of it."""
    name = request.path_params.get("file", "index.html")
    folder = resources.files("mlx_lqr.serving") / "page"
    files = {file.name: file for file in folder.iterdir() if file.is_file()} if folder.is_dir() else {}
    if name not in files and name == "index.html":
        return Response(PLACEHOLDER, media_type="text/html")
    if name not in files:
        raise RequestError(404, "the page has no such file")
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return Response(files[name].read_bytes(), media_type=kind, headers={"Cache-Control": "no-cache"})


async def metrics(request: HTTPRequest) -> Response:
    return Response(_service(request).metrics, headers={"Content-Type": CONTENT_TYPE})


async def models(request: HTTPRequest) -> Response:
    return JSONResponse({"object": "list", "data": _service(request).models()})


async def model(request: HTTPRequest) -> Response:
    name = request.path_params["name"]
    for entry in _service(request).models():
        if entry["id"] == name:
            return JSONResponse(entry)
    raise RequestError(404, f"there is no model {name[:80]!r}: GET /v1/models lists them", code="model_not_found")


async def chat_completions(request: HTTPRequest) -> Response:
    service, body = _service(request), parsed(ChatBody, await _json(request))
    prompt = await run_in_threadpool(service.conversation, [message.message() for message in body.messages])
    return await _answered(request, body, [prompt], new_id("chatcmpl"))


async def completions(request: HTTPRequest) -> Response:
    body = parsed(CompletionBody, await _json(request))
    return await _answered(request, body, body.prompt, new_id("cmpl"))


async def _answered(
    request: HTTPRequest, body: ChatBody | CompletionBody, prompts: list[Prompt] | list[str] | list[list[int]], id: str
) -> Response:
    service = _service(request)
    requests, strengths = await run_in_threadpool(service.requests, body, prompts)
    reply = service.begin(id, requests, strengths)
    options = {"with_usage": body.wants_usage(), "tracked": bool(body.track)}
    form: ChatForm | CompletionForm
    if isinstance(body, ChatBody):
        form = ChatForm(reply, body.model, service.model.tokenizer, **options)
    else:
        form = CompletionForm(reply, body.model, service.model.tokenizer, echoed=service.echoed(body), **options)
    if body.stream:
        return EventStream(form.chunks(), after=lambda: service.end(reply))
    try:
        return JSONResponse(await until_gone(request.receive, form.whole()))
    finally:
        service.end(reply)


async def steer(request: HTTPRequest) -> Response:
    service, body = _service(request), parsed(SteeringBody, await _json(request))
    reply = service.running(request.path_params["id"])
    strengths = service.controllers.strengths(body.steering)
    for concept in strengths:
        if concept not in reply.strengths:
            message = f"the answer did not begin with {concept!r}: name it in its request, at 0"
            raise RequestError(400, message, param="steering")
    if strengths:
        reply.steer(strengths)
    return JSONResponse({"id": reply.id, "steering": reply.strengths})


async def controllers(request: HTTPRequest) -> Response:
    entries = [one.entry() for one in _service(request).controllers.all()]
    return JSONResponse({"object": "list", "data": entries})


async def fit_controller(request: HTTPRequest) -> Response:
    service, body = _service(request), parsed(FitBody, await _json(request))
    fit = service.fitter.begin(body)
    if body.stream:
        return EventStream(fit.events(), after=fit.cancel)
    try:
        return JSONResponse(await until_gone(request.receive, fit.whole()))
    finally:
        fit.cancel()


async def remove_controller(request: HTTPRequest) -> Response:
    id = request.path_params["id"]
    await run_in_threadpool(_service(request).controllers.remove, id)
    return JSONResponse({"id": id, "object": "controller", "deleted": True})


async def controller_file(request: HTTPRequest) -> Response:
    id = request.path_params["id"]
    content = await run_in_threadpool(_service(request).controllers.content, id)
    name = f'attachment; filename="{id}.safetensors"'
    return Response(content, media_type="application/octet-stream", headers={"Content-Disposition": name})


async def put_controller_file(request: HTTPRequest) -> Response:
    id, content = request.path_params["id"], await request.body()
    loaded = await run_in_threadpool(_service(request).controllers.upload, id, content)
    return JSONResponse(loaded.entry())


async def _json(request: HTTPRequest) -> Any:
    body = await request.body()
    try:
        return parse_json(body.decode())
    except ValueError as error:  # UnicodeDecodeError is one
        raise RequestError(400, f"the body is not JSON: {error}") from None


def _service(request: HTTPRequest) -> Service:
    service: Service = request.app.state.service
    return service


async def _failed(request: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error.response()


async def _refused(request: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, InputError)
    return unusable(error).response()


async def _gone(request: HTTPRequest, error: Exception) -> Response:
    return Response(status_code=GONE)  # nobody reads it, but it is counted


async def _broken(request: HTTPRequest, error: Exception) -> Response:
    """The guard logs what has happened."""
    return RequestError(500, "the server failed: its log says more").response()


async def _not_served(request: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "there is nothing at this path", 405: "this path has no such method"}
    return RequestError(error.status_code, what.get(error.status_code, error.detail), headers=error.headers).response()

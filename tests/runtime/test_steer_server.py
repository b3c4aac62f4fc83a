"""mlx_lm's HTTP server, which generates in a thread of its own, on a model that `mlx_lqr.steer` steers meanwhile."""

from __future__ import annotations

import json
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from typing import Any

import pytest
from mlx_lm import server

import mlx_lqr
from mlx_lqr.backends.protocol import Model
from mlx_lqr.convert.sources import demo_model

LENGTH = 10


@pytest.fixture(scope="module")
def provider() -> Any:
    """What `python -m mlx_lm server --model ... --prefill-step-size 5` runs with, its model loaded."""
    made: list[Any] = []
    command = ["mlx_lm.server", "--model", str(demo_model()), "--prefill-step-size", "5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        patch.setattr(server, "run", lambda host, port, provider: made.append(provider))
        server.main()
    made[0].load_default()
    return made[0]


@pytest.fixture(scope="module")
def address(provider: Any) -> Iterator[str]:
    generator = server.ResponseGenerator(provider, server.LRUPromptCache(10))

    def handler(*args: Any) -> Any:
        return server.APIHandler(generator, *args, system_fingerprint="test")

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)  # type: ignore[arg-type]
    serving = threading.Thread(target=httpd.serve_forever)
    serving.start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1/completions"
    httpd.shutdown()
    serving.join()
    httpd.server_close()
    generator.stop_and_join()


def ask(address: str, prompt: str, **options: Any) -> tuple[str, int]:
    """The server's answer, and how many tokens of the prompt it had in its cache."""
    body = {"prompt": prompt, "max_tokens": LENGTH, "temperature": 0, **options}
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
        answer = json.load(response)
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("Once upon a time, in a small house at the end of a long road,", {}),
        ("The first thing that she saw when the door was opened at last", {"seed": 1}),  # which excludes batching
    ],
    ids=["in batches", "one at a time"],
)
def test_the_server_of_mlx_lm_answers_as_our_loop_does(
    prompt: str, options: Any, smollm2: Model, controller: mlx_lqr.Controller, provider: Any, address: str
) -> None:
    def ours(**steering: Any) -> str:
        return mlx_lqr.generate(smollm2, prompt, max_tokens=LENGTH, temperature=0, **steering).lstrip()

    with mlx_lqr.steer(provider.model, controller, strength=3.0):
        answers = [ask(address, prompt, **options) for _ in range(2)]
    answers.append(ask(address, prompt, **options))
    steered, plain = ours(controller=controller, strength=3.0), ours()
    assert [text.lstrip() for text, _ in answers] == [steered, steered, plain]  # mlx_lm drops a leading space
    last = len(smollm2.tokenizer.encode(prompt)) - 1
    assert [cached for _, cached in answers] == [0, last, last]
    assert steered != plain

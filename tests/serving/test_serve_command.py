"""mlx-lqr serve: what it refuses before it listens, and how it stops."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from importlib import util
from pathlib import Path

import pytest
import uvicorn
from helpers.command_line import refused
from helpers.platforms import posix
from helpers.serving import MESSAGES, ScriptedEngine, ask, chat_folder, controllers_of, soon

import mlx_lqr
from mlx_lqr.commands.serve import KEY
from mlx_lqr.serving import listen
from mlx_lqr.serving.app import application
from mlx_lqr.serving.guard import Access
from mlx_lqr.serving.service import Service


def test_mistakes_are_refused_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    empty = tmp_path / "key"
    empty.write_text("\n")
    for arguments, line in {
        ("--host", "0.0.0.0"): "others can connect: give a key",
        ("--host", "0.0.0.0", "--api-key-file", empty): "must be printable ASCII",
        ("--api-key-file", tmp_path / "none"): "cannot read",
        ("--allow-origin", "*"): "an origin is such as http://localhost:3000",
        ("--concept", "unicorn"): "no bundled concept 'unicorn'",
        ("--host", "no-such-host.invalid", "--api-key-file", "KEY"): "cannot listen on no-such-host.invalid",
        ("--port", "70000"): "70000 is not in the range",
        ("--slots", "0"): "0 is not in the range",
    }.items():
        (tmp_path / "KEY").write_text("s3cret\n")
        given = [tmp_path / "KEY" if argument == "KEY" else argument for argument in arguments]
        assert line in refused("serve", tmp_path / "no-model", *given)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1, port {port}" in refused("serve", "no-model", "--port", port)
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    assert "pip install 'mlx-lqr[serve]'" in refused("serve", "demo")


@posix
def test_a_signal_lets_the_answer_under_way_come_to_its_end(tmp_path: Path) -> None:
    folder = chat_folder()
    controllers_of(mlx_lqr.load(folder, backend="mlx"))["dog"].save(tmp_path / "dog.safetensors")
    steered = f"{tmp_path / 'dog.safetensors'}:2"
    command = [sys.executable, "-m", "mlx_lqr", "serve", folder, "--backend", "mlx", "--port", "0", "-c", steered]
    environment = {**os.environ, "MLX_LQR_CACHE": str(tmp_path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.fullmatch(r"Serving (\S+) at http://127\.0\.0\.1:(\d+) \(Ctrl-C stops it\)\n", line)
        assert address is not None, line or process.communicate()[1]
        name, port = address[1], int(address[2])
        assert ask(port, "GET", "/v1/controllers").json["data"][0]["default"] == 2.0
        body = {"model": name, "messages": MESSAGES, "stream": True, "max_tokens": 200, "seed": 1}
        connection = ask(port, "POST", "/v1/chat/completions", body, whole=False)
        response = connection.getresponse()
        first = response.readline()
        process.send_signal(signal.SIGTERM)
        rest = (first + response.read()).decode()
        events = [json.loads(one.removeprefix("data: ")) for one in rest.splitlines() if one.startswith("data: {")]
        assert rest.rstrip().endswith("data: [DONE]")
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        output, log = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, log
    assert output == "Stopped.\n"
    *_, last = log.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d POST /v1/chat/completions 200 \d+\.\d\ds", last), log


def test_after_the_grace_time_clients_are_told(tmp_path: Path) -> None:
    service = Service(mlx_lqr.load(chat_folder(), backend="mlx"), tmp_path)
    service.close()
    service._engine = engine = ScriptedEngine()  # type: ignore[assignment]
    config = uvicorn.Config(application(service, Access()), log_config=None, lifespan="off")
    server = listen._Server(config, lambda: None, service.hurry, grace=0.2)
    with listen.bound("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        thread.start()
        soon(lambda: server.started)
        body = {"model": service.name, "messages": MESSAGES, "stream": True}
        connection = ask(port, "POST", "/v1/chat/completions", body, whole=False)
        engine.ticket()
        server.handle_exit(signal.SIGTERM, None)
        text = connection.getresponse().read().decode()
        thread.join(30)
    assert '"message":"the server is stopping"' in text
    assert text.endswith("data: [DONE]\n\n")
    assert not thread.is_alive()

"""A stand-in for the Hugging Face hub on this machine, as far as files go up and down: what its own client asks of it.

    with hub() as there: there.repos["me/dog"] = {"dog.safetensors": b"..."}

The client reads HF_ENDPOINT and the like when it is imported: a process of its own has them in its `environment`, this
one is `connected`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

TOKEN = "hf_of_this_test"


@dataclass
class Hub:
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files by name, of each repository"""
    private: dict[str, bool] = field(default_factory=dict)
    owners: tuple[str, ...] = ("me",)
    """Whose repositories the token may write"""
    requests: list[tuple[str, str]] = field(default_factory=list)
    address: str = ""

    def commit(self, repo: str) -> str:
        """Of what the repository holds now."""
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode(), usedforsecurity=False).hexdigest()

    def environment(self, home: Path, *, token: str | None = TOKEN, **others: str) -> dict[str, str]:
        """For a process whose hub this is, with a cache and a login of its own."""
        own = {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**own, **({"HF_TOKEN": token} if token is not None else {}), **others}

    def connected(
        self, home: Path, patch: pytest.MonkeyPatch, *, token: str | None = TOKEN, offline: bool = False
    ) -> None:
        """Make this the hub of this process, with a cache and a login of its own."""
        from huggingface_hub import constants

        for name, value in {
            "ENDPOINT": self.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_OFFLINE": offline,
            "HF_TOKEN_PATH": str(home / "token"),
        }.items():
            patch.setattr(constants, name, value)
        patch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            patch.setenv("HF_TOKEN", token)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self._begin()
        if path.startswith("/api/models/"):
            repo = path.removeprefix("/api/models/").partition("/revision")[0]
            if repo not in self.hub.repos:
                return self._missing("RepoNotFound")
            return self._json(
                {"id": repo, "sha": self.hub.commit(repo), "siblings": [{"rfilename": n} for n in self.hub.repos[repo]]}
            )
        repo, resolve, rest = path.lstrip("/").partition("/resolve/")
        files = self.hub.repos.get(repo)
        if not resolve or files is None:
            return self._missing("RepoNotFound")
        content = files.get(rest.partition("/")[2])
        if content is None:
            return self._missing("EntryNotFound")
        etag = hashlib.sha256(content).hexdigest()
        return self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": self.hub.commit(repo)})

    def do_POST(self) -> None:
        path = self._begin()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid username or password."}, 401)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] not in self.hub.owners:
                return self._json({"error": "You don't have the rights to create a model there"}, 403)
            if repo in self.hub.repos:
                return self._json({"error": "It exists", "url": f"{self.hub.address}/{repo}"}, 409)
            self.hub.repos[repo] = {}
            self.hub.private[repo] = asked.get("private") is True or asked.get("visibility") == "private"
            return self._json({"url": f"{self.hub.address}/{repo}", "name": repo})
        repo, _, action = path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        if repo not in self.hub.repos:
            return self._missing("RepoNotFound")
        if action == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]
            return self._json({"files": modes})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.hub.repos[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        commit = self.hub.commit(repo)
        url = f"{self.hub.address}/{repo}/commit/{commit}"
        return self._json({"commitUrl": url, "commitOid": commit, "success": True})

    def _begin(self) -> str:
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append((str(self.command), path))
        return path

    def _missing(self, code: str) -> None:
        self._answer(404, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def hub() -> Iterator[Hub]:
    there = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": there}))
    there.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield there
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

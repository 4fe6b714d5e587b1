"""A hub that accepts connections and never answers, and one on this machine that serves files."""

import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from huggingface_hub import constants

from lit_mm.model import hub


@pytest.fixture
def dead_hub(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "SECONDS", 1.0)
        hub.reachable.cache_clear()
        yield
        hub.reachable.cache_clear()


COMMITS = {"main": "1" * 40, "v1": "2" * 40}


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that a download uses: `files[commit]` is what a repository holds."""

    files: ClassVar[dict[str, dict[str, bytes]]] = {}
    asked: ClassVar[list[str]] = []
    broken: ClassVar[bool | int] = False
    """Whether connections end without an answer; a number: the status of every answer."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.asked.append(self.path)
        if self.broken is True:
            return
        if self.broken:
            self.send_error(self.broken)
            return
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"] and parts[2:4] == ["owner", "name"]:
            commit = COMMITS.get(parts[5] if len(parts) > 5 else "main", parts[-1])
            tree = [
                {"type": "file", "path": name, "size": len(own), "oid": "x"} for name, own in self.files[commit].items()
            ]
            told = (
                tree
                if "tree" in parts
                else {
                    "id": "owner/name",
                    "sha": commit,
                    "siblings": [{"rfilename": name} for name in self.files[commit]],
                }
            )
            self.reply(json.dumps(told).encode(), commit)
        elif parts[:3] == ["owner", "name", "resolve"]:
            commit = COMMITS.get(parts[3], parts[3])
            self.reply(self.files[commit]["/".join(parts[4:])], commit)
        else:
            self.reply(b"{}", "", 200 if self.path == "/" else 404)

    def reply(self, body: bytes, commit: str, status: int = 200):
        self.send_response(status)
        tag = hashlib.sha256(body).hexdigest()
        for name, value in {"ETag": f'"{tag}"', "X-Repo-Commit": commit, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object):
        """Nothing."""


@pytest.fixture
def own_hub(monkeypatch, tmp_path):
    """A hub with one repository, `owner/name`, and an empty cache."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        hub.reachable.cache_clear()
        Hub.asked.clear()
        Hub.broken = False
        yield Hub
        hub.reachable.cache_clear()
        server.shutdown()

"""A hub on loopback that the real client of huggingface_hub talks to."""

import hashlib
import http.server
import json
import socket
import threading
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import pytest


class FakeHub(http.server.BaseHTTPRequestHandler):
    """The few endpoints of the hub that a snapshot needs, over a directory of OWNER/NAME (datasets/OWNER/NAME).

    A branch or tag BRANCH of a repository is the directory OWNER/NAME@BRANCH, with a commit of its own.
    """

    protocol_version = "HTTP/1.1"
    root: Path
    sha = "0123456789abcdef0123456789abcdef01234567"
    asked: list[str]

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0].strip("/"))
        type(self).asked.append(path)
        parts = path.removeprefix("api/").removeprefix("models/").split("/")
        named = parts[:3] if parts[0] == "datasets" else parts[:2]
        repository, rest = self.root.joinpath(*named), parts[len(named) :]
        revision = rest[1] if len(rest) > 1 and rest[0] in ("revision", "tree", "resolve") else "main"
        sha, known = self.sha, revision in ("main", self.sha)
        for branch in repository.parent.glob(f"{repository.name}@*"):
            commit = hashlib.sha1(branch.name.encode()).hexdigest()
            if revision in (branch.name.partition("@")[2], commit):
                repository, sha, known = branch, commit, True
        if not repository.is_dir():
            self.reply(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif not known:
            self.reply(404, b"{}", X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        elif path.startswith("api/") and "tree" in rest:
            files = [f for f in repository.rglob("*") if f.is_file()]
            listing = [
                {
                    "type": "file",
                    "path": str(f.relative_to(repository)),
                    "size": f.stat().st_size,
                    "oid": f"id-{f.name}",
                }
                for f in files
            ]
            self.reply(200, json.dumps(listing).encode(), Content_Type="application/json")
        elif path.startswith("api/"):
            info = {"id": "/".join(named[-2:]), "sha": sha, "private": False, "siblings": [], "tags": []}
            self.reply(200, json.dumps(info).encode(), Content_Type="application/json")
        elif "gated" in repository.name:
            self.reply(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        else:  # .../resolve/REVISION/PATH
            body = repository.joinpath(*rest[2:]).read_bytes()
            self.reply(200, body, ETag=f'"{sha[:6]}-{"-".join(rest[2:])}"', X_Repo_Commit=sha)

    do_HEAD = do_GET  # noqa: N815 (its caller's name)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on loopback that the real client talks to, with an empty cache. Yields its handler class."""
    handler = type("Hub", (FakeHub,), {"root": tmp_path / "hub", "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    use_hub(monkeypatch, tmp_path, server.server_port)
    yield handler
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()


def use_hub(monkeypatch, tmp_path, port: int) -> None:
    """Let the client go online (conftest keeps it off), but to this port of loopback alone."""
    endpoint = f"http://127.0.0.1:{port}"
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()  # of an earlier test, with its proxies


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]

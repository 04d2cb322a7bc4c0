"""Answers of a judge server, kept on disk by what was asked: a line an answer, appended and never changed. No JAX.

A line is `{"key": SHA-256 of the request, "reply": the body as it came, "day": ...}`: verdicts are read from it anew
every time. Several processes may append to one file. Whoever is killed in the middle of a line leaves a torn one, which
the next to append closes and everybody passes over.
"""

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from dpo_jax.disk import digest
from dpo_jax.errors import UserError

_HEAD = re.compile(rb'\{"key": "([0-9a-f]{64})", "reply": ')


class AnswerFile:
    """The file of one address and model.

    Attributes:
      path: of the file.
      torn: lines that hold no answer.
    """

    def __init__(self, path: Path):
        self.path, self.torn = path, 0
        self._places: dict[str, tuple[int, ...]] = {}  # of lines, by key; of several the first sound one counts
        self._read = 0  # bytes that were looked at
        self._file: tuple[int, int] | None = None  # which file these are of

    def refresh(self) -> None:
        """Look at what was appended since, by whomever; at all of it if the file is another one by now.

        Raises:
          UserError: the file cannot be read.
        """
        with _using(self.path):
            there = os.stat(self.path) if self.path.exists() else None
            which = there and (there.st_dev, there.st_ino)
            if which != self._file or (there and there.st_size < self._read):
                self._places, self._read, self.torn, self._file = {}, 0, 0, which
            if there is None:
                return
            with self.path.open("rb") as file:
                file.seek(self._read)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # being written, or torn: looked at again
                    head = _HEAD.match(line)
                    if head and line.endswith(b"}\n"):
                        self._found(head[1].decode(), self._read)
                    else:
                        self.torn += 1
                    self._read += len(line)

    def get(self, key: str) -> str | None:
        """The body that answered a request; None if there is none."""
        for place in self._places.get(key, ()):
            with _using(self.path):
                if not self.path.exists():
                    return None
                with self.path.open("rb") as file:
                    file.seek(place)
                    line = file.readline()
            try:
                held = json.loads(line)
                if held["key"] == key and isinstance(held["reply"], str):
                    return held["reply"]
            except (ValueError, KeyError, TypeError):  # edited by hand, or the file is another one by now
                pass
        return None

    def put(self, key: str, reply: str) -> None:
        """Append an answer; it is with the system when this returns, so a killed process has lost none.

        Raises:
          UserError: the file cannot be written.
        """
        day = datetime.date.today().isoformat()
        held = json.dumps({"key": key, "reply": reply, "day": day}, ensure_ascii=False)
        line = f"{held}\n".encode(errors="replace")
        with _using(self.path), self.path.open("ab+", buffering=0) as file, _held(file.fileno()):
            end = file.seek(0, os.SEEK_END)
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":  # somebody was killed here
                file.write(b"\n")
                end += 1
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._found(key, end)

    def _found(self, key: str, place: int) -> None:
        places = self._places.get(key, ())
        if place not in places:
            self._places[key] = (*places, place)

    def settle(self) -> None:
        """Put what was written on disk."""
        with _using(self.path):
            if self.path.exists():
                with self.path.open("rb") as file:
                    os.fsync(file.fileno())


def answer_file(directory: Path, url: str, model: str) -> AnswerFile:
    """The file of this address and model in a directory, which is made.

    Raises:
      UserError: the directory cannot be written.
    """
    plain = re.sub(r"[^\w.-]+", "-", f"{url.partition('://')[2]}-{model}").strip("-.")[:80]
    path = directory / f"{plain}-{digest(json.dumps([url, model]), 6)}.jsonl"
    with _using(path):
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    return AnswerFile(path)


def request_key(url: str, body: Mapping[str, object]) -> str:
    """What tells a request from every other one: the SHA-256 of its address (without a key) and of its body."""
    return hashlib.sha256(json.dumps([url, body], sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _using(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        said = error.strerror or error
        raise UserError(f"{path}: answers cannot be kept ({said}); make room, or choose another cache_dir") from error


@contextlib.contextmanager
def _held(number: int) -> Iterator[None]:
    """Alone with the file; where the file system has no locks a single append is whole mostly, and else a torn line."""
    locked = True
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
    except OSError:
        locked = False
    try:
        yield
    finally:
        if locked:
            fcntl.flock(number, fcntl.LOCK_UN)

"""A door that breaks the rule in every way: `python -m tests.fuzz.faulty HOW`. It shows that the watch sees."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.cases import Case, Command, Place

# What it does, and by which word of `rule.KINDS` that is to be found; empty: by none.
WAYS = {
    "sleeps": "time",
    "computes": "time",
    "leaves-a-thread": "time",
    "hangs-on-a-fifo": "time",
    "allocates": "memory",
    "allocates-in-a-child": "memory",
    "writes-at-home": "touched",
    "removes-what-was-given": "touched",
    "changes-what-was-given": "touched",
    "makes-a-canary": "touched",
    "starts-a-shell": "touched",
    "raises": "traceback",
    "ends-with-3": "code",
    "ends-with-1": "code",
    "dies": "code",
    "says-nothing": "lines",
    "says-two-lines": "lines",
    "drives-the-terminal": "control",
    "does-not-say": "silent",
    "refuses": "",
    "writes-in-its-directories": "",
}


def cases() -> Iterator[Case]:
    for way in WAYS:
        yield Case(f"faulty/{way}/now", _prepare(way), says="a word" if way == "does-not-say" else "")


def _prepare(way: str):
    def prepare(place: Place) -> Command:
        (place.given / "given").write_text("as it was")
        os.mkfifo(place.given / "fifo")
        return Command("tests.fuzz.faulty", [way, str(place.root)])

    return prepare


def main(argv: list[str] | None = None) -> int:
    way, root = (sys.argv if argv is None else argv)[1:]
    place = Place(Path(root))
    if way == "sleeps":
        time.sleep(1000)
    elif way == "computes":
        while True:
            pass
    elif way == "leaves-a-thread":
        threading.Thread(target=time.sleep, args=(1000,)).start()
    elif way == "hangs-on-a-fifo":
        (place.given / "fifo").read_bytes()
    elif way == "allocates":
        _allocate()
    elif way == "allocates-in-a-child":
        if (pid := os.fork()) == 0:
            _allocate()
        os.waitpid(pid, 0)
    elif way == "writes-at-home":
        (place.home / "new").write_text("")
    elif way == "removes-what-was-given":
        (place.given / "given").unlink()
    elif way == "changes-what-was-given":
        os.close(os.open(place.given / "given", os.O_WRONLY | os.O_TRUNC))
    elif way == "makes-a-canary":
        os.system(f"touch {place.canary}")
    elif way == "starts-a-shell":
        subprocess.run(["true"], check=True)
    elif way == "raises":
        raise ValueError("a bug")
    elif way == "dies":
        os.kill(os.getpid(), 11)
    elif way.startswith("ends-with"):
        print("error: of an unknown kind", file=sys.stderr)
        return int(way[-1])
    elif way == "writes-in-its-directories":
        for directory in (place.work, place.cache, place.tmp):
            (directory / "new").write_text("")
    elif way != "says-nothing":
        said = {"says-two-lines": "error: x\nand more", "drives-the-terminal": "error: \x1b[2J"}
        print(said.get(way, "error: no"), file=sys.stderr)
    return 0 if way.startswith(("writes", "removes", "changes", "makes", "starts", "leaves", "does-not")) else 2


def _allocate() -> None:
    held = []
    while True:
        held.append(b"x" * (1 << 26))
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())

"""Start a case, watch its time and memory, and bring back what it printed and touched.

A door is called in a fork of this process, which has imported everything but started nothing: the same call as
`python -m` makes, without the seconds of importing. What ends it ends a process: it returns to the top of `__main__`
(`Child`), so that tracebacks, exit handlers and threads that do not end are those of a real one. `fresh` starts a real
one.
"""

import contextlib
import ctypes
import dataclasses
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.fuzz.cases import Case, Command, Place
from tests.fuzz.touched import report_writes, snapshot

SECONDS = 20
BYTES = 2 * 10**9
_LAST = 150  # seconds on the clock, for a machine that is busy with other things
_ROOM = 8 * 2**30  # of address space beyond what this process has: what a watch every 20 ms could miss
_POLL = 0.02


class Child(BaseException):
    """In the forked process: this door is to be called, at the very top of the program."""

    def __init__(self, command: Command):
        super().__init__()
        self.command = command


@dataclasses.dataclass(frozen=True)
class End:
    """How a case ended. `code` is -N for a signal; `slow` and `large` tell that it was killed for it."""

    code: int
    out: str
    err: str
    seconds: float
    peak: int
    slow: bool
    large: bool
    writes: tuple[str, ...]


@dataclasses.dataclass
class Running:
    """A case that was started."""

    case: Case
    place: Place
    pid: int
    before: dict[str, tuple[int, ...]]
    begun: float = dataclasses.field(default_factory=time.monotonic)
    spent: list[tuple[float, float, float]] = dataclasses.field(default_factory=list)  # clock, at work, in the queue
    peak: int = 0
    slow: bool = False
    large: bool = False


def start(case: Case, place: Place, *, fresh: bool = False) -> Running:
    """Make the case's input in its place and start it; in the forked process `Child` is raised."""
    place.make()
    command = case.prepare(place)
    before = snapshot(place)
    # The launcher, and what reads a terminal, is no door that could be called here.
    words = program(command) if fresh or command.module.startswith("/") else None
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            _enter(place, command)
            if words is not None:
                os.execve(words[0], words, dict(os.environ))
        except BaseException as error:
            os.write(2, f"the case could not be started: {error!r}\n".encode())
            os._exit(99)
        report_writes(place)
        raise Child(command)
    return Running(case, place, pid, before)


def program(command: Command) -> list[str | bytes]:
    """The words of a process of its own."""
    if command.module.startswith("/"):
        return [command.module, *command.arguments]
    return [sys.executable, "-m", command.module, *command.arguments]


def _enter(place: Place, command: Command) -> None:
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # it ends with this process
    (place.root / "stdin").write_bytes(command.stdin)
    for number, (name, flags) in enumerate(
        (("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY | os.O_CREAT), ("stderr", os.O_WRONLY | os.O_CREAT))
    ):
        file = os.open(place.root / name, flags, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.environ.update(place.environment())
    os.chdir(place.given)
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + _ROOM, own + _ROOM))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * 2**30, 4 * 2**30))
    resource.setrlimit(resource.RLIMIT_CPU, (_LAST, _LAST))


def ended(running: Running) -> End | None:
    """How it ended, or None while it runs; what takes too long or too much is killed."""
    pid, status, usage = os.wait4(running.pid, os.WNOHANG)
    if pid == 0:
        _watch(running)
        return None
    seconds = time.monotonic() - running.begun
    _kill_group(running.pid)  # what it left behind
    code = os.waitstatus_to_exitcode(status)
    read = lambda name: (running.place.root / name).read_bytes()[: 1 << 20].decode(errors="backslashreplace")
    writes = _reported(running.place) + _changed(running)
    peak = max(running.peak, usage.ru_maxrss * 1024)
    large = running.large or peak > BYTES
    return End(code, read("stdout"), read("stderr"), seconds, peak, running.slow, large, tuple(writes))


def _watch(running: Running) -> None:
    try:
        memory, worked, waited = _usage(running.pid)
    except (OSError, ValueError, IndexError):
        return  # it is about to end
    running.peak = max(running.peak, memory)
    running.large = running.peak > BYTES
    now = time.monotonic()
    if not running.spent or now - running.spent[-1][0] > 0.5:
        running.spent.append((now, worked, waited))
    running.slow = worked > SECONDS or now - running.begun > _LAST or _idles(running.spent)
    if running.slow or running.large:
        _kill_group(running.pid)


def _idles(spent: list[tuple[float, float, float]]) -> bool:
    """Whether it has done nothing for so long as a case may take, though it could have: the machine may be busy."""
    now, worked, waited = spent[-1]
    before = next((one for one in reversed(spent) if now - one[0] >= SECONDS), None)
    return before is not None and worked - before[1] < SECONDS / 20 and waited - before[2] < SECONDS / 2


def _usage(pid: int) -> tuple[int, float, float]:
    """Bytes in memory of a process and its children, their seconds at work, and its own in the processors' queue."""
    memory, worked, waited = 0, 0.0, 0.0
    for process in (pid, *_children(pid)):
        memory += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()
        ticks = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:15]
        worked += sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    for task in os.listdir(f"/proc/{pid}/task"):
        waited = max(waited, int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[1]) / 1e9)
    return memory, worked, waited


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _changed(running: Running) -> list[str]:
    after = snapshot(running.place)
    names = sorted(name for name in {*after, *running.before} if after.get(name) != running.before.get(name))
    return [f"changed {name}" for name in names]


def _reported(place: Place) -> list[str]:
    file = place.root / "writes"
    return sorted(set(file.read_text().splitlines())) if file.exists() else []


def available() -> bool:
    """Whether this system has what the watch needs."""
    return sys.platform == "linux" and Path("/proc/self/task").exists()


def _command_line(command: Command) -> str:
    words = [word if isinstance(word, str) else os.fsdecode(word) for word in program(command)]
    return subprocess.list2cmdline(words)

"""What a case touches outside of its own directories: by what Python opens, and by what is there afterwards."""

import os
import sys
import tempfile
from typing import Any

from tests import places
from tests.fuzz.cases import Place

# What the fork's own environment may write: programs that JAX keeps, devices, the system's view of the process itself.
_ANYWHERE = ("/dev/null", "/dev/shm/", "/dev/tty", "/proc/self/", "/proc/thread-self/")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Where the paths that an event changes stand among its arguments, and the directories' descriptors that they are below
# (CPython's table of audit events).
_CHANGES = {
    "os.mkdir": ((0, 2),),
    "os.rename": ((0, 2), (1, 3)),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.utime": ((0, 3),),
}
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.startfile")


def snapshot(place: Place) -> dict[str, tuple[int, ...]]:
    """What lies in a place outside of what may be written: mode, size and time of change by name."""
    found = {}
    for directory in (place.home, place.given):
        for at, directories, files in os.walk(directory):
            for name in (*directories, *files):
                path = os.path.join(at, name)
                state = os.lstat(path)
                size = 0 if os.path.isdir(path) else state.st_size
                found[os.fsencode(os.path.relpath(path, place.root)).decode(errors="backslashreplace")] = (
                    state.st_mode,
                    size,
                    0 if os.path.isdir(path) else state.st_mtime_ns,
                )
    for path in place.root.iterdir():
        if path.name not in ("home", "given", "work", "cache", "tmp", "stdin", "stdout", "stderr", "writes"):
            found[path.name] = (0,)
    return found


def _is_ours(arguments: tuple[Any, ...]) -> bool:
    """Whether a program that is started is Python on a file of the package, as chat templates are rendered."""
    given = next(iter(arguments[1:2]), ())  # of a shell there are no words
    words = [os.fspath(word) for word in given] if isinstance(given, list | tuple) else []
    own = str(places.ROOT / "dpo_jax") + os.sep
    return words[:1] == [sys.executable] and any(str(word).startswith(own) for word in words)


def report_writes(place: Place) -> None:
    """From here on whatever this process changes outside of its own directories is noted in the place's `writes`."""
    log = os.open(place.root / "writes", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    allowed = tuple(f"{directory}/" for directory in (place.work, place.cache, place.tmp))
    allowed += tuple(
        f"{os.environ[name].rstrip('/')}/" for name in ("JAX_COMPILATION_CACHE_DIR", "HF_HOME") if os.environ.get(name)
    )
    allowed += _ANYWHERE

    def note(event: str, path: Any, below: Any = None) -> None:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str):
            return
        if isinstance(below, int) and below >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{below}"), path)
        # Not resolved: a link in a directory of its own that leads elsewhere is found by the snapshot.
        whole = os.path.abspath(path)
        if not f"{whole}/".startswith(allowed):
            os.write(log, f"{event} {whole!a}\n".encode())

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = flags & _WRITING if isinstance(flags, int) else mode and any(c in "wax+" for c in mode)
            if writes:
                note(event, path)
        elif event in _CHANGES:
            for at, below in _CHANGES[event]:
                note(event, arguments[at], None if below is None else arguments[below])
        elif event in _STARTS and not _is_ours(arguments):
            os.write(log, f"{event} {arguments[:2]!a}\n"[:500].encode())

    tempfile.tempdir = str(place.tmp)
    sys.addaudithook(hear)

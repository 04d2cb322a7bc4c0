"""How every command ends: whatever ends it becomes a line on standard error and an exit code, within a limit in time.

Errors that are ours to mend, and only these, have a traceback and the code 1. The codes are in `errors`.
"""

import contextlib
import dataclasses
import errno
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from dpo_jax.disk import is_full
from dpo_jax.errors import BAD_INPUT, SAVE_FAILED, Stopped, UserError, escaped

# What a file system may refuse. A file that is not there where we look for it is more likely a mistake of ours.
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.EISDIR, errno.ENOTDIR, errno.ELOOP,
            errno.ENAMETOOLONG, errno.EFBIG, errno.ETXTBSY, errno.EMFILE, errno.ENFILE, errno.ENOTEMPTY, errno.EEXIST,
            errno.ENOTSUP, errno.EBUSY, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO)  # fmt: skip
# How long a process may take after its last line: threads of libraries wait for minutes for what will never come. Of
# several processes, which JAX lets wait for each other for five minutes before they end, those that have succeeded wait
# longer: the first one still writes the report.
LEAVE_SECONDS, LEAVE_SEVERAL_SECONDS = 10.0, 900.0


@dataclasses.dataclass
class EntryPoint:
    """What an entry point knows of itself, as soon as its command line is read.

    Attributes:
      place: where it writes, for an error of the file system that names no file.
      several: whether this is one process of several, which would wait for the others when it ends.
      needs_output: whether it ends when nothing more can be printed. Training does not: its records are in files.
      afterwards: what is said after an interruption and where a file system refused something.
    """

    place: Path | None = None
    several: bool = False
    needs_output: bool = True
    afterwards: str = "what is written stays, and the same command resumes it"


class OutputLostError(Exception):
    """Standard output takes nothing any more: its reader is gone (then `code` is 0), or its disk is full."""

    def __init__(self, error: OSError):
        super().__init__(f"standard output cannot be written ({error.strerror})")
        self.code = 0 if error.errno == errno.EPIPE else SAVE_FAILED


def run_entry_point(do: Callable[[EntryPoint], object]) -> int:
    """Run a command, which completes the `EntryPoint` that it is given.

    Returns:
      The exit code; the one line of whatever ended it is printed.
    """
    entry = EntryPoint()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on it is a line
    with _streams(entry):
        try:
            do(entry)
        except Stopped as stopped:
            print_error_line(f"stopped by {stopped.name}; everything is saved, the same command resumes the run")
            return 128 + stopped.signal
        except KeyboardInterrupt:
            print_error_line(f"interrupted; {entry.afterwards}")
            return 128 + signal.SIGINT
        except OutputLostError as error:
            if error.code:
                print_error_line(f"error: {error}; {entry.afterwards}")
            return error.code
        except UserError as error:
            print_error_line(f"error: {error}")
            full = error.__cause__ is not None and is_full(error.__cause__)
            return SAVE_FAILED if full and error.code == BAD_INPUT else error.code
        except Exception as error:
            # Of an output that is not ours to watch over; training has others, of libraries, and does not end so.
            if isinstance(error, BrokenPipeError) and entry.needs_output and not entry.several:
                return 0
            if line := _of_the_file_system(error, entry):
                print_error_line(f"error: {line}")
                return SAVE_FAILED
            if entry.several:
                from dpo_jax.parallel.processes import end_if_a_peer_is_gone

                end_if_a_peer_is_gone(error)
            raise
    return 0


def exit_within_a_limit(command: Callable[[], int]) -> NoReturn:
    """Run a command and end this process with its exit code: soon, whatever threads and libraries still wait for.

    After a failed save at once, where no other process hears of it: orbax's threads would wait for five minutes, and
    then complain of what nobody awaited.
    """
    try:
        code = command()
    except Exception:
        _begin_to_end(1)  # the traceback is printed first
        raise
    _begin_to_end(code)
    sys.exit(code)


def _begin_to_end(code: int) -> None:
    distributed = getattr(sys.modules.get("jax"), "distributed", None)
    joined = distributed is not None and distributed.is_initialized()
    seconds = LEAVE_SEVERAL_SECONDS if joined and code == 0 else LEAVE_SECONDS

    def end() -> None:
        if joined or code != SAVE_FAILED:
            time.sleep(seconds)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)

    if code == SAVE_FAILED and not joined:
        end()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C now needs no traceback of what waits
    threading.Thread(target=end, name="exit", daemon=True).start()


def print_error_line(line: str) -> None:
    """Print one line on standard error, whatever the words of others that are in it hold; never an error itself."""
    with contextlib.suppress(OSError, ValueError):
        print(escaped(" ".join(line.splitlines())), file=sys.stderr, flush=True)


def _of_the_file_system(error: Exception, entry: EntryPoint) -> str:
    """The line for what a file system refused; empty: the error is something else."""
    if not isinstance(error, OSError) or isinstance(error, ConnectionError | TimeoutError):
        return ""
    named = error.filename2 if isinstance(error.filename2, str | bytes) and error.filename2 else error.filename
    file = os.fsdecode(named) if isinstance(named, str | bytes | os.PathLike) else ""
    inside = bool(file and entry.place) and Path(file).absolute().is_relative_to(Path(str(entry.place)).absolute())
    if is_full(error):
        mend = "make room"
    elif error.errno in _REFUSED or (inside and error.errno == errno.ENOENT):
        mend = "make it writable" if error.errno != errno.ENOENT else "leave it there"
    else:
        return ""
    return f"{file or entry.place or 'a file'}: {error.strerror}; {mend}; {entry.afterwards}"


@contextlib.contextmanager
def _streams(entry: EntryPoint) -> Iterator[None]:
    """Standard output and error are watched over in here, where they are this process's own."""
    own = [name for name in ("stdout", "stderr") if _is_own(getattr(sys, name), getattr(sys, f"__{name}__"))]
    before = {name: getattr(sys, name) for name in own}
    for name in own:
        setattr(sys, name, _watched(before[name], name, entry))
    try:
        yield
    finally:
        for name in own:
            with contextlib.suppress(OutputLostError):
                getattr(sys, name).flush()
            setattr(sys, name, before[name])


def _is_own(stream: Any, first: Any) -> bool:
    """Whether a stream is the one that Python opened, not a notebook's or a test's."""
    try:
        return stream is first and stream.fileno() in (1, 2)
    except (AttributeError, OSError, ValueError):
        return False


def _watched(stream: TextIO, name: str, entry: EntryPoint) -> TextIO:
    stream.flush()
    raw = _Output(stream.fileno(), name, entry)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=stream.encoding, errors="backslashreplace", line_buffering=True
    )


class _Output(io.FileIO):
    """A standard stream whose reader may go away and whose disk may be full; from then on it writes to nowhere."""

    def __init__(self, descriptor: int, name: str, entry: EntryPoint):
        super().__init__(descriptor, "wb", closefd=False)
        self._called, self._entry = name, entry

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if self._called == "stdout":
                if self._entry.needs_output:
                    raise OutputLostError(error) from None
                what = "nobody reads standard output any more" if error.errno == errno.EPIPE else (
                    f"standard output cannot be written ({error.strerror})"
                )  # fmt: skip
                print_error_line(f"warning: {what}; this continues without it, and its records are in files")
            return len(data)

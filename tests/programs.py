"""The package's programs as processes that begin in a moment.

Most of a short run's start is importing JAX and what stands on it. Here one process of a test session has done that
(multiprocessing's fork server), and every program is forked from it: a process of its own, with its own backend,
environment, pipes and signals, which goes on as `python -m dpo_jax.train ...` would. How long a real start takes, and
what it imports, is what tests/config/test_start_up.py and tests/test_entry.py look at, with real ones.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection

PIPE, DEVNULL, STDOUT = subprocess.PIPE, subprocess.DEVNULL, subprocess.STDOUT
# Names in the environment that are read when modules are imported, so that they must be as they were then; of these the
# second ones are not.
AT_IMPORT = ("JAX_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TF_", "PYTHON", "LD_", "OMP_")
LATER = ("JAX_COORDINATOR_", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "PYTHONPATH")

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["tests.preloaded"])
_first: dict[str, str] = {}  # the environment that the fork server has


def can_be_forked(command, env):
    """Whether a process with this environment can be forked from one that has imported everything before."""
    _first.update({} if _first else os.environ)
    differ = {name for name in _first.keys() | env.keys() if _first.get(name) != env.get(name)}
    return (
        command[:1] == [sys.executable]
        and command[1:2] in (["-m"], ["-c"])
        and not any(name.startswith(AT_IMPORT) and not name.startswith(LATER) for name in differ)
    )


class Program:
    """A process, with what tests need of `subprocess.Popen`; text only."""

    def __init__(self, command, env=None, stdout=None, stderr=None):
        self.args, env = list(map(str, command)), dict(os.environ if env is None else env)
        given, self.stdout, self.stderr, self._kept = {}, None, None, {}
        for name, kind in (("stdout", stdout), ("stderr", stderr)):
            if kind == PIPE:
                read, write = os.pipe()
                setattr(self, name, os.fdopen(read, encoding="utf-8", errors="replace"))
                given[name] = Connection(write, readable=False)
            else:
                given[name] = {None: "same", DEVNULL: "none", STDOUT: "stdout"}[kind]
        self._process = FORKING.Process(target=_become, args=(self.args, env, given["stdout"], given["stderr"]))
        self._process.start()
        self.pid = self._process.pid
        for end in given.values():
            if isinstance(end, Connection):
                end.close()
        self._readers = []

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self._process.terminate()

    def kill(self):
        if self.poll() is None:
            self._process.kill()

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode

    def communicate(self, timeout=None):
        """Read both pipes to their ends; returns what came on each, None of one that is no pipe."""
        deadline = None if timeout is None else time.monotonic() + timeout
        left = lambda: None if deadline is None else max(0.0, deadline - time.monotonic())
        if not self._readers:
            for name in ("stdout", "stderr"):
                if getattr(self, name) is not None:
                    reader = threading.Thread(target=self._read, args=(name,), daemon=True)
                    reader.start()
                    self._readers.append(reader)
        for reader in self._readers:
            reader.join(left())
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout, self._kept.get("stdout"))
        self.wait(left())
        return self._kept.get("stdout"), self._kept.get("stderr")

    def _read(self, name):
        self._kept[name] = ""
        with contextlib.suppress(ValueError), getattr(self, name) as pipe:  # it may be closed
            for text in iter(lambda: pipe.read(1 << 16), ""):
                self._kept[name] += text

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for pipe in (self.stdout, self.stderr):
            if pipe is not None:
                pipe.close()
        self._process.join()


def begin(command, env=None, *, stdout=None, stderr=None):
    """Start a program: forked where that is the same, else as any other process."""
    kinds = {"stdout": stdout, "stderr": stderr}
    if can_be_forked(command, os.environ if env is None else env):
        return Program(command, env, **kinds)
    return subprocess.Popen(command, env=env, text=True, **kinds)


def run(command, env=None, *, stdout=None, stderr=None, capture_output=False, timeout=None, check=False):
    """What `subprocess.run` does, of a program that `begin` starts; text only."""
    kinds = {"stdout": PIPE, "stderr": PIPE} if capture_output else {"stdout": stdout, "stderr": stderr}
    with begin(command, env, **kinds) as process:
        try:
            out, err = process.communicate(timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def _become(command, env, stdout, stderr):
    """Of the forked process: be this command, to the end of its interpreter."""
    for number, end in ((1, stdout), (2, stderr)):
        if isinstance(end, Connection):
            os.dup2(end.fileno(), number)
            end.close()
        elif end == "none":
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), number)
        elif end == "stdout":
            os.dup2(1, 2)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(
        2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1
    )
    os.environ.clear()
    os.environ.update(env)
    end_as_a_process(lambda: _run(command[1:]))


def _run(arguments):
    kind, what, *rest = arguments
    sys.argv = [what if kind == "-m" else "-c", *rest]
    if kind == "-m":
        sys.path.insert(0, os.getcwd())
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, "")
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})


def end_as_a_process(program):
    """Of a forked process: run a program, do what an interpreter does at its end, and exit.

    But for taking its modules apart, which is most of the time of a short fork: every page is copied to be forgotten.
    """
    code = 0
    try:
        program()
    except SystemExit as end:
        code = end.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit((code or 0) & 255)

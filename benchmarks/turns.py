"""Trainers that take turns: `compare.py`'s side of `gate.py`, and the environments that the peers run in."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Record = dict[str, Any]


class Failed(Exception):  # noqa: N818 - an answer, not a bug
    """A trainer ended before its time; the text says where to look."""


class Worker:
    """A trainer in a process of its own, let through its gate one step at a time; a context manager.

    Args:
      command: what to run; `--gate IN,OUT` is put behind the module's name.
      log: where its output goes.
    """

    def __init__(self, command: Sequence[str], log: Path):
        self._log = log
        come, there = os.pipe()
        here, go = os.pipe()
        env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
        env |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        command = [*command[:3], "--gate", f"{here},{there}", *command[3:]]
        with log.open("w") as f:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=f, stderr=subprocess.STDOUT, pass_fds=(here, there)
            )
        os.close(here)
        os.close(there)
        self._come, self._go = os.fdopen(come), os.fdopen(go, "w")

    def wait(self) -> Record:
        """What it tells at its gate: `seconds` and `peak_gb`, and what the step before logged."""
        line = self._come.readline()
        if not line:
            code = self._process.wait()
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise Failed(f"{self._log.stem} ended with {code}; the end of {self._log}:\n{tail}")
        return json.loads(line)

    def step(self, told: str = "go") -> Record:
        """Let it through, tell it a line, and wait until it is back."""
        with contextlib.suppress(BrokenPipeError):  # `wait` says why
            print(told, file=self._go, flush=True)
        return self.wait()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self._go, self._come):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def find_python(at_least: tuple[int, int]) -> str:
    """A Python of that version or newer: this one, one on the path, or one of pyenv's.

    Raises:
      Failed: there is none.
    """
    if sys.version_info >= at_least:
        return sys.executable
    names = [f"python3.{minor}" for minor in range(at_least[1], at_least[1] + 3)]
    kept = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/*/bin/python3"))
    test = f"import sys; sys.exit(sys.version_info < {at_least})"
    for candidate in [*filter(None, map(shutil.which, names)), *map(str, kept)]:
        if subprocess.run([candidate, "-c", test], capture_output=True, check=False).returncode == 0:
            return candidate
    raise Failed(f"needs Python {'.'.join(map(str, at_least))} or newer, and none was found; put one on the PATH")


def make_environment(directory: Path, requirements: Sequence[str], find: Callable[[], str]) -> str:
    """A virtual environment with the requirements; the path of its Python (a link: not to be resolved)."""
    python = directory / "bin" / "python"
    if not python.exists():
        print(f"installing {' '.join(requirements)} into {directory}", flush=True)
        subprocess.run([find(), "-m", "venv", str(directory)], check=True)
        try:
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *requirements], check=True)
        except subprocess.CalledProcessError as e:
            shutil.rmtree(directory)
            raise Failed(f"pip install {' '.join(requirements)} ended with {e.returncode}") from None
    return os.path.abspath(python)


def versions(python: str, names: Sequence[str]) -> dict[str, str]:
    """Of Python and packages in an environment."""
    code = "import json, platform, sys; from importlib.metadata import version; "
    code += "print(json.dumps({'python': platform.python_version()} | {n: version(n) for n in sys.argv[1:]}))"
    done = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)

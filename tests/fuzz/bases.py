"""What cases are made of and is dear to make: a finished run of the smallest model, and its cache of pairs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests import places
from tests.fuzz.cases import Place, train

BASE = Path()  # set by `__main__`


def run() -> Path:
    return BASE / "finished/work/run"


def cache() -> Path:
    return BASE / "finished/cache"


def build() -> None:
    """Train it, unless it is there."""
    place = Place(BASE / "finished")
    if (run() / "report.html").exists():
        return
    place.remove()
    place.make()
    command = train(place)
    environment = os.environ | place.environment()
    words = [sys.executable, "-m", command.module, *command.arguments]
    done = subprocess.run(words, env=environment, capture_output=True)
    if done.returncode:
        raise SystemExit(f"the run that cases are made of failed:\n{done.stderr.decode()}")


def copy_run(place: Place) -> Path:
    """The finished run and its cache as a case's own; returns its directory."""
    shutil.copytree(cache(), place.cache, dirs_exist_ok=True)
    return Path(shutil.copytree(run(), place.work / "run"))


def launch_repository() -> Path:
    """The launcher and the configs in a repository of one commit, made once."""
    path = BASE / "launched"
    if not (path / ".git/refs/heads").exists():
        for name in ("launch", "configs"):
            shutil.copytree(places.ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(places.ROOT / "launch_tpu.sh", path)
        git = ["git", "-c", "user.name=T", "-c", "user.email=t@example.com"]
        for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a commit"]):
            subprocess.run([*git, *words], cwd=path, check=True)
    return path

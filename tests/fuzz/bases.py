"""What cases are made of and is dear to make: finished runs of the smallest model, and their cache of pairs."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import places
from tests.fakes.bucket import BUCKET, Objects, served
from tests.fuzz.cases import Place, train

BASE = Path()  # set by `__main__`
OBJECTS = Objects("")  # of the emulated bucket, once it is served


def run() -> Path:
    return BASE / "finished/work/run"


def cache() -> Path:
    return BASE / "finished/cache"


def bucket_run() -> Path:
    """The objects of a run that was made in a bucket, as files."""
    return BASE / "in-bucket"


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


def build_in_bucket(until_end: contextlib.ExitStack) -> None:
    """Serve a bucket until the end, and train the run in it, unless there is one of an earlier call.

    Where the emulator is not installed, that is said, and there is no bucket.
    """
    global OBJECTS
    try:
        OBJECTS = until_end.enter_context(served(BASE))
    except pytest.skip.Exception as missing:
        print(f"no cases of the kind bucket: {missing}")
        return
    os.environ["STORAGE_EMULATOR_HOST"] = OBJECTS.direct
    if (bucket_run() / "report.html").exists():
        return
    command = train(Place(BASE / "finished"), workdir=f"gs://{BUCKET}/finished/run")
    environment = os.environ | {"DPO_JAX_CACHE": str(cache())}
    done = subprocess.run(
        [sys.executable, "-m", command.module, *command.arguments], env=environment, capture_output=True
    )
    if done.returncode:
        raise SystemExit(f"the run in a bucket that cases are made of failed:\n{done.stderr.decode()}")
    OBJECTS.get_tree("finished/run", bucket_run())


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

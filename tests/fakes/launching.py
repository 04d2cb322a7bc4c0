"""A fake project for the tests of launch_tpu.sh: gcloud, the workers' tools and a repository to launch from.

What the launcher sends to the workers is executed for real (quoting, locks, tmux, exit codes, logs) in directories that
stand for their homes; only gcloud, uv, gcsfuse, sudo and the trainer are small stand-ins. `world.json` says what
happens:

  slices    what `create` makes, one after the other. `request` and `node` are lists of states: an answer takes the
            first, the last one stays. Or `refuse`: what `create` complains about.
  current   a slice that exists already.
  workers   how many a slice has.
  trainers  what the runs do, one after the other: see `trainer.py`.
  faults    what becomes of the first ssh with that `verb`: `cut_after` so many bytes, then the command `again` or not.
  deaf      how many questions gcloud cannot answer.
  silent    verbs (of gcloud, or of what goes over ssh) at which gcloud never says anything again, nor ends.
  said      by verb, what the workers answer in place of the truth.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests import places

ROOT = places.ROOT
SLICE = ["--name=hhh", "--zone=us-east5-b"]
RUN = [*SLICE, "--type=v6e-8", "--config=configs/hhh.py", "--workdir=gs://bucket/runs/hhh"]
FAST = ["--backoff=0", "--poll=0", "--settle=0"]
ACTIVE = {"request": ["ACTIVE"]}
# Bash cannot trap a signal that it was started to ignore, as all below a shell's background job ignores Ctrl-C.
HEARS_CTRL_C = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
TOOLS = {
    "gcloud": 'exec {python} -S -E {tests}/fakes/gcloud.py "$@"',
    "hostname": "echo t1v-n-w-$FAKE_WORKER",
    # A new machine has neither uv nor gcsfuse; they come by curl and by apt-get.
    "curl": 'case "$*" in\n'
    '*astral.sh*) echo "mkdir -p ~/.local/bin; cp {root}/later/uv ~/.local/bin/";;\n*) echo KEY;; esac',
    "lsb_release": "echo jammy",
    "sudo": 'if [ "$1" = tee ]; then exec cat; fi\n'
    'echo "$*" >>~/sudo.log; case "$*" in *" install "*gcsfuse) cp {root}/later/gcsfuse ~/.local/bin/;; esac',
    "mountpoint": 'test -L "$2"',
}
LATER = {
    "uv": """
flock -n ~/.dpo_jax/lock true && lock=free || lock=held
printf '%s|' "$PWD" "$lock" "$@" >>~/uv.log; echo >>~/uv.log
case $1 in
  venv) mkdir -p "${{@: -1}}/bin"; cp {root}/later/python "${{@: -1}}/bin/python";;
  pip) [ ! -e {root}/slow ] || sleep 0.5
    [ "$2" = freeze ] || ! [ -e {root}/broken ] || {{ echo "no solution" >&2; exit 1; }};;
esac""",
    "gcsfuse": 'echo "$*" >>~/gcsfuse.log; bucket=${{@: -2:1}} point=${{@: -1}}\n'
    'mkdir -p {root}/buckets/$bucket; rmdir "$point"; ln -s {root}/buckets/$bucket "$point"',
    "python": 'exec env PYTHONPATH={tests}/fakes {python} -S {tests}/fakes/trainer.py "$@"',
}


@dataclasses.dataclass(frozen=True)
class Cloud:
    """`root` holds the world, the workers and the buckets; `repo` is what is launched from."""

    root: Path
    repo: Path
    started: list[subprocess.Popen] = dataclasses.field(default_factory=list)

    def world(self, **changes):
        """Write what happens: the slices that `create` makes one after the other, the trainers that start on them."""
        state = {"current": None, "slices": [], "workers": 1, "faults": [], "trainers": [], "deaf": 0}
        state |= {"silent": [], "said": {}} | changes
        (self.root / "world.json").write_text(json.dumps(state))

    def start(self, *words, stdout=subprocess.PIPE, **environment):
        plain = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "WANDB_API_KEY", "CLOUDSDK_COMPUTE_ZONE")}
        env = plain | {"PATH": f"{self.root}/tools:{plain['PATH']}", "FAKE_CLOUD": str(self.root)} | environment
        command = [sys.executable, "-SEc", HEARS_CTRL_C, self.repo / "launch_tpu.sh", *words]
        pipes = {"stdout": stdout, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        self.started.append(subprocess.Popen(command, env=env, start_new_session=True, **pipes))
        return self.started[-1]

    def end(self):
        """End what a test left running, as one that failed does: the launchers, then the runs on the workers."""
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for file in self.root.glob("worker-*/.dpo_jax/runs/*/pid"):
            for name in ("main", "pid"):
                with contextlib.suppress(OSError, ValueError):
                    os.kill(int((file.parent / name).read_text()), signal.SIGKILL)
        for process in self.started:
            process.communicate(timeout=60)

    def launch(self, *words, code=0, **environment):
        """Run the launcher to its end; it must exit with `code`. Returns standard output and standard error."""
        process = self.start(*words, **environment)
        out, err = (text.decode() for text in process.communicate(timeout=300))
        assert process.returncode == code, out + err
        return out, err

    def calls(self, *words):
        """The recorded calls of gcloud, those whose words after `compute tpus` begin so."""
        every = [call[2:] for call in self._records("calls.jsonl")]
        return [call for call in every if call[: len(words)] == list(words)]

    def trained(self):
        """What the trainers that started were given, in order."""
        return self._records("trained.jsonl")

    def _records(self, name):
        """The lines of a file that may be written to: the last one counts when it is whole."""
        file = self.root / name
        return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []

    def pid(self, name="pid", worker=0):
        """The process of the run on a worker (`main` is its parent), once it is written there."""
        file = self.home(worker) / ".dpo_jax/run" / name
        wait_for(lambda: file.exists() and file.read_text().endswith("\n"))
        return int(file.read_text())

    def home(self, worker=0):
        return self.root / f"worker-{worker}"

    def count(self, verb):
        return len(self.calls("queued-resources", verb))


@pytest.fixture(scope="session")
def launch_repo(tmp_path_factory):
    """The launcher and the configs in a repository of one commit."""
    missing = [tool for tool in ("bash", "flock", "git", "setsid") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    path = tmp_path_factory.mktemp("repo")
    for name in ("launch", "configs"):
        shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "launch_tpu.sh", path)
    git(path, "init", "-q")
    commit(path)
    return path


def git(path, *words):
    return subprocess.run(["git", *words], cwd=path, check=True, capture_output=True, text=True).stdout.strip()


def commit(path):
    git(path, "add", ".")
    git(path, "-c", "user.name=T", "-c", "user.email=t@example.com", "commit", "-q", "-m", "a commit")


def sha_of(path):
    return git(path, "rev-parse", "HEAD")


@pytest.fixture
def cloud(launch_repo):
    root = Path(tempfile.mkdtemp(prefix="launch"))  # short: a socket's path has at most 108 bytes
    tools = (
        TOOLS
        if shutil.which("tmux", path="/usr/bin:/bin")
        else TOOLS | {"tmux": 'setsid bash -c "${{@: -1}}" >/dev/null 2>&1 </dev/null &'}
    )
    for place, scripts in (("tools", tools), ("later", LATER)):
        (root / place).mkdir()
        for name, script in scripts.items():
            text = script.format(python=sys.executable, tests=ROOT / "tests", root=root)
            (root / place / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (root / place / name).chmod(0o755)
    cloud = Cloud(root, launch_repo)
    yield cloud
    cloud.end()
    shutil.rmtree(root, ignore_errors=True)


def wait_for(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within 30 s")


def steps(out):
    return [int(n) for n in re.findall(r"^step (\d+)\ttab and  spaces ä$", out, re.M)]

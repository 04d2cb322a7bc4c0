"""A run in an emulated bucket: killed three times, in a storm, and in the end like one that was never stopped."""

import json
import os
import re
import signal
import sys
import threading

import pytest

from dpo_jax.bucket.path import as_path
from dpo_jax.errors import UserError
from dpo_jax.records.records import read_records
from dpo_jax.report.command import main as report
from dpo_jax.training.workdir import locked
from tests import processes, programs
from tests.end_to_end.test_train import CLOCK, SETTINGS, SMALL

pytestmark = pytest.mark.slow

CHANGED = SETTINGS | SMALL | {"num_steps": 8, "checkpoint_every": 3, "eval_every": 4, "kl_prompts": 0}


def command(workdir, **changed):
    keys = [f"--config.{key}={value}" for key, value in (CHANGED | changed).items()]
    return [sys.executable, "-m", "dpo_jax.train", "--config=configs/hhh.py:tiny", f"--workdir={workdir}", *keys]


def values(workdir, name="metrics.jsonl"):
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in read_records(workdir / name)]


@pytest.fixture
def environment(bucket):
    return processes.quick_to_compile() | bucket.environment | {"DPO_JAX_CACHE": os.environ["DPO_JAX_CACHE"]}


def killed_at(bucket, environment, arguments, ends, times=1, meanwhile=lambda: None):
    """Start the run and kill it before an object whose key ends so is written the nth time; `meanwhile` comes first."""
    reached, left = threading.Event(), [times]

    def fault(method, key):
        if method in ("POST", "PUT") and key.endswith(ends):
            left[0] -= 1
            if left[0] <= 0:
                reached.set()
                return 60.0  # it is not passed on before the process is gone
        return None

    bucket.fault = fault
    process = programs.begin(arguments, environment, stdout=programs.DEVNULL, stderr=programs.PIPE)
    try:
        for _ in range(2000):
            if reached.wait(0.1) or process.poll() is not None:
                break
        assert process.poll() is None, process.stderr.read()
        assert reached.is_set()
        meanwhile()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        bucket.calm()


def test_killed_three_times_and_gone_on_is_never_stopped(bucket, environment, tmp_path, capsys):
    whole, run = tmp_path / "whole", as_path("gs://bucket/e2e/run")
    local = programs.run(command(whole), environment, capture_output=True, timeout=400)
    assert local.returncode == 0, local.stderr

    def second_start():
        with pytest.raises(UserError, match="workdir gs://bucket/e2e/run is in use by process"), locked(run):
            pass

    # Before its first checkpoint counts; with records after the checkpoint; in the middle of the export.
    killed_at(bucket, environment, command(run), "checkpoints/3/commit_success.txt", meanwhile=second_start)
    assert not (run / "checkpoints/3/commit_success.txt").exists()
    killed_at(bucket, environment, command(run), "checkpoints/7/checksums.json")
    assert (run / "checkpoints/4/commit_success.txt").exists()
    killed_at(bucket, environment, command(run), "export/model.safetensors")
    assert not (run / "export/config.json").exists()
    bucket.storm(seed=5, share=0.05)
    done = programs.run(command(run), environment, capture_output=True, timeout=400)
    bucket.calm()
    assert done.returncode == 0, done.stderr
    # The last one was under way while the export was: it may have been cut off, too.
    assert re.search(r"resuming from checkpoint 1[02]\b", done.stdout)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert values(run, name) == values(whole, name)
    names = {p.name for p in (whole / "export").iterdir()}
    assert {p.name for p in (run / "export").iterdir()} == names
    for name in names - {"README.md"}:
        assert (run / "export" / name).read_bytes() == (whole / "export" / name).read_bytes(), name
    files = lambda at: {p.name for p in at.iterdir()}
    only_local = {".lock", "metrics.jsonl", "samples.jsonl"}
    assert files(run) == files(whole) - only_local | {f"{name}.parts" for name in ("metrics.jsonl", "samples.jsonl")}
    assert files(run / "checkpoints") == files(whole / "checkpoints")
    assert not os.path.exists("gs:")

    page = tmp_path / "page.html"
    assert report([str(run), f"--out={page}"]) == 0
    assert report([str(whole), f"--out={tmp_path / 'local.html'}"]) == 0
    assert page.read_text().count("<svg") == (tmp_path / "local.html").read_text().count("<svg")
    assert report([str(run)]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    assert json.loads(bucket.get("e2e/run/config.json"))["batch_size"] == 8

"""The command as a user starts it: killed at any time and started again, and as several processes."""

import json
import signal
import sys
import time

import pytest

from tests import processes, programs
from tests.places import GOLDEN

pytestmark = pytest.mark.slow

COUNT = 48


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "prompts.jsonl"
    words = ["good", "more of it", "tell me of the sea", "what is it that you like about a day"]
    path.write_text("".join(json.dumps({"prompt": f"{words[i % 4]} {i}"}) + "\n" for i in range(COUNT)))
    return path


def command(rows, out, *more):
    return [
        sys.executable,
        "-m",
        "dpo_jax.collect",
        f"--policy={GOLDEN / 'trl/tiny'}",
        f"--prompts={rows}",
        f"--out={out}",
        "--judge=tests.collecting.judges:e_count",
        "--n=3",
        "--max_tokens=24",
        "--mode=all",
        "--keep_unfinished",
        "--rows=2",
        *more,
    ]  # fmt: skip  (blocks of six prompts)


def test_killed_at_any_time_the_file_ends_byte_for_byte_the_same(rows):
    whole, out = (rows.with_name(f"{name}.jsonl") for name in ("whole", "killed"))
    programs.run(command(rows, whole), processes.with_devices(1), check=True, timeout=300, stdout=programs.DEVNULL)
    for lines in (5, 30):  # tests/collecting/test_command.py stops before the first and within every block
        process = programs.begin(
            command(rows, out), processes.with_devices(1), stderr=programs.PIPE, stdout=programs.PIPE
        )
        begun = out.with_name("killed.jsonl.about.json")
        while process.poll() is None and not (begun.exists() and out.read_bytes().count(b"\n") > lines):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was to be killed before its end"
    programs.run(command(rows, out), processes.with_devices(1), check=True, timeout=300, stdout=programs.DEVNULL)
    assert whole.read_bytes().count(b"\n") > 40
    assert out.read_bytes() == whole.read_bytes()


def test_two_processes_write_what_one_writes(rows):
    outs = [rows.with_name(f"{name}.jsonl") for name in ("one", "two")]
    few = "--limit=8"
    programs.run(
        command(rows, outs[0], few), processes.with_devices(2), check=True, timeout=300, stdout=programs.DEVNULL
    )
    processes.end(processes.start([command(rows, outs[1], few)] * 2, processes.with_devices(1)), [0, 0])
    assert outs[0].read_bytes()
    assert outs[1].read_bytes() == outs[0].read_bytes()
    printed = processes.end(processes.start([command(rows, outs[1], few)] * 2, processes.with_devices(1)), [0, 0])
    assert "finished; --overwrite" in printed[0]
    assert "finished" not in printed[1]

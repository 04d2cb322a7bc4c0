"""The command as a user starts it: killed at any time and started again, and as several processes."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests import processes
from tests.places import GOLDEN

pytestmark = pytest.mark.slow

MODEL = GOLDEN / "trl/tiny"
COUNT = 40


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "prompts.jsonl"
    words = ["good", "more of it", "tell me of the sea", "what is it that you like about a day"]
    rows = [{"prompt": f"{words[i % 4]} {i}"} | ({"id": f"row {i}"} if i % 3 else {}) for i in range(COUNT)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(rows, out, *more):
    return [
        sys.executable,
        "-m",
        "dpo_jax.sample",
        f"--model={MODEL}",
        f"--prompts={rows}",
        f"--out={out}",
        "--n=2",
        "--max_tokens=48",
        "--logprobs",
        "--rows=2",
        *more,
    ]  # fmt: skip  (blocks of eight prompts)


@pytest.fixture(scope="module")
def whole(rows):
    out = rows.with_name("whole.jsonl")
    subprocess.run(command(rows, out), env=processes.with_devices(1), check=True, timeout=300)
    assert out.read_bytes().count(b"\n") == COUNT
    return out


def test_killed_at_any_time_the_file_ends_byte_for_byte_the_same(rows, whole):
    out = rows.with_name("killed.jsonl")
    for lines in (0, 3, 8, 21, 30):  # before the first, within a block, at its end
        process = subprocess.Popen(command(rows, out), env=processes.with_devices(1), stderr=subprocess.PIPE)
        begun = out.with_name("killed.jsonl.about.json")
        while process.poll() is None and not (begun.exists() and out.read_bytes().count(b"\n") >= lines):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was to be killed before its end"
        with out.open("r+b") as file:  # as a kill in the middle of a write would leave it
            file.truncate(max(0, out.stat().st_size - lines % 5))
    subprocess.run(command(rows, out), env=processes.with_devices(1), check=True, timeout=300)
    assert out.read_bytes() == whole.read_bytes()


def test_a_second_command_on_the_same_file_is_refused(rows):
    out = rows.with_name("held.jsonl")
    process = subprocess.Popen(command(rows, out), env=processes.with_devices(1), stderr=subprocess.PIPE)
    while process.poll() is None and not out.exists():
        time.sleep(0.01)
    second = subprocess.run(
        command(rows, out), env=processes.with_devices(1), capture_output=True, text=True, check=False
    )
    process.kill()
    process.communicate()
    assert second.returncode == 2
    assert "in use by another command" in second.stderr


def test_two_processes_write_what_one_writes(rows):
    outs = [rows.with_name(f"{name}.jsonl") for name in ("one", "two")]
    few = "--limit=6"
    subprocess.run(command(rows, outs[0], few), env=processes.with_devices(2), check=True, timeout=300)
    processes.end(processes.start([command(rows, outs[1], few)] * 2, processes.with_devices(1)), [0, 0])
    one, two = ([json.loads(line) for line in out.read_text().splitlines()] for out in outs)
    tokens = lambda lines: [[answer["token_ids"] for answer in line["answers"]] for line in lines]
    assert tokens(two) == tokens(one)
    for a, b in zip(one, two, strict=True):
        for x, y in zip(a["answers"], b["answers"], strict=True):
            assert x["logprobs"] == pytest.approx(y["logprobs"], abs=1e-4)
    printed = processes.end(processes.start([command(rows, outs[1], few)] * 2, processes.with_devices(1)), [0, 0])
    assert "finished, 6 prompts are answered" in printed[0]
    assert "finished" not in printed[1]
    printed = processes.end(
        processes.start([command(rows, outs[1], few, "--seed=1")] * 2, processes.with_devices(1)), [2, 2]
    )
    assert "seed: 0 there, 1 now" in printed[0]


@pytest.mark.parametrize(
    "keys",
    [
        {"lora_rank": 4},  # adapters are unmerged in a checkpoint, and merged in the export
        {"reference_sync_steps": 1, "reference_sync_alpha": 0.5},  # the reference lies beside the policy
    ],
)
def test_a_runs_checkpoint_answers_as_its_export(tmp_path, keys):
    run = tmp_path / "run"
    small = {
        "sft_steps": 0,
        "num_steps": 3,
        "batch_size": 4,
        "eval_pairs": 0,
        "sample_prompts": 0,
        "kl_prompts": 0,
        "judge": "",
        "learning_rate": 1e-2,
        "attention": "dense",
    }
    train = [sys.executable, "-m", "dpo_jax.train", "--config=configs/hhh.py:tiny", f"--workdir={run}"]
    train += [f"--config.{key}={value}" for key, value in (small | keys).items()]
    subprocess.run(train, env=processes.with_devices(1), check=True, timeout=300, stdout=subprocess.DEVNULL)
    ask = [sys.executable, "-m", "dpo_jax.sample", f"--model={run}", "--dataset=synthetic", "--limit=3"]
    ask += ["--max_tokens=8", "--logprobs"]
    answers = []
    for _ in range(2):
        done = subprocess.run(
            ask, env=processes.with_devices(1), check=True, timeout=300, capture_output=True, text=True
        )
        assert "3 prompts of its test split" in done.stderr
        answers.append([json.loads(line)["answers"][0] for line in done.stdout.splitlines()])
        if (run / "export").exists():
            (run / "export").rename(run / "away")
    assert len(answers[0]) == 3
    for a, b in zip(*answers, strict=True):
        assert a["token_ids"] == b["token_ids"]
        assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-4)

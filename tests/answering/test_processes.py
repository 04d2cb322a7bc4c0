"""The command as a user starts it: killed at any time and started again, and as several processes."""

import json
import signal
import sys
import time

import pytest

from dpo_jax import sample, train
from tests import processes, programs
from tests.end_to_end.test_train import SMALL
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
    programs.run(command(rows, out), processes.with_devices(1), check=True, timeout=300)
    assert out.read_bytes().count(b"\n") == COUNT
    return out


def test_killed_at_any_time_the_file_ends_byte_for_byte_the_same(rows, whole):
    out = rows.with_name("killed.jsonl")
    for lines in (0, 21):  # before the first, within a block; tests/answering/test_command.py cuts a file anywhere
        process = programs.begin(command(rows, out), processes.with_devices(1), stderr=programs.PIPE)
        begun = out.with_name("killed.jsonl.about.json")
        while process.poll() is None and not (begun.exists() and out.read_bytes().count(b"\n") >= lines):
            time.sleep(0.01)
        if lines == 0:
            _refused_while_it_runs(process, command(rows, out))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was to be killed before its end"
        with out.open("r+b") as file:  # as a kill in the middle of a write would leave it
            file.truncate(max(0, out.stat().st_size - lines % 5))
    programs.run(command(rows, out), processes.with_devices(1), check=True, timeout=300)
    assert out.read_bytes() == whole.read_bytes()


def _refused_while_it_runs(process, same):
    """A second command on the same file; the first is held still, so that it does not end meanwhile."""
    process.send_signal(signal.SIGSTOP)
    second = programs.run(same, processes.with_devices(1), capture_output=True)
    assert second.returncode == 2
    assert "in use by another command" in second.stderr


def test_two_processes_write_what_one_writes(rows, whole):
    """On a device each, the first of what one process with one device writes."""
    out, few = rows.with_name("two.jsonl"), "--limit=6"
    processes.end(processes.start([command(rows, out, few)] * 2, processes.with_devices(1)), [0, 0])
    one, two = ([json.loads(line) for line in path.read_text().splitlines()] for path in (whole, out))
    assert len(two) == 6
    one = one[:6]
    tokens = lambda lines: [[answer["token_ids"] for answer in line["answers"]] for line in lines]
    assert tokens(two) == tokens(one)
    for a, b in zip(one, two, strict=True):
        for x, y in zip(a["answers"], b["answers"], strict=True):
            assert x["logprobs"] == pytest.approx(y["logprobs"], abs=1e-4)
    printed = processes.end(processes.start([command(rows, out, few)] * 2, processes.with_devices(1)), [0, 0])
    assert "finished, 6 prompts are answered" in printed[0]
    assert "finished" not in printed[1]
    printed = processes.end(
        processes.start([command(rows, out, few, "--seed=1")] * 2, processes.with_devices(1)), [2, 2]
    )
    assert "seed: 0 there, 1 now" in printed[0]


@pytest.mark.parametrize(
    "keys",
    [
        {"lora_rank": 4},  # adapters are unmerged in a checkpoint, and merged in the export
        {"reference_sync_steps": 1, "reference_sync_alpha": 0.5},  # the reference lies beside the policy
    ],
)
def test_a_runs_checkpoint_answers_as_its_export(tmp_path, keys, capsys):
    """Here, on eight devices: nothing of it needs a process of its own."""
    run = tmp_path / "run"
    small = SMALL | {
        "dataset": "synthetic",
        "sft_steps": 0,
        "num_steps": 3,
        "batch_size": 8,
        "eval_pairs": 0,
        "sample_prompts": 0,
        "kl_prompts": 0,
        "judge": "",
        "learning_rate": 1e-2,
        "attention": "dense",
    }
    settings = [f"--config.{key}={value}" for key, value in (small | keys).items()]
    assert train.main(["train", "--config=configs/hhh.py:tiny", f"--workdir={run}", *settings]) == 0
    capsys.readouterr()
    answers = []
    for _ in range(2):
        ask = ["sample", f"--model={run}", "--dataset=synthetic", "--limit=3", "--max_tokens=8", "--logprobs"]
        assert sample.main(ask) == 0
        out, err = capsys.readouterr()
        assert "3 prompts of its test split" in err
        answers.append([json.loads(line)["answers"][0] for line in out.splitlines()])
        if (run / "export").exists():
            (run / "export").rename(run / "away")
    assert len(answers[0]) == 3
    for a, b in zip(*answers, strict=True):
        assert a["token_ids"] == b["token_ids"]
        assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-4)

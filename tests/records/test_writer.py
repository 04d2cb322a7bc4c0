"""metrics.jsonl, TensorBoard and the console say the same, also after a run was killed and resumed."""

import io
import json
import math
import os
import struct

import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from dpo_jax.entry import run_entry_point
from dpo_jax.errors import UserError
from dpo_jax.records import console as run_console
from dpo_jax.records.records import before_after, read_records, truncate_records
from dpo_jax.records.writer import MetricsWriter

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize(("name", "code"), [("metrics.jsonl", 2), ("events.jsonl", 2), ("tensorboard", 74)])
def test_records_that_cannot_be_written_are_named_in_a_line(name, code, tmp_path, capsys):
    """A directory stands where a file should be, or a file where a directory should."""
    (tmp_path / name).mkdir() if "." in name else (tmp_path / name).write_text("")

    def write(entry):
        entry.place = tmp_path
        with MetricsWriter(tmp_path, total_steps=TOTAL, quiet=True) as writer:
            writer.write(train(1))
            writer.event({"step": 1, "event": "spike"}, "a spike")

    assert run_entry_point(write) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / name}")


def test_a_full_disk_names_the_records_and_closing_them_says_no_other_thing(tmp_path, capsys):
    def write(entry):
        with MetricsWriter(tmp_path, total_steps=TOTAL, quiet=True) as writer:
            writer.write(train(1))
            os.dup2(os.open("/dev/full", os.O_WRONLY), writer._files["metrics.jsonl"]._file._file.fileno())
            writer.write(train(2))

    assert run_entry_point(write) == 74
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'metrics.jsonl'}: cannot be written (No space left on device); ")


TOTAL = {"sft": 4, "train": 20}


def train(step, **changes):
    record = {"step": step, "split": "train", "dpo_loss": 0.6512, "accuracy": 0.61, "margin": 0.12, "pairs": 64}
    return record | {"learning_rate": 5e-7, "pairs_per_second": 12.3} | changes


def held_out(step, **changes):
    return {"step": step, "split": "eval", "dpo_loss": 0.7, "accuracy": 0.5, "margin": 0.0, "pairs": 32} | changes


def scalars(directory):
    """All points of a TensorBoard directory as a reader gets them, checksums verified: {tag: [(step, value, time)]}."""
    points = {}
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            body = data[12 : 12 + length]
            assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(data[:8])
            assert struct.unpack("<I", data[12 + length : 16 + length])[0] == masked_crc32c(body)
            event = Event.FromString(body)
            for value in event.summary.value:
                points.setdefault(value.tag, []).append((event.step, value.simple_value, event.wall_time))
            data = data[16 + length :]
    return points


def run(workdir, records, **options):
    with MetricsWriter(workdir, total_steps=TOTAL, quiet=True, **options) as writer:
        for record in records:
            writer.write(record)


def test_a_record_is_a_line_of_strict_json(tmp_path):
    record = train(np.int64(1), dpo_loss=np.float32(0.25), margin=math.nan, grad_norm=np.array(math.inf), note="ok")
    with MetricsWriter(tmp_path / "new", total_steps=TOTAL, quiet=True) as writer:
        writer.write(record)
        (line,) = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()  # there before the file is closed
    value = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert value == train(1, dpo_loss=0.25, margin=None, grad_norm=None, note="ok")
    assert [type(value[key]) for key in ("step", "dpo_loss", "pairs")] == [int, float, int]


def test_tensorboard_holds_the_same_numbers(tmp_path):
    run(
        tmp_path,
        [{"step": 1, "split": "sft", "loss": 3.5}, held_out(0), train(1), train(2, margin=math.nan, note="ok")],
    )
    points = scalars(tmp_path / "tensorboard")
    assert [p[:2] for p in points["sft/loss"]] == [(1, 3.5)]
    assert [p[:2] for p in points["eval/accuracy"]] == [(0, 0.5)]
    assert [p[:2] for p in points["train/dpo_loss"]] == [(1, pytest.approx(0.6512)), (2, pytest.approx(0.6512))]
    assert math.isnan(points["train/margin"][1][1])
    assert not any(tag.endswith(("/step", "/split", "/note")) for tag in points)


def test_a_resumed_run_has_every_point_once(tmp_path):
    sft = [{"step": s, "split": "sft", "loss": 4.0 - s / 2} for s in range(1, 5)]
    run(tmp_path, [*sft, *(train(s) for s in (1, 2, 3, 4))])
    old = scalars(tmp_path / "tensorboard")
    # Killed at step 4, resumed from a checkpoint of step 2: what came later is written again.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "spl')
    truncate_records(tmp_path / "metrics.jsonl", lambda r: r["split"] == "sft" or r["step"] <= 2)
    run(tmp_path, [train(3, dpo_loss=0.5), train(4, dpo_loss=0.25)])

    steps = [(r["split"], r["step"]) for r in read_records(tmp_path / "metrics.jsonl")]
    assert steps == [("sft", s) for s in (1, 2, 3, 4)] + [("train", s) for s in (1, 2, 3, 4)]
    points = scalars(tmp_path / "tensorboard")
    assert [p[0] for p in points["sft/loss"]] == [1, 2, 3, 4]  # not lost to a purge of steps after 2
    assert [p[:2] for p in points["train/dpo_loss"]] == [
        (1, pytest.approx(0.6512)),
        (2, pytest.approx(0.6512)),
        (3, 0.5),
        (4, 0.25),
    ]
    assert points["train/dpo_loss"][:2] == old["train/dpo_loss"][:2]  # with the times of the first run


@pytest.mark.parametrize("damage", [lambda data: data[:-30], lambda data: data[:-30] + b"\xff" * 30, lambda _: b""])
def test_tensorboard_gets_back_what_a_kill_lost(tmp_path, damage):
    run(tmp_path, [train(1), train(2)])
    old = scalars(tmp_path / "tensorboard")["train/dpo_loss"]
    (path,) = (tmp_path / "tensorboard").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    whole = path.stat().st_size > 0  # the file's header and step 1 are
    run(tmp_path, [])
    new = scalars(tmp_path / "tensorboard")["train/dpo_loss"]
    assert [p[0] for p in new] == [1, 2]
    assert (new[0][2] == old[0][2]) == whole  # what could be read keeps its time
    assert new[1][2] > old[1][2]


def test_truncate_drops_a_half_line_and_keeps_text(tmp_path):
    path = tmp_path / "samples.jsonl"
    kept = {"when": "before", "answer": "Ünï\u2028code \ud83d"}
    path.write_bytes(json.dumps(kept).encode() + b'\n{"when": "after", "answer": "\xc3')
    truncate_records(path, lambda record: True)
    assert read_records(path) == [kept]
    assert path.read_bytes().endswith(b"}\n")
    assert list(tmp_path.iterdir()) == [path]
    truncate_records(path, lambda record: record["when"] == "after")
    assert path.read_bytes() == b""
    truncate_records(tmp_path / "none.jsonl", lambda record: True)
    assert not (tmp_path / "none.jsonl").exists()


def test_opening_mends_a_half_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(train(1)) + '\n{"step": 2, "dpo')
    run(tmp_path, [train(2)])
    assert read_records(tmp_path / "metrics.jsonl") == [train(1), train(2)]


def test_damage_before_the_last_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is not a JSON object"):
        read_records(path)


def test_plain_console_prints_a_line_a_record():
    out = io.StringIO()
    with MetricsWriter(None, total_steps=TOTAL, quiet=False, console=Console(file=out)) as writer:
        writer.write({"step": 1, "split": "sft", "loss": 3.0})
        writer.write(held_out(0))
        writer.write(train(10, margin=math.nan))
        writer.message("saved [bold]10[/]: a\x1b[31mb")
    assert out.getvalue().splitlines() == [
        "step 1/4 sft loss 3.0000",
        "step 0/20 eval dpo_loss 0.7000 accuracy 0.500 margin 0.0000",
        "step 10/20 train dpo_loss 0.6512 accuracy 0.610 margin nan lr 5.00e-07 12.3 pairs/s",
        "saved [bold]10[/]: a␛[31mb",  # an escape code in an answer does not reach the terminal
    ]


def test_time_left_counts_from_the_first_record_of_a_phase(monkeypatch):
    now = iter([100.0, 150.0, 400.0])
    monkeypatch.setattr(run_console.time, "monotonic", lambda: next(now))
    out = io.StringIO()
    with MetricsWriter(None, total_steps=TOTAL, quiet=False, console=Console(file=out)) as writer:
        for step in (5, 10, 20):  # resumed after step 4: 5 steps in 50 s, 10 to go
            writer.write(train(step))
    assert [line.partition("pairs/s")[2] for line in out.getvalue().splitlines()] == ["", " left 0:01:40", ""]


def test_terminal_gets_a_progress_line_for_each_phase():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    with MetricsWriter(None, total_steps=TOTAL, quiet=False, console=console) as writer:
        writer.write({"step": 4, "split": "sft", "loss": 3.0})
        writer.write(train(10))
        writer.write(held_out(10))
        writer.message("a message")
        writer.write(train(20))
    text = out.getvalue()
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n")]
    assert any(line.startswith("sft") and "4/4 loss 3.0000" in line for line in lines)
    assert any(line.startswith("train") and "20/20 loss 0.6512  acc 0.610  12.3 pairs/s" in line for line in lines)
    assert sum("step 10/20 eval dpo_loss 0.7000" in line for line in lines) == 1
    assert sum("a message" in line for line in lines) == 1
    assert not any(line.startswith("step 10/20 train") for line in lines)
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor is back


def test_quiet_prints_nothing(capsys):
    with MetricsWriter(None, total_steps=TOTAL, quiet=True) as writer:
        writer.write(train(1))
        writer.message("a message")
        writer.console.before_after_table("Held-out pairs", [("margin", 0.0, 1.0)])
    assert capsys.readouterr() == ("", "")


def test_final_table_has_before_and_after():
    out = io.StringIO()
    records = [train(1), held_out(20, dpo_loss=0.25), held_out(0), held_out(10)]
    rows = before_after(records)
    assert rows == [("dpo_loss", 0.7, 0.25), ("accuracy", 0.5, 0.5), ("margin", 0.0, 0.0)]
    with MetricsWriter(None, total_steps=TOTAL, quiet=False, console=Console(file=out)) as writer:
        writer.console.before_after_table("Held-out pairs", [*rows, ("chosen_reward", None, 0.5)])
    words = [line.split() for line in out.getvalue().splitlines()]
    assert ["dpo_loss", "0.7000", "0.2500", "-0.4500"] in words
    assert ["chosen_reward", "–", "0.5000"] in words
    assert before_after([held_out(0)])[0] == ("dpo_loss", 0.7, None)
    assert before_after([]) == []


def test_pairs_that_all_tie_before_training_have_no_accuracy_there():
    tied, won = {"accuracy": 0.0, "accuracy/a": 0.0}, {"accuracy": 0.75, "accuracy/a": 0.0}
    rows = before_after([held_out(0, **tied), held_out(10, **won)])
    assert [row for row in rows if row[0].startswith("accuracy")] == [
        ("accuracy", None, 0.75),
        ("accuracy/a", None, 0.0),
    ]

"""Files of records: whole records or none, counted, and told when some are lost."""

import contextlib
import json
import math
import resource
import signal

import numpy as np
import pytest

from dpo_jax.errors import SAVE_FAILED, UserError
from dpo_jax.records.record_file import RecordFile, lost_records
from dpo_jax.records.records import read_records
from dpo_jax.records.shapes import MetricRecord


@contextlib.contextmanager
def _files_of_at_most(size):
    """The system then refuses to let a file grow: what was written up to there is there, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_all_of_several_records_are_there_or_none(tmp_path):
    file = RecordFile(tmp_path / "samples.jsonl")
    file.append([{"n": 0}])
    content, held = (tmp_path / "samples.jsonl").read_bytes(), file.held
    with _files_of_at_most(len(content) + 50), pytest.raises(UserError, match=r"samples.jsonl: cannot be written") as e:
        file.append([{"n": n, "text": "x" * 20} for n in range(1, 5)])
    assert e.value.code == SAVE_FAILED
    assert (tmp_path / "samples.jsonl").read_bytes() == content
    assert file.held == held
    file.append([{"n": 1}, {"n": 2}])
    file.close()
    assert [r["n"] for r in read_records(tmp_path / "samples.jsonl")] == [0, 1, 2]


def test_what_is_held_is_that_of_the_file_opened_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = RecordFile(path)
    assert file.held["records"] == 0
    assert not path.exists()
    file.append([{"step": 1, "split": "train", "loss": math.nan}, {"step": 2, "split": "train", "loss": 0.5}])
    file.sync()
    file.close()
    assert file.held["records"] == 2
    with path.open("ab") as cut_off:
        cut_off.write(b'{"step": 3, "spl')
    assert RecordFile(path, MetricRecord).held == file.held
    assert json.loads(path.read_text().splitlines()[0])["loss"] is None
    file.keep(lambda record: record["step"] == 2)
    assert file.held == RecordFile(path).held
    assert file.held["records"] == 1


def test_the_largest_numbers_that_a_run_computes_are_read_again(tmp_path):
    file = RecordFile(tmp_path / "metrics.jsonl", MetricRecord)
    file.append([{"step": 1, "split": "train", "loss": float(np.finfo(np.float32).max), "margin": -math.inf}])
    file.close()
    assert RecordFile(tmp_path / "metrics.jsonl", MetricRecord).held == file.held


def test_half_a_character_is_kept_as_json_writes_it(tmp_path):
    file = RecordFile(tmp_path / "samples.jsonl")
    file.append([{"answer": "a\ud83d"}])
    file.close()
    assert read_records(tmp_path / "samples.jsonl") == [{"answer": "a\ud83d"}]
    assert RecordFile(tmp_path / "samples.jsonl").held == file.held


@pytest.mark.parametrize(
    ("records", "digest", "said"),
    [
        (5, "aa", None),
        (7, "cc", None),  # answers after training come behind the last checkpoint
        (5, "bb", "its records were changed"),
        (3, "bb", "has 3 of the 5 records that were there when checkpoint 8 was made"),
        (0, "", "has none of the 5 records"),
    ],
)
def test_lost_records_are_told(records, digest, said):
    wanted = {"records": 5, "digest": "aa"}
    told = lost_records("metrics.jsonl", {"records": records, "digest": digest}, wanted, 8)
    assert told is None if said is None else said in told


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"step": "1", "split": "train"}', 'step is "1", must be a valid integer'),
        ('{"split": "train"}', "step is missing"),
        ('{"step": 1, "split": "train", "loss": [1]}', "loss is a list, must be a valid number"),
        ('{"step": 1, "split": "train", "loss": 1e400}', "loss is Infinity, must be at most 1e[+]100"),
        ("null", "is not a JSON object"),
        ("[" * 100_000, "is not a JSON object"),
    ],
)
def test_a_line_of_another_shape_is_named(line, said, tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = '{"step": 0, "split": "eval", "loss": null}\n'
    path.write_text(f"{good}{line}\n{good}")
    with pytest.raises(UserError, match=f"metrics.jsonl line 2.*{said}"):
        RecordFile(path, MetricRecord)
    assert path.read_text() == f"{good}{line}\n{good}"


def test_a_directory_in_place_of_a_file_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be read \(Is a directory\)"):
        RecordFile(tmp_path / "metrics.jsonl")

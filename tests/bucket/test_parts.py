"""A file that grows by parts reads like one that is appended to."""

import contextlib
import json
import math

import pytest

from dpo_jax.bucket import parts
from dpo_jax.bucket.parts import PartsFile
from dpo_jax.bucket.path import as_path
from dpo_jax.errors import UserError
from dpo_jax.records.record_file import RecordFile
from dpo_jax.records.records import read_records, truncate_records


def line(number, size=0):
    return json.dumps({"step": number, "text": "x" * size}).encode() + b"\n"


def steps(path):
    return [record["step"] for record in read_records(path)]


def test_lines_are_joined_over_parts_and_writers(bucket, monkeypatch):
    path = as_path("gs://bucket/grows/metrics.jsonl")
    monkeypatch.setattr(parts, "PART_BYTES", 200)
    assert read_records(path) == []
    for start in (0, 7, 14):  # three processes, one after the other
        with contextlib.closing(PartsFile(path)) as file:
            for number in range(start, start + 7):
                file.write(line(number, 50))
                if number % 2:
                    file.sync()
    assert steps(path) == list(range(21))
    held = bucket.keys("grows/")
    assert held == [f"grows/metrics.jsonl.parts/{number:08}" for number in range(len(held))]
    assert 5 <= len(held) <= 9
    assert b"".join(map(bucket.get, held)) == b"".join(line(number, 50) for number in range(21))


def test_a_process_reads_what_it_has_appended(bucket):
    path = as_path("gs://bucket/own/metrics.jsonl")
    file = PartsFile(path)
    file.write(line(1))  # too early for a request
    assert bucket.keys("own/") == []
    assert steps(path) == [1]
    file.write(line(2))
    file.sync()
    assert len(bucket.get("own/metrics.jsonl.parts/00000000").splitlines()) == 2
    file.close()


def test_an_old_line_is_written_before_the_next_is_due(bucket, monkeypatch):
    path = as_path("gs://bucket/due/metrics.jsonl")
    file = PartsFile(path)
    monkeypatch.setattr(parts, "FLUSH_SECONDS", 0.0)
    file.write(line(1))
    assert bucket.get("due/metrics.jsonl.parts/00000000") == line(1)
    file.close()


@pytest.mark.parametrize("keep", [lambda s: s <= 3, lambda s: s % 2, lambda s: False, lambda s: True])
def test_records_are_dropped_from_any_part(bucket, monkeypatch, keep, request):
    path = as_path(f"gs://bucket/{request.node.callspec.id}/metrics.jsonl")
    monkeypatch.setattr(parts, "PART_BYTES", 40)
    with contextlib.closing(PartsFile(path)) as file:
        for number in range(6):
            file.write(line(number))
            file.sync()
    truncate_records(path, lambda record: keep(record["step"]))
    assert steps(path) == [number for number in range(6) if keep(number)]
    with contextlib.closing(PartsFile(path)) as file:
        file.write(line(99))
    assert steps(path)[-1] == 99


def test_a_file_that_was_whole_before_comes_first(bucket):
    path = as_path("gs://bucket/whole/metrics.jsonl")
    bucket.put("whole/metrics.jsonl", line(1) + line(2))
    with contextlib.closing(PartsFile(path)) as file:
        file.write(line(3))
    assert steps(path) == [1, 2, 3]
    truncate_records(path, lambda record: record["step"] != 2)
    assert steps(path) == [1, 3]


def test_parts_that_were_copied_to_a_disk_are_read_there(bucket, tmp_path):
    path = as_path("gs://bucket/copied/metrics.jsonl")
    with contextlib.closing(PartsFile(path)) as file:
        file.write(line(1) + line(2))
    bucket.get_tree("copied", tmp_path)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]


def test_of_two_who_append_the_second_to_write_is_told(bucket):
    path = as_path("gs://bucket/both/metrics.jsonl")
    mine, theirs = PartsFile(path), PartsFile(path)
    mine.write(line(1))
    mine.sync()
    theirs.write(line(7))
    with pytest.raises(UserError, match="another run writes it"):
        theirs.sync()
    mine.write(line(2))
    mine.close()
    theirs.close()
    assert steps(path) == [1, 2]


def test_a_file_of_records_is_the_same_in_a_bucket(bucket, tmp_path):
    held = []
    for path in (as_path("gs://bucket/records/metrics.jsonl"), tmp_path / "metrics.jsonl"):
        with contextlib.closing(RecordFile(path)) as file:
            file.append([{"step": 1, "loss": math.nan}, {"step": 2, "text": "\ud800"}])
            file.sync()
            file.append([{"step": 3}])
            file.keep(lambda record: record["step"] != 1)
            file.append([{"step": 4}])
            held.append((file.held, steps(path)))
        held.append((RecordFile(path).held, steps(path)))
    assert held == [held[0]] * 4
    assert held[0][1] == [2, 3, 4]

"""A file that grows by parts reads like one that is appended to."""

import json

import pytest

from dpo_jax.bucket import parts
from dpo_jax.bucket.path import place
from dpo_jax.disk import open_append
from dpo_jax.errors import UserError
from dpo_jax.records.records import read_records, truncate_records


def line(number, size=0):
    return json.dumps({"step": number, "text": "x" * size}) + "\n"


def steps(path):
    return [record["step"] for record in read_records(path)]


def test_lines_are_joined_over_parts_and_writers(bucket, monkeypatch):
    path = place("gs://bucket/grows/metrics.jsonl")
    monkeypatch.setattr(parts, "PART_BYTES", 200)
    assert read_records(path) == []
    for start in (0, 7, 14):  # three processes, one after the other
        with open_append(path) as file:
            for number in range(start, start + 7):
                file.write(line(number, 50))
                if number % 2:
                    file.sync()
    assert steps(path) == list(range(21))
    held = bucket.keys("grows/")
    assert held == [f"grows/metrics.jsonl.parts/{number:08}" for number in range(len(held))]
    assert 5 <= len(held) <= 9
    assert b"".join(map(bucket.get, held)) == "".join(line(number, 50) for number in range(21)).encode()


def test_a_process_reads_what_it_has_appended(bucket):
    path = place("gs://bucket/own/metrics.jsonl")
    file = open_append(path)
    file.write(line(1))
    file.flush()  # too early for a write
    assert bucket.keys("own/") == []
    assert steps(path) == [1]
    file.write(line(2))
    parts.sync_appended()
    assert len(bucket.get("own/metrics.jsonl.parts/00000000").splitlines()) == 2
    file.close()


def test_an_old_line_is_written_before_the_next_is_due(bucket, monkeypatch):
    path = place("gs://bucket/due/metrics.jsonl")
    file = open_append(path)
    monkeypatch.setattr(parts, "FLUSH_SECONDS", 0.0)
    file.write(line(1))
    file.flush()
    assert bucket.get("due/metrics.jsonl.parts/00000000") == line(1).encode()
    file.close()


@pytest.mark.parametrize("keep", [lambda s: s <= 3, lambda s: s % 2, lambda s: False, lambda s: True])
def test_records_are_dropped_from_any_part(bucket, monkeypatch, keep, request):
    path = place(f"gs://bucket/{request.node.callspec.id}/metrics.jsonl")
    monkeypatch.setattr(parts, "PART_BYTES", 40)
    with open_append(path) as file:
        for number in range(6):
            file.write(line(number))
            file.sync()
    truncate_records(path, lambda record: keep(record["step"]))
    assert steps(path) == [number for number in range(6) if keep(number)]
    with open_append(path) as file:
        file.write(line(99))
    assert steps(path)[-1] == 99


def test_a_file_that_was_whole_before_comes_first(bucket):
    path = place("gs://bucket/whole/metrics.jsonl")
    bucket.put("whole/metrics.jsonl", (line(1) + line(2)).encode())
    with open_append(path) as file:
        file.write(line(3))
    assert steps(path) == [1, 2, 3]
    truncate_records(path, lambda record: record["step"] != 2)
    assert steps(path) == [1, 3]


def test_parts_that_were_copied_to_a_disk_are_read_there(bucket, tmp_path):
    path = place("gs://bucket/copied/metrics.jsonl")
    with open_append(path) as file:
        file.write(line(1) + line(2))
    bucket.get_tree("copied", tmp_path)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]


def test_of_two_who_append_the_second_to_write_is_told(bucket):
    path = place("gs://bucket/both/metrics.jsonl")
    mine, theirs = open_append(path), open_append(path)
    mine.write(line(1))
    mine.sync()
    theirs.write(line(7))
    with pytest.raises(UserError, match="another run writes it"):
        theirs.sync()
    theirs._new = b""
    mine.write(line(2))
    mine.close()
    theirs.close()
    assert steps(path) == [1, 2]

"""Files and addresses that nobody should have to trust: what a search finds, what is opened, how long a line may be."""

import gzip
import json
import os
import resource
import socket
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dpo_jax.data import files
from dpo_jax.data.containers import read_rows
from dpo_jax.data.files import find_files, fingerprint
from dpo_jax.data.sources import find_sources
from dpo_jax.errors import UserError
from tests.data.test_files import LINES, ROWS, written

MIB = 1 << 20


def tree(root):
    """A directory with two data files, and with everything that a search must not touch."""
    outside = root / "outside"
    for name in ("data/a.jsonl", "data/deep/b.jsonl", "outside/secret.jsonl"):
        written(root / name, LINES)
    data = root / "data"
    os.mkfifo(data / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(data / "socket.jsonl"))
    links = {"zero.jsonl": "/dev/zero", "gone.jsonl": "nowhere", "same.jsonl": "a.jsonl", "round.jsonl": "round.jsonl"}
    links |= {
        "secret.jsonl": outside / "secret.jsonl",
        "out": outside,
        "loop": ".",
        "up.jsonl": "../outside/secret.jsonl",
    }
    for name, target in links.items():
        (data / name).symlink_to(target)
    return data


@pytest.mark.parametrize("named", ["{}", "file://{}", "{}/**/*.jsonl", "local://{}/"])
def test_a_search_stays_in_the_tree_and_says_what_it_passed_over(tmp_path, monkeypatch, named):
    monkeypatch.setattr(files, "_SHOWN", 20)
    data, over = tree(tmp_path), []
    below = [path.removeprefix(f"{data}/") for path in find_files(named.format(data), over)]
    assert below == ["a.jsonl", "deep/b.jsonl"]
    (line,) = over
    said = set(line.partition("passed over: ")[2].split("; "))
    leads_out = {f"{name} leads out of the directory" for name in ("secret.jsonl", "up.jsonl", "out")}
    no_file = {"pipe.jsonl is a pipe", "socket.jsonl is a socket", "zero.jsonl is a device"}
    nowhere = {"gone.jsonl leads nowhere", "round.jsonl leads nowhere"}
    assert said == leads_out | no_file | nowhere | {"same.jsonl is a.jsonl once more"}


def test_what_was_passed_over_is_among_the_notes(tmp_path):
    found = find_sources(str(tree(tmp_path)))
    assert len(found.passed_over) == 1
    assert "passed over" in found.passed_over[0]


def test_a_snapshot_of_the_hubs_cache_is_read_through_its_links(tmp_path):
    written(tmp_path / "datasets--a--b/blobs/123", LINES)
    snapshot = tmp_path / "datasets--a--b/snapshots/main/data"
    snapshot.mkdir(parents=True)
    (snapshot / "train.jsonl").symlink_to("../../../blobs/123")
    over = []
    assert find_files(str(snapshot.parent), over) == [str(snapshot / "train.jsonl")]
    assert not over


@pytest.mark.parametrize("named", ["pipe.jsonl", "socket.jsonl", "zero.jsonl"])
def test_what_is_no_file_is_refused_by_its_name_and_not_opened(tmp_path, named):
    path = str(tree(tmp_path) / named)
    for use in (find_files, fingerprint, lambda path: list(read_rows(path))):
        with pytest.raises(UserError, match=rf"{named}: is a (pipe|socket|device), not a file"):
            use(path)


@pytest.mark.parametrize("path", ["/", "//", "file:///", "/**/*.nothing"])
def test_a_search_of_the_whole_disk_ends(path, monkeypatch):
    monkeypatch.setattr(files, "MOST_ENTRIES", 2000)
    for call in (find_sources, lambda path: find_sources("hhh", path)):
        with pytest.raises(UserError, match="more than 2,000 files and directories are in it; name the directory"):
            call(path)


def test_a_directory_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    written(tmp_path / "a.jsonl", LINES)
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def refusing(path):
        if str(path).endswith("closed"):  # root may read everything
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    over = []
    assert find_files(str(tmp_path), over) == [str(tmp_path / "a.jsonl")]
    assert over == [f"{tmp_path}: passed over: closed cannot be read (Permission denied)"]


def test_names_that_are_no_utf_8_are_read(tmp_path):
    path = os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9\x1b[31m.jsonl")
    written(Path(path), LINES)
    assert find_files(str(tmp_path)) == [path]
    assert [row for _, row in read_rows(path)] == ROWS
    assert fingerprint(path)["bytes"] == len(LINES.encode())


def test_files_in_a_zip_archive_have_an_address(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("train.jsonl", LINES)
        archive.writestr("deep/test.jsonl", LINES)
    for inner, count in (("*.jsonl", 1), ("", 2), ("train.jsonl", 1)):
        found = find_files(f"zip://{inner}::{tmp_path}/x.zip")
        assert len(found) == count
        for path in found:
            assert [row for _, row in read_rows(path)] == ROWS
            assert fingerprint(path)["bytes"] == len(LINES.encode())


@pytest.mark.parametrize(
    "address",
    [
        "zip://a.jsonl::{}/none.zip",
        "zip://a.jsonl::{}/a.jsonl",
        "zip://",
        "tar://x::{}/a.jsonl",
        "reference://",
        "cached://x",
        "dir://x",
        "generic://x",
        "data://x",
        "dbfs://x",
        "simplecache::file:///none",
        "zip://a.jsonl::zip://b.zip::{}/none.zip",
        "http://127.0.0.1:1/x.jsonl",
        "hf://datasets/x",
        "file://",
    ],
)
def test_an_address_of_no_use_is_one_line(tmp_path, address):
    written(tmp_path / "a.jsonl", LINES)
    address = address.format(tmp_path)
    with pytest.raises(UserError, match=r"no such file|cannot be opened|unknown") as caught:
        find_sources(address)
    assert address in str(caught.value)
    with pytest.raises(UserError):
        list(read_rows(address)) if address != "file://" else find_files(address)


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz", "data.json"])
def test_a_row_that_is_too_long_is_one_bad_row(tmp_path, name):
    rows = [json.dumps({**ROWS[0], "prompt": "x" * size}) for size in (3, 5 * MIB, 3 * MIB)]
    content = ("[" + ",\n".join(rows) + "]" if name.endswith(".json") else "\n".join(rows)).encode()
    path = written(tmp_path / name, gzip.compress(content, 1) if name.endswith(".gz") else content)
    found = list(read_rows(path))
    assert [location.rpartition(":")[2] for location, _ in found] == ["1", "2", "3"]
    assert found[1][1].reason == "oversized"
    assert found[1][1].text == "this row is longer than 4 MiB"
    assert len(found[2][1]["prompt"]) == 3 * MIB


@pytest.mark.parametrize(
    ("begins", "goes_on", "size"),
    [('{"prompt":"', "x", 260), ("", "x", 260), ("[", "x", 20), ('{"data":[', "{},", 40)],
)
def test_a_line_without_end_in_a_small_gzip_takes_no_memory(tmp_path, begins, goes_on, size):
    path, piece = tmp_path / "bomb.jsonl.gz", goes_on.encode() * (MIB // len(goes_on))
    with gzip.open(path, "wb", 1) as file:
        file.write((begins or LINES).encode())
        for _ in range(size):
            file.write(piece)
    assert path.stat().st_size < 2 * MIB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"bomb.jsonl.gz: line \d+.*(longer than|no JSON|holds all rows)"):
        list(read_rows(str(path)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700 << 10  # in KiB


def test_an_object_around_all_rows_may_be_longer_than_a_row(tmp_path):
    rows = [{**ROWS[0], "prompt": "x" * 3 * MIB}] * 5
    path = written(tmp_path / "data.json", json.dumps({"data": rows}))
    assert sum(1 for _ in read_rows(path)) == 5
    path = written(tmp_path / "data.json", json.dumps({"messages": [{"role": "user", "content": "x" * 5 * MIB}]}))
    ((_, bad),) = read_rows(path)
    assert bad.reason == "oversized"


def test_a_quotation_mark_that_does_not_end_is_named(tmp_path):
    path = written(
        tmp_path / "data.csv",
        'prompt,chosen,rejected\nq,a,b\n"q,a,b\n' + "q,aaaaaaaaaaaaaaaaaaaaaaaaaaaa,b\n" * 200_000,
    )
    with pytest.raises(UserError, match=r"line 3: a value is longer than 4 MiB; is a quotation mark missing"):
        list(read_rows(path))
    path = written(tmp_path / "data.csv", "prompt,chosen,rejected\nq,a," + "b" * 5 * MIB)
    with pytest.raises(UserError, match=r"line 2 is longer than 4 MiB"):
        list(read_rows(path))


def test_lines_of_csv_may_end_as_on_any_system(tmp_path):
    for end in ("\r", "\r\n", "\n"):
        path = written(tmp_path / "data.csv", end.join(["prompt,chosen,rejected", "q,a,b", f'"q{end}r",c,d', ""]))
        assert [(location[-1], row["chosen"]) for location, row in read_rows(path)] == [("2", "a"), ("3", "c")]


def test_a_large_cell_of_parquet_is_one_bad_row(tmp_path):
    columns = {"prompt": ["q", "x" * 5 * MIB, "y" * 3 * MIB], "chosen": ["a"] * 3, "rejected": ["b"] * 3}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "data.parquet")
    found = [row for _, row in read_rows(str(tmp_path / "data.parquet"))]
    assert [len(found[0]["prompt"]), found[1].reason, len(found[2]["prompt"])] == [1, "oversized", 3 * MIB]

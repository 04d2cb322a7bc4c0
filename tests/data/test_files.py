"""Finding and reading files: every container, every kind of damage, and where a `dataset` string leads."""

import gzip
import json
import tracemalloc
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest

from dpo_jax.data import json_rows
from dpo_jax.data.containers import read_rows
from dpo_jax.data.files import find_files, fingerprint
from dpo_jax.data.raw import BadLine
from dpo_jax.data.sources import find_sources
from dpo_jax.errors import UserError
from dpo_jax.weights.hub import snapshot_of
from tests.fakes.hub import closed_port, use_hub

ROWS = [{"prompt": f"Frage {number}?", "chosen": "jä 🙂", "rejected": "no"} for number in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


CONTAINERS = {
    "jsonl": LINES,
    "no last newline": LINES.rstrip(),
    "blank lines": "\n \n" + LINES.replace("\n", "\n\n"),
    "byte order mark": "\ufeff" + LINES,
    "windows": LINES.replace("\n", "\r\n"),
    "gzip": gzip.compress(LINES.encode()),
    "array": json.dumps(ROWS, ensure_ascii=False),
    "pretty array": "\ufeff \n" + json.dumps(ROWS, indent=2),
    "gzip array": gzip.compress(json.dumps(ROWS).encode()),
}


@pytest.mark.parametrize("content", CONTAINERS.values(), ids=CONTAINERS)
def test_every_container_gives_the_same_rows(tmp_path, content):
    assert [row for _, row in read_rows(written(tmp_path / "data", content))] == ROWS


def test_parquet_is_read_by_row(tmp_path):
    path = str(tmp_path / "data.parquet")
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)
    assert list(read_rows(path)) == [(f"{path}:{number}", row) for number, row in enumerate(ROWS, 1)]


def test_locations_are_lines(tmp_path):
    path = written(tmp_path / "data.jsonl", "\n" + LINES)
    assert [place for place, _ in read_rows(path)] == [f"{path}:{line}" for line in range(2, 7)]
    path = written(tmp_path / "data.json", "[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]")
    assert [place for place, _ in read_rows(path)] == [f"{path}:{line}" for line in range(2, 7)]


def test_arrays_longer_than_the_window_keep_rows_and_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "CHUNK", 16)  # smaller than a row, and it cuts characters in two
    path = written(
        tmp_path / "data.json", "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n]"
    )
    assert list(read_rows(path)) == [(f"{path}:{number + 2}", row) for number, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "\xff\xfe"}', "invalid_utf8"),
        (b'{"prompt": ', "invalid_json"),
        (b"[1, 2]", "not_an_object"),
        (b'"text"', "not_an_object"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "invalid_json"),
    ],
)
def test_a_line_that_is_no_row_costs_that_line_only(tmp_path, line, reason):
    first, rest = LINES.encode().split(b"\n", 1)
    path = written(tmp_path / "data.jsonl", first + b"\n" + line + b"\n" + rest)
    rows = [row for _, row in read_rows(path)]
    assert isinstance(rows[1], BadLine)
    assert rows[1].reason == reason
    assert [rows[0], *rows[2:]] == ROWS


def test_in_an_array_too(tmp_path):
    path = written(tmp_path / "data.json", json.dumps([ROWS[0], 17, None, ROWS[1]]))
    rows = [row for _, row in read_rows(path)]
    assert rows == [ROWS[0], BadLine("not_an_object", "17"), BadLine("not_an_object", "null"), ROWS[1]]


DAMAGED = {
    "truncated gzip": (gzip.compress(LINES.encode() * 500)[:-30], "gzip data is truncated or damaged after"),
    "gzip header only": (gzip.compress(b"")[:10], "gzip data is truncated"),
    "broken gzip": (gzip.compress(LINES.encode() * 500)[:40] + b"\0" * 80, "gzip data is truncated or damaged"),
    "empty": (b"", "is empty"),
    "empty gzip": (gzip.compress(b""), "is empty"),
    "white space": (b"\n\n", "is empty"),
    "empty array": (b"[]", "is empty"),
    "array that breaks off": (json.dumps(ROWS).encode()[:-20], "damaged after 4 rows .line 1"),
    "broken parquet": (b"PAR1" + b"\0" * 50 + b"PAR1", "damaged after 0 rows|cannot be read"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_one_clear_error(tmp_path, content, message):
    path = written(tmp_path / "data", content)
    with pytest.raises(UserError, match=message) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(path)
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path):
    for path in (tmp_path / "absent.jsonl", tmp_path / "*.jsonl"):
        with pytest.raises(UserError, match="no such file"):
            find_files(str(path))
    with pytest.raises(UserError, match="no data files"):
        find_files(str(tmp_path))
    with pytest.raises(UserError, match="cannot be read"):
        list(read_rows(str(tmp_path / "absent.jsonl")))


def test_files_globs_and_directories(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "deep/c.json", "deep/d.parquet", "notes.txt", ".hidden.jsonl", "config.json"):
        written(tmp_path / name, "x")
    below = lambda path: [found.removeprefix(f"{tmp_path}/") for found in find_files(str(path))]
    assert below(tmp_path) == ["a.jsonl.gz", "b.jsonl", "deep/c.json", "deep/d.parquet"]
    assert below(tmp_path / "*.jsonl") == ["b.jsonl"]
    assert below(tmp_path / "notes.txt") == ["notes.txt"]


def test_fsspec_addresses_are_read_like_files():
    filesystem = fsspec.filesystem("memory")
    for name in ("train", "test"):
        filesystem.pipe(f"/bucket/{name}.jsonl", LINES.encode())
    found = find_sources("memory://bucket")
    assert [source.split for source in found.sources] == ["train", "test"]
    assert [row for _, row in read_rows(found.sources[0].files[0])] == ROWS
    assert find_files("memory://bucket/tr*.jsonl") == ["memory:///bucket/train.jsonl"]
    assert fingerprint("memory://bucket/train.jsonl")["bytes"] == len(LINES.encode())
    for path in ("memory://bucket/absent.jsonl", "nosuch://bucket/x.jsonl"):
        with pytest.raises(UserError, match="://"):
            find_files(path)


def test_the_fingerprint_follows_the_content(tmp_path):
    path = written(tmp_path / "data.jsonl", LINES)
    before = fingerprint(path)
    assert fingerprint(path) == before
    written(tmp_path / "data.jsonl", LINES.replace("no", "na"))
    assert fingerprint(path)["digest"] != before["digest"]


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz", "data.json"])
def test_memory_does_not_grow_with_the_rows(tmp_path, name):
    line = json.dumps({"prompt": "x" * 2000}) + "\n"
    content = "[" + ",".join([line] * 5000) + "]" if name.endswith(".json") else line * 5000
    path = written(tmp_path / name, gzip.compress(content.encode(), 1) if name.endswith(".gz") else content)
    tracemalloc.start()
    assert sum(1 for _ in read_rows(path)) == 5000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20  # the file has 10 MB


# What a `dataset` string leads to.


def hh_layout(root, *paths):
    for path in paths:
        written(root / path, LINES)
    return str(root)


def shape(found):
    return [(source.name, source.split, len(source.files)) for source in found.sources]


def test_named_dataset_in_the_hubs_layout(tmp_path):
    root = hh_layout(
        tmp_path,
        *(
            f"{subset}/{split}.jsonl.gz"
            for subset in ("harmless-base", "helpful-base", "red-team")
            for split in ("train", "test")
        ),
    )
    both = find_sources("hhh/harmless-base,helpful-base", root)
    assert shape(both) == [
        ("hhh/harmless-base", "train", 1),
        ("hhh/helpful-base", "train", 1),
        ("hhh/harmless-base", "test", 1),
        ("hhh/helpful-base", "test", 1),
    ]
    assert len(find_sources("hhh", root).sources) == 6
    with pytest.raises(UserError, match=r"helpful-online.*found harmless-base"):
        find_sources("hhh/helpful-online", root)


def test_a_test_split_alone_is_divided_again(tmp_path):
    found = find_sources("hhh", hh_layout(tmp_path, "harmless-base/test.jsonl.gz"))
    assert shape(found) == [("hhh/harmless-base", "train", 1)]
    assert "divided again" in found.parts[0].note
    assert not found.published(0)


def test_a_directorys_splits_are_told_by_words(tmp_path):
    root = hh_layout(tmp_path, "data/train-0.jsonl", "data/more.jsonl", "data/validation-0.jsonl", "data/test-0.jsonl")
    found = find_sources(root)
    assert shape(found) == [(root, "train", 2), (root, "test", 1)]
    assert found.sources[1].files[0].endswith("validation-0.jsonl")
    assert shape(find_sources(f"{root}/data/more.jsonl")) == [(f"{root}/data/more.jsonl", "train", 1)]


def test_eval_path_replaces_the_published_split(tmp_path):
    root = hh_layout(tmp_path, "train.jsonl", "test.jsonl")
    mine = written(tmp_path.parent / "mine.jsonl", LINES)
    found = find_sources(root, eval_path=mine)
    assert [(source.split, source.files) for source in found.sources] == [
        ("train", (f"{root}/train.jsonl",)),
        ("test", (mine,)),
    ]
    with pytest.raises(UserError, match="training data too"):
        find_sources(root, eval_path=f"{root}/train.jsonl")


@pytest.mark.parametrize("name", ["hh", "", "HelpSteer3", "ultrafeedback:1,hh:1"])
def test_unknown_names_list_the_known_ones(tmp_path, name):
    path = written(tmp_path / "harmless-base.jsonl", LINES)
    with pytest.raises(UserError, match="unknown; known are hhh, helpsteer3, ultrafeedback, synthetic"):
        find_sources(name, f"{path}," if "," in name else "")


def test_other_requests_that_cannot_be_met(tmp_path):
    path = written(tmp_path / "data.jsonl", LINES)
    with pytest.raises(UserError, match="give one of them"):
        find_sources(path, path)
    with pytest.raises(UserError, match=r"needs --config.dataset_path"):
        find_sources("my_module:parse")
    with pytest.raises(UserError, match="unknown subset harmful"):
        find_sources("hhh/harmful")
    with pytest.raises(UserError, match="needs dataset_path"):
        find_sources("synthetic")


def test_the_hub_is_asked_for_the_right_files(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repository, *, repo_type, allow_patterns, revision):
        asked.append((repository, repo_type, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    hh_layout(tmp_path, "harmless-base/train.jsonl.gz", "harmless-base/test.jsonl.gz")
    assert len(find_sources("hhh/harmless-base").sources) == 2
    assert asked[0][:2] == ("Anthropic/hh-rlhf", "dataset")
    assert asked[0][2] == ["harmless-base/train.jsonl*", "harmless-base/test.jsonl*"]
    with pytest.raises(UserError, match="no subset helpful-base"):
        find_sources("hhh/harmless-base,helpful-base")
    (tmp_path / "harmless-base/train.jsonl.gz").unlink()
    with pytest.raises(UserError, match="not whole"):  # a partial copy that an offline machine still has
        find_sources("hhh/harmless-base")


def test_any_hub_dataset_with_and_without_a_split(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: str(tmp_path))
    hh_layout(tmp_path, *(f"data/{name}-00000-of-00001.jsonl" for name in ("train_prefs", "test_prefs", "train_sft")))
    found = find_sources("hf:some/data:train_prefs")
    assert shape(found) == [("hf:some/data:train_prefs", "train", 1), ("hf:some/data:train_prefs", "test", 1)]
    assert shape(find_sources("hf:some/data", split="train_prefs"))[0] == ("hf:some/data", "train", 1)
    with pytest.raises(UserError, match=r"several training splits \(train_prefs, train_sft\)"):
        find_sources("hf:some/data")
    with pytest.raises(UserError, match="no file of split dev; the repository has data/test_prefs"):
        find_sources("hf:some/data:dev")


def test_an_unreachable_hub_says_what_to_do(monkeypatch):
    def snapshot_download(*args, **options):
        raise OSError("We couldn't connect\nand so on")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=r"dataset_path=DIR.*hhh.py:tiny") as caught:
        find_sources("helpsteer3")
    assert "\n" not in str(caught.value)


def test_a_mixture_has_its_parts_and_their_files(tmp_path):
    hh_layout(tmp_path, "hhh/helpful-base/train.jsonl", "hhh/helpful-base/test.jsonl", "ultrafeedback/rows.jsonl")
    own = written(tmp_path / "own,file.jsonl", LINES)
    found = find_sources(f"hhh/helpful-base:3,{own}:.5,ultrafeedback:1e0", str(tmp_path))
    assert [(s.name, s.split, s.part) for s in found.sources] == [
        ("hhh/helpful-base", "train", 0),
        ("hhh/helpful-base", "test", 0),
        (own, "train", 1),
        ("ultrafeedback", "train", 2),
    ]
    assert [(part.name, part.weight) for part in found.parts] == [
        ("hhh/helpful-base", 3.0),
        (own, 0.5),
        ("ultrafeedback", 1.0),
    ]
    assert [found.published(part) for part in range(3)] == [True, False, False]
    listed = find_sources(f"ultrafeedback:1,{own}:1", f"{tmp_path}/ultrafeedback,")
    assert [s.files for s in listed.sources] == [(f"{tmp_path}/ultrafeedback/rows.jsonl",), (own,)]


@pytest.mark.parametrize(
    ("dataset", "path", "message"),
    [
        ("hhh:0.7,ultrafeedback", "", "two parts or more, each with a weight above 0"),
        ("hhh,ultrafeedback:0.3", "", "two parts or more"),
        ("hhh:0.7,ultrafeedback:0", "", "two parts or more"),
        ("hhh:0.7,ultrafeedback:-1", "", "two parts or more"),
        ("hhh:0.7,", "", "two parts or more"),
        ("ultrafeedback:0.5", "", "two parts or more"),
        ("hhh:1,hhh:2", "", "stands there twice"),
        ("hhh:1,ultrafeedback:1e400", "", "at most 1e.12"),
        ("hhh:1, ultrafeedback", "", "found .ultrafeedback."),
        ("hhh:1,ultrafeedback:1", "a,b,c", "a mixture of 2 needs 2 paths"),
        ("hhh:1,ultrafeedback:1", "/nowhere", "there is no /nowhere/hhh"),
    ],
)
def test_mixtures_that_are_none(dataset, path, message):
    with pytest.raises(UserError, match=message):
        find_sources(dataset, path)


def test_a_revision_of_a_hub_dataset(hub):
    for name, count in (("data", 2), ("data@v2", 3)):
        directory = hub.root / "datasets" / "some" / name
        directory.mkdir(parents=True)
        rows = [{"prompt": f"q {i}", "chosen": "yes", "rejected": "no"} for i in range(count)]
        (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for revision, count in (("", 2), ("v2", 3)):
        (source,) = find_sources("hf:some/data", revision=revision).sources
        assert len(Path(source.files[0]).read_text().splitlines()) == count
        commit = snapshot_of(source.files[0])
        assert commit["repository"] == "some/data"
        assert (commit["commit"] == hub.sha) == (revision == "")
    with pytest.raises(UserError, match="dataset some/data at 'gone' cannot be fetched"):
        find_sources("hf:some/data", revision="gone")


@pytest.mark.parametrize(
    ("dataset", "path", "revision", "message"),
    [
        ("hhh:1,hf:some/data:1", "", "v2", "2 datasets and 1 revisions; give one for each"),
        ("hhh:1,rows.jsonl:1", "", "v1,v2", "rows.jsonl is not on the hub; leave its revision empty"),
        ("hhh", "/some/where", "v2", "/some/where is not on the hub"),
        ("rows.jsonl", "", "v2", "rows.jsonl is not on the hub"),
    ],
)
def test_revisions_of_what_has_none(dataset, path, revision, message):
    with pytest.raises(UserError, match=message):
        find_sources(dataset, path, revision=revision)


def test_a_dataset_from_the_hub_and_again_without_one(hub, tmp_path, monkeypatch):
    """The real client against a hub on loopback: only the files that are asked for, whole subsets, kept for later."""
    for repository in ("Anthropic/hh-rlhf", "someone/mine"):
        root = hub.root / "datasets" / repository
        hh_layout(
            root, *(f"{subset}/{split}.jsonl" for subset in ("harmless-base", "red") for split in ("train", "test"))
        )
        written(root / "README.md", "x")
    found = find_sources("hhh/harmless-base")
    assert shape(found) == [("hhh/harmless-base", "train", 1), ("hhh/harmless-base", "test", 1)]
    asked = [path for path in hub.asked if "resolve" in path]
    assert sorted({path.split("/", 5)[-1] for path in asked}) == [
        "harmless-base/test.jsonl",
        "harmless-base/train.jsonl",
    ]
    assert len(list(read_rows(found.sources[0].files[0]))) == len(list(read_rows(found.sources[1].files[0]))) > 0
    assert shape(find_sources("hf:someone/mine", split="train"))[0] == ("hf:someone/mine", "train", 2)
    with pytest.raises(UserError, match=r"someone/none cannot be fetched.*dataset_path=DIR"):
        find_sources("hf:someone/none")
    use_hub(monkeypatch, tmp_path, closed_port())
    assert find_sources("hhh/harmless-base") == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}]\n[{"a": 2}]\n', "line 1: after the JSON array's end comes"),
        ('[{"a": 1}] x', "after the JSON array's end"),
        ('[{"a": 1}\n{"a": 2}]', "line 2: a comma is missing"),
        ('[{"a": 1},, {"a": 2}]', "too many commas"),
    ],
)
def test_an_array_that_would_lose_rows_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        list(read_rows(written(tmp_path / "data.json", text)))


def test_parquet_packed_with_gzip(tmp_path):
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "plain.parquet")
    path = written(tmp_path / "rows.parquet.gz", gzip.compress((tmp_path / "plain.parquet").read_bytes()))
    assert [row for _, row in read_rows(path)] == ROWS


def test_no_file_is_in_two_parts_and_split_is_for_the_hub(tmp_path):
    root = hh_layout(tmp_path, "hhh/harmless-base/train.jsonl", "x.jsonl")
    with pytest.raises(UserError, match="in two parts of the mixture"):
        find_sources(f"{root}/x.jsonl:1,{root}/./x.jsonl:1")
    with pytest.raises(UserError, match="only an hf: dataset has splits"):
        find_sources(f"{root}/x.jsonl", split="test")

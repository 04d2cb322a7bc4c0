"""A path in a bucket does what a `pathlib.Path` does in a directory with the same files."""

import contextlib
import datetime
import itertools
import os
from pathlib import Path, PurePosixPath

import pytest

from dpo_jax import disk
from dpo_jax.bucket import tree
from dpo_jax.bucket.local import local_twin
from dpo_jax.bucket.path import BucketPath, as_path
from dpo_jax.errors import UserError

FILES = {
    "config.json": b"{}",
    "checkpoints/4/a": b"1234",
    "checkpoints/4/d/b": b"12",
    "checkpoints/12/a": b"",
    "x-1": b"x",
}


NUMBERS = itertools.count()


@pytest.fixture
def both(bucket, tmp_path):
    """The same files in a bucket and in a directory."""
    name = f"run-{next(NUMBERS)}"
    remote, local = as_path(f"gs://bucket/{name}"), tmp_path / name
    for file, content in FILES.items():
        (local / file).parent.mkdir(parents=True, exist_ok=True)
        (local / file).write_bytes(content)
        (remote / file).write_bytes(content)
    bucket.put(f"{name}-beside/config.json", b"another's")
    return remote, local


def lines_of(path):
    with path.open("rb") as file, path.open("r", encoding="utf-8") as text:
        return file.readlines(), text.readlines()


ASKED = {
    "exists": lambda at: [(at / name).exists() for name in (".", "config.json", "checkpoints", "check", "none/at/all")],
    "is_file": lambda at: [(at / name).is_file() for name in ("config.json", "checkpoints", "none")],
    "is_dir": lambda at: [
        (at / name).is_dir() for name in ("config.json", "checkpoints", "checkpoints/4", "check", "none")
    ],
    "names": lambda at: sorted(path.name for path in at.iterdir()),
    "numbered": lambda at: sorted(path.name for path in (at / "checkpoints").glob("*") if path.is_dir()),
    "deeper": lambda at: sorted(str(path.relative_to(at)) for path in at.glob("*/4/*")),
    "named": lambda at: [path.name for path in at.glob("config.json")],
    "no pattern's": lambda at: list(at.glob("none*")) + list(at.glob("none")),
    "sizes": lambda at: sorted((p.name, p.stat().st_size) for p in at.rglob("*") if p.is_file()),
    "size": lambda at: (at / "checkpoints/4/a").stat().st_size,
    "text": lambda at: (at / "config.json").read_text(encoding="utf-8"),
    "lines": lambda at: lines_of(at / "checkpoints/4/a"),
    "parts": lambda at: (at.name, (at / "a.tar.gz").stem, (at / "a.gz").suffix, (at / "a.gz").with_suffix(".b").name),
    "around": lambda at: ((at / "a" / "b").parent.name, at.with_name("c").name, (at / "c" / "d").relative_to(at)),
    "json": lambda at: disk.read_json(at / "config.json"),
    "digest": lambda at: disk.file_digest(at / "checkpoints/4/a"),
    "sorted": lambda at: [path.name for path in sorted((at / "checkpoints/4").iterdir())],
}


@pytest.mark.parametrize("name", ASKED)
def test_it_is_asked_like_a_directory(both, name):
    remote, local = both
    found, wanted = ASKED[name](remote), ASKED[name](local)
    assert found == wanted or list(map(str, found)) == list(map(str, wanted))


CHANGED = {
    "written": lambda at: (
        disk.write_whole(at / "new" / "a", "text") if (at / "new").mkdir(exist_ok=True) is None else 0
    ),
    "written again": lambda at: disk.write_whole(at / "config.json", b"[]"),
    "text": lambda at: (at / "t").write_text("ä", encoding="utf-8"),
    "unlinked": lambda at: (at / "config.json").unlink(),
    "unlinked if there": lambda at: (at / "none").unlink(missing_ok=True),
    "a tree removed": lambda at: disk.remove_tree(at / "checkpoints"),
    "no tree removed": lambda at: disk.remove_tree(at / "none"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_it_is_changed_like_a_directory(both, name):
    remote, local = both
    for at in both:
        CHANGED[name](at)
    held = lambda at: {str(p.relative_to(at)): p.read_bytes() for p in at.rglob("*") if p.is_file()}
    assert held(remote) == held(local)


def test_what_is_not_there_is_an_os_error(both):
    for at in both:
        for ask in (lambda p: p.read_bytes(), lambda p: p.stat(), lambda p: p.unlink(), lambda p: p.open("rb")):
            with pytest.raises(FileNotFoundError):
                ask(at / "none")


def test_only_the_first_of_several_makes_an_exclusive_file(both):
    for at in both:
        with disk.whole_file(at / "once", exclusive=True) as file:
            file.write(b"first")
        with pytest.raises(FileExistsError), disk.whole_file(at / "once", exclusive=True) as file:
            file.write(b"second")
        assert (at / "once").read_bytes() == b"first"


def test_an_error_in_the_middle_of_a_write_leaves_what_was_there(both):
    for at in both:
        with contextlib.suppress(RuntimeError), disk.whole_file(at / "config.json") as file:
            file.write(b"half")
            raise RuntimeError
        assert (at / "config.json").read_bytes() == b"{}"


def test_a_large_file_is_written_from_the_disk(bucket):
    content, path = os.urandom((1 << 23) + 5), as_path("gs://bucket/large/file")
    with disk.whole_file(path) as file:
        file.write(content)
    assert bucket.get("large/file") == content


def test_what_takes_local_files_alone_refuses_it():
    path = BucketPath("bucket", "run")
    for ask in (open, os.listdir, Path, os.fspath):
        with pytest.raises(TypeError):
            ask(path)
    with pytest.raises(ValueError, match="written whole"):
        path.open("w")


def test_a_directory_is_moved_with_its_mark_last(both, bucket):
    remote, _ = both
    (remote / "checkpoints/4/commit_success.txt").write_bytes(b"done")
    tree.move_objects(remote / "checkpoints/4", remote / "damaged/4", first=("commit_success.txt",))
    assert not (remote / "checkpoints/4").exists()
    assert sorted(str(p.relative_to(remote)) for p in (remote / "damaged").rglob("*")) == [
        "damaged/4/a", "damaged/4/commit_success.txt", "damaged/4/d/b"
    ]  # fmt: skip
    deleted = [path for method, path in bucket.asked if method == "DELETE"]
    assert "commit_success" in deleted[0]


def test_a_directory_is_published_with_its_mark_last(bucket, tmp_path):
    target, new = as_path("gs://bucket/published/export"), tmp_path / "new"
    for old in ("config.json", "stale.safetensors"):
        (target / old).write_bytes(b"old")
    (new / "sub").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "sub/a"):
        (new / name).write_bytes(b"new")
    bucket.asked.clear()
    tree.replace_objects(new, target, last=("config.json",))
    assert bucket.keys("published/") == [
        f"published/export/{name}" for name in ("config.json", "model.safetensors", "sub/a")
    ]
    changes = [(method, path) for method, path in bucket.asked if method != "GET"]
    assert changes[0][0] == "DELETE"
    assert "config.json" in changes[0][1]
    assert "stale" in changes[-1][1]
    assert all((target / name).read_bytes() == b"new" for name in ("config.json", "model.safetensors", "sub/a"))


@pytest.mark.parametrize(
    "text",
    ["gs://", "gs://bucket", "gs://bucket/", "gs:///run", "gs://Bucket/run", "gs://b/run", "gs://bucket/../x",
     "gs://bucket/a/./b", "gs://bucket/a\nb", "gs://bucket/" + "a" * 901, "s3://bucket/run",
     "http://host/run", "gs:/bucket/run"],
)  # fmt: skip
def test_an_address_that_is_none(text):
    with pytest.raises(UserError, match=r"give (a directory or )?gs://BUCKET/DIR"):
        as_path(text)


def test_addresses_and_local_paths():
    assert str(as_path("gs://bucket/a//b/")) == "gs://bucket/a/b"
    assert as_path("gs://bucket/a") == as_path("gs://bucket/a/")
    assert as_path(as_path("gs://bucket/a")) == BucketPath("bucket", "a")
    assert as_path("run/a") == Path("run/a")
    assert as_path(Path("run")) == Path("run")
    assert (as_path("gs://bucket/a") / PurePosixPath("b/c")).parts == ("gs://bucket", "a", "b", "c")


def test_the_local_twin(monkeypatch, tmp_path):
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path))
    a, b = (local_twin(BucketPath("bucket", name)) for name in "ab")
    assert a.parent == b.parent == tmp_path / "buckets"
    assert a != b
    assert local_twin(tmp_path) == tmp_path
    monkeypatch.setenv("DPO_JAX_CACHE", "gs://bucket/cache")
    assert "gs:" not in str(local_twin(BucketPath("bucket", "a")))


def test_times_are_those_of_the_bucket(both):
    remote, _ = both
    now = datetime.datetime.now(datetime.UTC).timestamp()
    assert abs((remote / "config.json").stat().st_mtime - now) < 60

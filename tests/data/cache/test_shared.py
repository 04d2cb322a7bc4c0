"""The shared cache: one process builds it, all copy it, and what is not whole is nobody's cache."""

import json
import os
import threading
import time
from pathlib import Path

import fsspec
import pytest

from dpo_jax.data.cache import lock as shared_store
from dpo_jax.data.cache.shared import open_or_build, shared_address
from dpo_jax.data.cache.store import cache_key
from dpo_jax.errors import UserError
from tests.data.cache.test_store import FINGERPRINT, assert_holds_the_pairs, build_and_be_killed, forbidden, produce
from tests.processes import run_all

KEY = cache_key(FINGERPRINT)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in (("BEAT_SECONDS", 0.1), ("STALE_SECONDS", 1.0), ("POLL_SECONDS", 0.05)):
        monkeypatch.setattr(shared_store, name, seconds)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes this process be on another machine: another local cache root."""

    def become(name):
        monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path / name))
        return tmp_path / name

    become("first")
    return become


@pytest.fixture(params=["file", "memory"])
def address(request, tmp_path):
    return f"file://{tmp_path}/shared/" if request.param == "file" else f"memory://{tmp_path.name}/shared"


def remote(address, name):
    """The shared file system, and the path of a file of the cache in it."""
    filesystem, path = fsspec.core.url_to_fs(address)
    return filesystem, f"{path.rstrip('/')}/{KEY}/{name}"


def test_built_once_and_copied_by_other_machines(address, machine):
    here = machine("first")
    cache, written = open_or_build(address, FINGERPRINT, produce)
    assert written
    assert Path(cache.directory) == here / KEY
    there = machine("second")
    copy, written = open_or_build(address, FINGERPRINT, forbidden)
    assert not written
    assert Path(copy.directory) == there / KEY
    for found in (cache, copy):
        assert_holds_the_pairs(found)
    assert copy.manifest == cache.manifest
    filesystem, lock = remote(address, shared_store.LOCK)
    assert not filesystem.exists(lock)


def test_a_copy_that_is_there_is_not_copied_again(address, machine):
    open_or_build(address, FINGERPRINT, produce)
    local = machine("second") / KEY / "lengths.npy"
    open_or_build(address, FINGERPRINT, forbidden)
    before = local.stat().st_ino
    open_or_build(address, FINGERPRINT, forbidden)
    assert local.stat().st_ino == before


def test_all_machines_read_the_build_that_is_shared(address, machine):
    """A machine that had built the same for itself takes the shared one."""
    machine("second")
    own, _ = open_or_build("", FINGERPRINT, produce)
    machine("first")
    shared, _ = open_or_build(address, FINGERPRINT, produce)
    machine("second")
    assert own.manifest["id"] != shared.manifest["id"]
    assert open_or_build(address, FINGERPRINT, forbidden)[0].manifest["id"] == shared.manifest["id"]


def test_a_local_cache_is_uploaded_and_not_built_again(address, machine):
    open_or_build("", FINGERPRINT, produce)
    assert open_or_build(address, FINGERPRINT, forbidden)[1]
    machine("second")
    assert_holds_the_pairs(open_or_build(address, FINGERPRINT, forbidden)[0])


@pytest.mark.parametrize("name", ["pairs.array_record", "lengths.npy", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "shorter"])
def test_a_partial_upload_is_not_taken_for_whole(address, machine, name, damage):
    cache, _ = open_or_build(address, FINGERPRINT, produce)
    inside = name if name == "manifest.json" else f"{cache.manifest['id']}/{name}"
    filesystem, path = remote(address, inside)
    content = filesystem.cat_file(path)
    if damage == "missing":
        filesystem.rm(path)
    else:
        filesystem.pipe_file(path, content[:-8])
    machine("second")
    again, written = open_or_build(address, FINGERPRINT, produce)
    assert written
    assert_holds_the_pairs(again)
    machine("third")
    assert_holds_the_pairs(open_or_build(address, FINGERPRINT, forbidden)[0])
    assert len(filesystem.ls(remote(address, "")[1].rstrip("/"))) == 2  # one build and its manifest


def build_slowly(address, root, calls):
    os.environ["DPO_JAX_CACHE"] = root
    shared_store.BEAT_SECONDS, shared_store.STALE_SECONDS, shared_store.POLL_SECONDS = 0.1, 1.0, 0.05

    def slow(quarantine):
        with open(calls, "a") as stream:
            stream.write("built\n")
        time.sleep(2.0)  # longer than a lock lives that is not renewed
        return (yield from produce(quarantine))

    assert_holds_the_pairs(open_or_build(address, FINGERPRINT, slow)[0])


@pytest.mark.parametrize("writers", [2, 4])
def test_of_several_machines_one_builds_and_the_others_wait(tmp_path, writers):
    address, calls = f"file://{tmp_path}/shared", str(tmp_path / "calls")
    run_all(build_slowly, [(address, str(tmp_path / str(n)), calls) for n in range(writers)])
    assert (tmp_path / "calls").read_text() == "built\n"


def test_one_of_many_creates_the_lock(tmp_path):
    """Many times, and all at the same moment: what fsspec's own `pipe_file(mode="create")` of local files fails at."""
    for attempt in range(20):
        store = shared_store.open_store(f"file://{tmp_path}", str(attempt))
        os.mkdir(store.path)
        ready, taken = threading.Barrier(8), []

        def race(store=store, ready=ready, taken=taken):
            waiting = shared_store.begin()
            ready.wait()
            taken.append(shared_store.take(store, waiting)[0])

        threads = [threading.Thread(target=race) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert taken.count(True) == 1


def test_a_killed_builder_leaves_a_lock_that_is_taken_over(tmp_path, machine):
    address = f"file://{tmp_path}/shared"
    build_and_be_killed(address, DPO_JAX_CACHE=str(machine("killed")))
    filesystem, lock = remote(address, shared_store.LOCK)
    assert set(json.loads(filesystem.cat_file(lock))) == {"owner", "time"}
    assert not filesystem.exists(remote(address, "manifest.json")[1])
    machine("second")
    cache, written = open_or_build(address, FINGERPRINT, produce)
    assert written
    assert_holds_the_pairs(cache)
    assert not filesystem.exists(lock)


@pytest.mark.parametrize("content", [b"", b"{", b'{"owner": "x", "time": 9e9}'])
def test_a_lock_that_nobody_renews_is_taken_over_whatever_it_holds(tmp_path, machine, content):
    address = f"file://{tmp_path}/shared"
    filesystem, lock = remote(address, shared_store.LOCK)
    filesystem.makedirs(os.path.dirname(lock))
    filesystem.pipe_file(lock, content)
    assert open_or_build(address, FINGERPRINT, produce)[1]


def test_a_builder_that_slept_does_not_replace_the_build_of_its_heir(address, machine):
    machine("sleeper")

    def slow(quarantine):
        machine("heir")
        filesystem, lock = remote(address, shared_store.LOCK)
        filesystem.rm(lock)  # as if it had not been renewed
        slow.heir, _ = open_or_build(address, FINGERPRINT, produce)
        machine("sleeper")
        return (yield from produce(quarantine))

    sleeper, _ = open_or_build(address, FINGERPRINT, slow)
    assert sleeper.manifest["id"] == slow.heir.manifest["id"]
    assert_holds_the_pairs(sleeper)


def test_an_error_while_building_frees_the_lock(address, machine):
    def failing(quarantine):
        yield from ()
        raise UserError("data.jsonl: damaged")

    with pytest.raises(UserError, match="damaged"):
        open_or_build(address, FINGERPRINT, failing)
    assert open_or_build(address, FINGERPRINT, produce)[1]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("nothing://bucket/dir", r"cache_dir=nothing://bucket/dir: Protocol not known"),
        ("file:///proc/nowhere", r"cache_dir=file:///proc/nowhere: cannot be reached or written \(.*give a local"),
        ("file://FILE", r"cannot be reached or written"),
    ],
)
def test_what_is_wrong_with_an_address_is_one_line(tmp_path, machine, address, words):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=words) as caught:
        open_or_build(address.replace("FILE", f"{tmp_path}/file/dir"), FINGERPRINT, forbidden)
    assert "\n" not in str(caught.value)


def test_gs_needs_a_library(machine):
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"gcsfs.*pip install 'dpo_jax\[gcs\]'"):
            open_or_build("gs://bucket/dir", FINGERPRINT, forbidden)
    else:
        pytest.skip("gcsfs is installed")


def test_a_failing_network_is_one_line(machine, monkeypatch):
    class UnreachableError(Exception):
        """Cloud libraries raise classes of their own, over several lines."""

    def fail(*_, **__):
        raise UnreachableError("no\nroute")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", fail)
    with pytest.raises(UserError, match=r"memory://x: cannot be reached or written \(UnreachableError: no route\)"):
        open_or_build("memory://x", FINGERPRINT, forbidden)


def test_the_environment_may_name_an_address(monkeypatch):
    monkeypatch.setenv("DPO_JAX_CACHE", "gs://bucket/dir/")
    assert shared_address() == "gs://bucket/dir"
    assert shared_address("/local") == ""

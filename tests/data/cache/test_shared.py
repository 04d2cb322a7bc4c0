"""The shared cache: one build of it counts, all copy that one, and what is not whole is built anew."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest

from dpo_jax.data.cache import shared
from dpo_jax.data.cache.manifest import sealed
from dpo_jax.data.cache.shared import open_or_build, shared_address
from dpo_jax.data.cache.store import cache_key
from dpo_jax.errors import UserError
from tests import places
from tests.data.cache.test_store import (
    DAMAGES,
    FINGERPRINT,
    assert_holds_the_pairs,
    build_and_be_killed,
    forbidden,
    produce,
)
from tests.processes import run_all

KEY = cache_key(FINGERPRINT)


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


def names(address):
    """What there is of the cache at the address."""
    filesystem, path = remote(address, "")
    filesystem.invalidate_cache()
    return {one.rstrip("/").rsplit("/", 1)[-1] for one in filesystem.ls(path.rstrip("/"), detail=False)}


def assert_one_sound_cache(address, machine):
    """A machine that has nothing yet copies the one whole build that there is; returns its ID."""
    machine("a machine that comes later")
    cache, written = open_or_build(address, FINGERPRINT, forbidden)
    assert not written
    assert_holds_the_pairs(cache)
    assert names(address) == {"manifest.json", cache.manifest["id"]}
    return cache.manifest["id"]


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
    assert names(address) == {"manifest.json", cache.manifest["id"]}


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
@pytest.mark.parametrize("damage", ["missing", "shorter", "flipped"])
def test_a_damaged_upload_is_not_taken_for_whole(address, machine, capsys, name, damage):
    cache, _ = open_or_build(address, FINGERPRINT, produce)
    inside = name if name == "manifest.json" else f"{cache.manifest['id']}/{name}"
    filesystem, path = remote(address, inside)
    content = filesystem.cat_file(path)
    if damage == "missing":
        filesystem.rm(path)
    else:
        filesystem.pipe_file(path, DAMAGES[damage](content))
    machine("second")
    again, written = open_or_build(address, FINGERPRINT, produce)
    assert written
    assert_holds_the_pairs(again)
    if (name, damage) != ("manifest.json", "missing"):
        (said,) = capsys.readouterr().out.splitlines()
        assert said.startswith(f"warning: cache {address.rstrip('/')}/{KEY}: it")
        assert name in said
    assert assert_one_sound_cache(address, machine) == again.manifest["id"]


def test_the_machine_that_built_it_mends_what_is_damaged_there(address, machine):
    cache, _ = open_or_build(address, FINGERPRINT, produce)
    filesystem, path = remote(address, f"{cache.manifest['id']}/lengths.npy")
    filesystem.pipe_file(path, DAMAGES["shorter"](filesystem.cat_file(path)))
    assert open_or_build(address, FINGERPRINT, forbidden)[1]  # from what it has
    assert assert_one_sound_cache(address, machine) == cache.manifest["id"]


HOSTILE = ["../outside", "../../../.profile", "/outside", "in/side", ".hidden", "reference-1.npz", "a\nb", "x" * 300]


@pytest.mark.parametrize(
    "change",
    [
        *({"files": {name: {"bytes": 3, "sha256": hashlib.sha256(b"bad").hexdigest()}}} for name in HOSTILE),
        {"files": ["pairs.array_record"]},
        {"files": {}},
        {"files": {"lengths.npy": 3}},
        {"files": {"lengths.npy": {"bytes": -1, "sha256": "0" * 64}}},
        {"id": ".."},
        {"id": "../../x"},
        {"id": 7},
        {"pairs": "50"},
        {"pairs": 51},
        {"sources": [{"name": "a"}]},
        {"sources": None},
        {"fingerprint": []},
    ],
    ids=lambda change: str(change)[:60].encode("unicode_escape").decode(),
)
def test_a_manifest_names_the_files_of_a_cache_only(address, machine, change):
    """Whoever can write to the bucket must not choose where files are written on every machine: not with a checksum."""
    cache, _ = open_or_build(address, FINGERPRINT, produce)
    filesystem, path = remote(address, "manifest.json")
    hostile = {**cache.manifest, **change}
    if isinstance(change.get("files"), dict) and "lengths.npy" not in change["files"]:
        hostile["files"] = {**cache.manifest["files"], **change["files"]} if change["files"] else {}
    filesystem.pipe_file(path, json.dumps(sealed(hostile)).encode())
    for outside in ("outside", f"{cache.manifest['id']}/in/side", f"{cache.manifest['id']}/.hidden"):
        filesystem.makedirs(os.path.dirname(remote(address, outside)[1]), exist_ok=True)
        filesystem.pipe_file(remote(address, outside)[1], b"bad")
    root = machine("second")
    assert open_or_build(address, FINGERPRINT, produce)[1]
    assert {path.name for path in root.iterdir()} == {KEY, f"{KEY}.lock"}
    assert_one_sound_cache(address, machine)


def build_at_once(address, root, calls):
    os.environ["DPO_JAX_CACHE"] = root

    def counted(quarantine):
        with open(calls, "a") as stream:
            stream.write("built\n")
        return (yield from produce(quarantine))

    assert_holds_the_pairs(open_or_build(address, FINGERPRINT, counted)[0])


@pytest.mark.slow
@pytest.mark.parametrize("machines", [2, 4])
def test_processes_on_several_machines_end_with_one_sound_cache(tmp_path, machine, machines):
    address, calls = f"file://{tmp_path}/shared", tmp_path / "calls"
    run_all(build_at_once, [(address, str(tmp_path / str(n // 2)), str(calls)) for n in range(2 * machines)])
    assert 1 <= len(calls.read_text().splitlines()) <= machines  # of two on one machine, one waits for the other
    shared_id = assert_one_sound_cache(address, machine)
    for n in range(machines):
        here = machine(str(n)) / KEY / "manifest.json"
        assert json.loads(here.read_text())["id"] == shared_id


@pytest.mark.parametrize("machines", [2, 8])
def test_machines_that_build_at_the_same_time_end_with_one_sound_cache(tmp_path, machine, monkeypatch, machines):
    """Threads stand for machines; all are building before the first one has finished."""
    address = f"file://{tmp_path}/shared"  # fsspec's memory has one position for all who read a file
    monkeypatch.setattr(shared, "cache_root", lambda _: tmp_path / threading.current_thread().name)
    together, results = threading.Barrier(machines), {}

    def slow(quarantine):
        together.wait(30)
        return (yield from produce(quarantine))

    def build():
        results[threading.current_thread().name] = open_or_build(address, FINGERPRINT, slow)

    threads = [threading.Thread(target=build) for _ in range(machines)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == machines
    monkeypatch.undo()
    shared_id = assert_one_sound_cache(address, machine)
    assert sum(written for _, written in results.values()) == 1
    for cache, _ in results.values():
        assert_holds_the_pairs(cache)
        assert cache.manifest["id"] == shared_id


KILLED_LATER = """
import os, signal, sys
from fsspec.implementations.local import LocalFileSystem
from dpo_jax.data.cache import shared
from tests.data.cache.test_store import FINGERPRINT, produce
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
put = LocalFileSystem.put_file
def half(self, source, target):
    put(self, source, target)
    os.truncate(target, 100)
    die()
def half_a_manifest(store, manifest):
    with open(f"{store.path}/manifest.json", "xb") as file:
        file.write(b'{"format": 2, "id"')  # where writing is not one step
    die()
moment = sys.argv[2]
if moment == "during the upload":
    LocalFileSystem.put_file = half
else:
    shared._create_manifest = die if moment == "before the manifest" else half_a_manifest
shared.open_or_build(sys.argv[1], FINGERPRINT, produce)
"""


@pytest.mark.parametrize(
    "moment", ["while building", "during the upload", "before the manifest", "in the middle of the manifest"]
)
def test_a_killed_builder_leaves_nothing_that_counts(tmp_path, machine, moment):
    address, home = f"file://{tmp_path}/shared", str(machine("killed"))
    if moment == "while building":
        build_and_be_killed(address, DPO_JAX_CACHE=home)
    else:
        command = [sys.executable, "-c", KILLED_LATER, address, moment]
        done = subprocess.run(
            command, cwd=places.ROOT, env=os.environ | {"DPO_JAX_CACHE": home}, timeout=60, check=False
        )
        assert done.returncode == -signal.SIGKILL
    machine("second")
    cache, written = open_or_build(address, FINGERPRINT, produce)
    assert written
    assert_holds_the_pairs(cache)
    assert assert_one_sound_cache(address, machine) == cache.manifest["id"]


def test_of_two_builds_the_first_to_finish_counts(address, machine):
    machine("slow")

    def overtaken(quarantine):
        machine("quick")
        overtaken.first, _ = open_or_build(address, FINGERPRINT, produce)
        machine("slow")
        return (yield from produce(quarantine))

    cache, written = open_or_build(address, FINGERPRINT, overtaken)
    assert not written
    assert cache.manifest["id"] == overtaken.first.manifest["id"]
    assert_holds_the_pairs(cache)
    assert assert_one_sound_cache(address, machine) == cache.manifest["id"]


def test_an_upload_that_another_build_cleared_away(address, machine, monkeypatch):
    machine("slow")
    put = type(fsspec.core.url_to_fs(address)[0]).put_file

    def overtaken(self, source, target, *args, **options):
        monkeypatch.undo()
        machine("quick")
        open_or_build(address, FINGERPRINT, produce)
        machine("slow")
        raise FileNotFoundError(target)

    monkeypatch.setattr(type(fsspec.core.url_to_fs(address)[0]), "put_file", overtaken)
    cache, written = open_or_build(address, FINGERPRINT, produce)
    assert not written
    assert type(fsspec.core.url_to_fs(address)[0]).put_file == put
    assert assert_one_sound_cache(address, machine) == cache.manifest["id"]


def test_an_error_while_building_leaves_nothing(address, machine):
    def failing(quarantine):
        yield from ()
        raise UserError("data.jsonl: damaged")

    with pytest.raises(UserError, match="damaged"):
        open_or_build(address, FINGERPRINT, failing)
    filesystem, path = remote(address, "")
    assert filesystem.find(path.rstrip("/")) == []
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

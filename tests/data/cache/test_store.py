"""The cache: what goes in comes out, only a whole and matching cache is used, and writers do not disturb each other."""

import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dpo_jax.data.cache.shared import open_or_build
from dpo_jax.data.cache.store import cache_root, open_cache
from dpo_jax.data.cache.write import Pair
from dpo_jax.errors import UserError
from tests import places
from tests.processes import run_all

FINGERPRINT = {"files": ["a"], "limit": 3}
PAIRS = [
    Pair([1, 2, number], [3] * (number % 4 + 1), [4, 70_000], number % 2, 2**64 - 1 - number) for number in range(50)
]


def produce(quarantine):
    quarantine.write_text("")
    yield from PAIRS
    return {"kept": len(PAIRS)}


def forbidden(quarantine):
    raise AssertionError("the cache was built again")
    yield


def assert_holds_the_pairs(cache):
    assert len(cache) == len(PAIRS)
    for number, pair in enumerate(PAIRS):
        for found, expected in zip(cache[number], pair[:3], strict=True):
            assert found.dtype == np.int32
            assert found.tolist() == expected
    assert cache.lengths.tolist() == [[len(part) for part in pair[:3]] for pair in PAIRS]
    assert cache.lengths.dtype == np.int32
    assert cache.source.tolist() == [pair.source for pair in PAIRS]
    assert cache.prompt_hash.tolist() == [pair.prompt_hash for pair in PAIRS]


def test_pairs_come_back_as_they_went_in(tmp_path):
    cache, built = open_or_build(str(tmp_path), FINGERPRINT, produce)
    assert built
    assert_holds_the_pairs(cache)
    assert cache.manifest["kept"] == len(PAIRS)
    again, built = open_or_build(str(tmp_path), FINGERPRINT, forbidden)
    assert not built
    assert_holds_the_pairs(again)
    for index in (-1, 50):
        with pytest.raises(IndexError):
            cache[index]


def test_another_fingerprint_is_another_cache(tmp_path):
    first, _ = open_or_build(str(tmp_path), FINGERPRINT, produce)
    second, built = open_or_build(str(tmp_path), {**FINGERPRINT, "limit": 4}, produce)
    assert built
    assert first.directory != second.directory


def test_a_cache_pickles_as_its_directory(tmp_path):
    cache, _ = open_or_build(str(tmp_path), FINGERPRINT, produce)
    assert len(pickle.dumps(cache)) < 400
    assert_holds_the_pairs(pickle.loads(pickle.dumps(cache)))


def test_an_empty_cache_is_a_cache(tmp_path):
    def nothing(quarantine):
        yield from ()
        return {}

    cache, _ = open_or_build(str(tmp_path), FINGERPRINT, nothing)
    assert len(cache) == 0
    assert cache.lengths.shape == (0, 3)


def test_an_error_while_writing_leaves_nothing(tmp_path):
    def failing(quarantine):
        yield PAIRS[0]
        raise UserError("data.jsonl: damaged")

    with pytest.raises(UserError, match="damaged"):
        open_or_build(str(tmp_path), FINGERPRINT, failing)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_the_garbage_collector_is_left_as_it_was(tmp_path):
    def watched(quarantine):
        assert gc.isenabled()
        assert gc.get_freeze_count()
        return (yield from produce(quarantine))

    def failing(quarantine):
        yield PAIRS[0]
        raise ValueError("broken row")

    open_or_build(str(tmp_path), FINGERPRINT, watched)
    assert not gc.get_freeze_count()
    with pytest.raises(ValueError, match="broken row"):
        open_or_build(str(tmp_path), {"files": ["b"]}, failing)
    assert not gc.get_freeze_count()


@pytest.mark.parametrize("name", ["pairs.array_record", "lengths.npy", "source.npy", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "shorter", "empty"])
def test_a_damaged_cache_is_built_again(tmp_path, name, damage):
    cache, _ = open_or_build(str(tmp_path), FINGERPRINT, produce)
    path = Path(cache.directory) / name
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 8 if damage == "shorter" else 0)
    with pytest.raises(UserError, match="damaged"):
        open_cache(cache.directory)
    again, built = open_or_build(str(tmp_path), FINGERPRINT, produce)
    assert built
    assert_holds_the_pairs(again)
    assert len(list(tmp_path.iterdir())) == 2  # the cache and its lock


def test_a_cache_of_another_version_or_fingerprint_is_not_used(tmp_path):
    cache, _ = open_or_build(str(tmp_path), FINGERPRINT, produce)
    manifest = Path(cache.directory) / "manifest.json"
    for change in ({"format": 0}, {"fingerprint": {"files": ["b"]}}):
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
        assert open_or_build(str(tmp_path), FINGERPRINT, produce)[1]


def test_of_several_threads_one_writes_and_the_others_wait(tmp_path):
    """A lock of each thread's own, as several processes have."""
    built, found = [], []

    def slow(quarantine):
        built.append(1)
        time.sleep(0.2)
        return (yield from produce(quarantine))

    threads = [
        threading.Thread(target=lambda: found.append(open_or_build(str(tmp_path), FINGERPRINT, slow))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert built == [1]
    assert sorted(written for _, written in found) == [False, False, False, True]
    for cache, _ in found:
        assert_holds_the_pairs(cache)


def build_slowly(root, calls):
    def slow(quarantine):
        with open(calls, "a") as stream:
            stream.write("built\n")
        time.sleep(0.5)
        return (yield from produce(quarantine))

    cache, _ = open_or_build(root, FINGERPRINT, slow)
    assert_holds_the_pairs(cache)


@pytest.mark.parametrize("writers", [2, 4])
@pytest.mark.slow
def test_of_several_writers_one_writes_and_the_others_wait(tmp_path, writers):
    run_all(build_slowly, [(str(tmp_path / "cache"), str(tmp_path / "calls"))] * writers)
    assert (tmp_path / "calls").read_text() == "built\n"


KILLED = """
import os, signal, sys
from tests.data.cache.test_store import FINGERPRINT, PAIRS
from dpo_jax.data.cache.shared import open_or_build
def dying(quarantine):
    yield from PAIRS
    os.kill(os.getpid(), signal.SIGKILL)
open_or_build(sys.argv[1], FINGERPRINT, dying)
"""


def build_and_be_killed(cache_dir, **environment):
    """A process that is killed when it has written all pairs and nothing else."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(cache_dir)],
        cwd=places.ROOT,
        env=os.environ | environment,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL


def test_a_killed_writer_leaves_nothing_that_is_taken_for_whole(tmp_path):
    build_and_be_killed(tmp_path)
    (left,) = tmp_path.glob("*.building-*")
    os.utime(left, (0, 0))  # long ago
    cache, built = open_or_build(str(tmp_path), FINGERPRINT, produce)
    assert built
    assert_holds_the_pairs(cache)
    assert not left.exists()


def test_opening_a_cache_imports_no_jax(tmp_path):
    cache, _ = open_or_build(str(tmp_path), FINGERPRINT, produce)
    code = (
        "import sys; import dpo_jax.data.prepare; from dpo_jax.data.cache.store import open_cache; "
        "assert open_cache(sys.argv[1])[3][0].tolist() == [1, 2, 3]; assert 'jax' not in sys.modules"
    )
    root = places.ROOT
    subprocess.run([sys.executable, "-c", code, cache.directory], cwd=root, timeout=60, check=True)


def test_where_caches_lie(tmp_path, monkeypatch):
    monkeypatch.delenv("DPO_JAX_CACHE", raising=False)
    assert cache_root() == Path.home() / ".cache/dpo_jax"
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    assert cache_root("/elsewhere") == Path("/elsewhere")
    assert cache_root("gs://bucket/cache") == tmp_path  # where the copies of a shared cache lie
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        open_or_build(str(tmp_path / "file" / "cache"), FINGERPRINT, produce)

"""The cache: what goes in comes out, only a whole and matching cache is used, and writers do not disturb each other."""

import gc
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dpo_jax.bucket.local import cache_root
from dpo_jax.data.cache import lock
from dpo_jax.data.cache.manifest import sealed
from dpo_jax.data.cache.shared import open_or_build
from dpo_jax.data.cache.store import cache_key, open_cache
from dpo_jax.data.cache.write import Pair
from dpo_jax.errors import SAVE_FAILED, UserError
from tests import places
from tests.disks import grow, small_disk
from tests.processes import run_all

FINGERPRINT = {"files": ["a"], "limit": 3}
PAIRS = [Pair([1, 2, n], [3] * (n % 4 + 1), [4, 70_000], n % 2, 2**64 - 1 - n, n % 3, n + 1) for n in range(50)]


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


FILES = ("pairs.array_record", "lengths.npy", "source.npy", "prompt_hash.npy", "origin.npy", "quarantine.jsonl")
DAMAGES = {
    "missing": lambda content: None,
    "shorter": lambda content: content[:-8],
    "empty": lambda content: b"",
    "flipped": lambda content: content[:-9] + bytes([content[-9] ^ 4]) + content[-8:],
    "flipped in the middle": lambda content: content[:140] + bytes([content[140] ^ 128]) + content[141:],
    "shifted": lambda content: content[:128] + content[132:] + content[128:132],
    "zeros": lambda content: b"\0" * len(content),
}


def change(path, damage):
    """Damage a file as `DAMAGES` says."""
    content = DAMAGES[damage](path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)


def with_bad_rows(quarantine):
    """The pairs, and a file of bad rows that can be damaged."""
    rest = produce(quarantine)
    first = next(rest)
    quarantine.write_text('{"reason": "invalid_json"}\n' * 20)
    yield first
    return (yield from rest)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, damage) for name in ("lengths.npy", "manifest.json") for damage in DAMAGES),
        *((name, damage) for name in FILES for damage in ("missing", "flipped", "shifted") if name != "lengths.npy"),
    ],
)
def test_a_damaged_cache_is_made_again_and_a_line_says_so(tmp_path, capsys, name, damage):
    cache, _ = open_or_build(str(tmp_path), FINGERPRINT, with_bad_rows)
    change(Path(cache.directory) / name, damage)
    with pytest.raises(UserError, match="damaged"):
        open_cache(cache.directory)
    assert not capsys.readouterr().out
    again, built = open_or_build(str(tmp_path), FINGERPRINT, with_bad_rows)
    assert built
    assert_holds_the_pairs(again)
    assert again.manifest["content"] == cache.manifest["content"]
    assert len(list(tmp_path.iterdir())) == 2  # the cache and its lock
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith(f"warning: cache {cache.directory}: it ")
    assert name in said
    assert said.endswith("; it is made anew")


def test_a_block_that_is_damaged_later_ends_the_run_in_a_line_and_the_next_start_mends_it(tmp_path):
    cache, _ = open_or_build(str(tmp_path), FINGERPRINT, produce)
    records = Path(cache.directory) / "pairs.array_record"
    content = bytearray(records.read_bytes())
    for place in [place for place, byte in enumerate(content) if byte][10::50]:
        content[place] ^= 16
    records.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged while it was read \(pair \d+.*the same command") as caught:
        [cache[number] for number in range(len(cache))]
    assert caught.value.code == SAVE_FAILED
    assert open_or_build(str(tmp_path), FINGERPRINT, produce)[1]


def test_what_was_computed_for_the_pairs_outlives_a_damaged_cache(tmp_path):
    cache, _ = open_or_build(str(tmp_path), FINGERPRINT, produce)
    (Path(cache.directory) / "reference-12.npz").write_text("values")
    change(Path(cache.directory) / "lengths.npy", "flipped")
    again, _ = open_or_build(str(tmp_path), FINGERPRINT, produce)
    assert (Path(again.directory) / "reference-12.npz").read_text() == "values"
    assert not open_or_build(str(tmp_path), FINGERPRINT, forbidden)[1]  # it is no file of the cache


def test_a_manifest_of_another_version_or_of_other_rows_is_not_used(tmp_path, capsys):
    cache, _ = open_or_build(str(tmp_path), FINGERPRINT, produce)
    path = Path(cache.directory) / "manifest.json"
    of_version_2 = {"format": 2, "id": "a", "bytes": {"lengths.npy": 728}, "fingerprint": FINGERPRINT}
    of_other_rows = sealed({**json.loads(path.read_text()), "fingerprint": {"files": ["b"]}})
    for manifest, words in ((of_version_2, "another version of this package made it"), (of_other_rows, "other rows")):
        path.write_text(json.dumps(manifest))
        assert open_or_build(str(tmp_path), FINGERPRINT, produce)[1]
        (said,) = capsys.readouterr().out.splitlines()
        assert words in said


def test_of_the_same_rows_read_by_other_code_a_line_says_why_they_are_read_again(tmp_path, capsys):
    earlier, _ = open_or_build(str(tmp_path), {**FINGERPRINT, "code": "earlier"}, produce)
    open_or_build(str(tmp_path), {**FINGERPRINT, "limit": 7, "code": "now"}, produce)
    assert not capsys.readouterr().out
    assert open_or_build(str(tmp_path), {**FINGERPRINT, "code": "now"}, produce)[1]
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith(f"warning: cache {earlier.directory}: another version")
    assert Path(earlier.directory).exists()


@pytest.mark.parametrize(
    "content",
    [
        b"null",
        b"[]",
        b"3",
        b'"x"',
        b"{}",
        b"[" * 100_000,
        b'{"format": "3"}',
        b'{"format": null, "files": {}}',
        b"\xff\xfe",
        b'{"format": 3, "id": 1, "files": []}',
        b'{"format": 1e999}',
    ],
)
def test_a_manifest_of_another_shape_is_a_damaged_one(tmp_path, content):
    cache, _ = open_or_build(str(tmp_path), FINGERPRINT, produce)
    (Path(cache.directory) / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        open_cache(cache.directory)
    assert open_or_build(str(tmp_path), FINGERPRINT, produce)[1]


@pytest.mark.parametrize("odd", ["a file", "a directory in place of a file", "a link in place of a file"])
def test_what_is_no_cache_gives_way_to_one(tmp_path, odd):
    cache, _ = open_or_build(str(tmp_path), FINGERPRINT, produce)
    directory = Path(cache.directory)
    if odd == "a file":
        shutil.rmtree(directory)
        directory.write_text("")
    else:
        (directory / "source.npy").unlink()
        (directory / "source.npy").mkdir() if "directory" in odd else (directory / "source.npy").symlink_to("/dev/zero")
    again, built = open_or_build(str(tmp_path), FINGERPRINT, produce)
    assert built
    assert_holds_the_pairs(again)


@pytest.mark.slow
def test_comparing_a_cache_with_its_checksums_is_quick(tmp_path):
    """160,800 pairs of 300 tokens: as many as HH has, and longer than they are. It may add two seconds to a start."""
    random = np.random.default_rng(0)
    texts = random.integers(0, 50_000, (160_800, 300), dtype=np.int32)

    def many(quarantine):
        quarantine.write_text("")
        for number, ids in enumerate(texts.tolist()):
            yield Pair(ids[:200], ids[200:250], ids[250:], 0, number)
        return {}

    cache, _ = open_or_build(str(tmp_path), FINGERPRINT, many)
    assert sum(file["bytes"] for file in cache.manifest["files"].values()) > 50e6
    began = time.process_time()
    assert not open_or_build(str(tmp_path), FINGERPRINT, forbidden)[1]
    assert time.process_time() - began < 2


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


FROZEN = """
import os, signal, sys, time
from tests.data.cache.test_store import FINGERPRINT, produce
from dpo_jax.data.cache.shared import open_or_build
def freezing(quarantine):
    os.kill(os.getpid(), signal.SIGSTOP)
    return (yield from produce(quarantine))
print(open_or_build(sys.argv[1], FINGERPRINT, freezing)[1])
"""


def test_a_builder_that_is_frozen_is_not_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "SILENT_SECONDS", 1.0)
    command = [sys.executable, "-c", FROZEN, str(tmp_path)]
    with subprocess.Popen(command, cwd=places.ROOT, stdout=subprocess.PIPE, text=True) as frozen:
        try:
            assert os.WIFSTOPPED(os.waitpid(frozen.pid, os.WUNTRACED)[1])
            cache, built = open_or_build(str(tmp_path), FINGERPRINT, produce)
            assert built
            assert_holds_the_pairs(cache)
            (said,) = capsys.readouterr().out.splitlines()
            assert f"process {frozen.pid} on " in said
            assert "has not moved for 1 s" in said
            os.kill(frozen.pid, signal.SIGCONT)  # it finds the cache of the one that did not wait
            assert frozen.communicate(timeout=60)[0] == "False\n"
            assert frozen.returncode == 0
        finally:
            frozen.kill()
    assert_holds_the_pairs(cache)
    assert not open_or_build(str(tmp_path), FINGERPRINT, forbidden)[1]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_builder_that_moves_is_waited_for_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "SILENT_SECONDS", 0.8)
    monkeypatch.setattr(lock, "_FIRST_WORD_SECONDS", 0.5)
    inside, found = threading.Event(), []

    def slow(quarantine):
        inside.set()
        time.sleep(2)
        return (yield from produce(quarantine))

    builder = threading.Thread(target=lambda: found.append(open_or_build(str(tmp_path), FINGERPRINT, slow)))
    builder.start()
    assert inside.wait(30)
    assert not open_or_build(str(tmp_path), FINGERPRINT, forbidden)[1]
    builder.join(30)
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith(f"warning: waiting for process {os.getpid()} on ")


@pytest.mark.parametrize("odd", ["link", "directory", "pipe"])
def test_a_lock_that_is_none_is_one_line(tmp_path, odd):
    key = cache_key(FINGERPRINT)
    path, victim = tmp_path / f"{key}.lock", tmp_path / "victim"
    victim.write_text("kept")
    {"link": lambda: path.symlink_to(victim), "directory": path.mkdir, "pipe": lambda: os.mkfifo(path)}[odd]()
    with pytest.raises(UserError, match=r"cache_dir=.*cannot be written"):
        open_or_build(str(tmp_path), FINGERPRINT, forbidden)
    assert victim.read_text() == "kept"


def test_a_full_disk_under_the_cache_is_74_and_the_same_call_goes_on_when_there_is_room(tmp_path):
    random = np.random.default_rng(0)

    def large(quarantine):
        quarantine.write_text("")
        for number in range(3000):
            yield Pair(random.integers(0, 2**31, 300).tolist(), [1], [2], 0, number)
        return {}

    with small_disk(tmp_path / "disk", "1m"):
        for _ in range(2):
            with pytest.raises(UserError, match=r"No space left on device; make room, then give the same") as caught:
                open_or_build(str(tmp_path / "disk"), FINGERPRINT, large)
            assert caught.value.code == SAVE_FAILED
            assert [path.suffix for path in (tmp_path / "disk").iterdir()] == [".lock"]
        grow(tmp_path / "disk", "50m")
        cache, built = open_or_build(str(tmp_path / "disk"), FINGERPRINT, large)
        assert built
        assert len(cache[2999][0]) == 300


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

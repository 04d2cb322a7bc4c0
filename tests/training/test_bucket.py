"""Checkpoints in a bucket: whole by their last object, compared with their checksums, set aside when damaged."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dpo_jax import train
from dpo_jax.bucket.path import as_path
from dpo_jax.config.file import get_config
from dpo_jax.config.settings import read_settings
from dpo_jax.errors import SAVE_FAILED, UserError
from dpo_jax.records.directory import checkpoint_directories
from dpo_jax.training import checkpoint
from dpo_jax.training.setup import keep_compiled
from dpo_jax.weights.hub import resolve_model
from tests.fakes.bucket import Bucket

# Google's client leaves a connection open where the answer is an error.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

_CACHE, _LEAST_SECONDS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
MODEL = Path("tests/golden/trl/tiny")


def tree(value):
    return {"a": jnp.full((64, 8), value), "b": {"c": jnp.arange(5.0) + value}}


ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree(0.0))


def saved(directory, *steps, keep=5):
    with checkpoint.open_checkpoints(directory, keep) as checkpoints:
        for step in steps:
            checkpoint.save_checkpoint(checkpoints, step, tree(float(step)))


@pytest.mark.slow
def test_the_checksums_come_before_the_mark_and_old_ones_go_afterwards(bucket):
    directory = as_path("gs://bucket/order/checkpoints")
    saved(directory, 1, 2, 3, keep=2)
    assert list(checkpoint_directories(as_path("gs://bucket/order"))) == [2, 3]
    written = [key for method, key in bucket.asked if method in ("POST", "PUT")]
    for step in (1, 2, 3):
        sums, mark = (
            written.index(f"order/checkpoints/{step}/{name}") for name in ("checksums.json", "commit_success.txt")
        )
        assert sums < mark
        assert {key for key in written[mark:] if f"checkpoints/{step}/" in key} == {written[mark]}
    listed = json.loads(bucket.get("order/checkpoints/3/checksums.json"))
    held = {key.removeprefix("order/checkpoints/3/") for key in bucket.keys("order/checkpoints/3/")}
    assert held - set(listed) == {"checksums.json", "commit_success.txt", "_CHECKPOINT_METADATA"}
    with checkpoint.open_checkpoints(directory, 2) as checkpoints:
        assert checkpoint.latest_step(checkpoints) == 3
        found = checkpoint.restore(checkpoints, 3, ABSTRACT)
    np.testing.assert_array_equal(found["a"], tree(3.0)["a"])


@pytest.mark.slow
def test_one_that_was_cut_off_is_removed_and_none_of_the_checkpoints(bucket):
    directory = as_path("gs://bucket/cut/checkpoints")
    saved(directory, 1, 2)
    bucket.delete("cut/checkpoints/2/commit_success.txt")
    assert checkpoint.set_aside_damaged(directory) == []
    with checkpoint.open_checkpoints(directory, 5) as checkpoints:
        assert checkpoint.latest_step(checkpoints) == 1
    assert bucket.keys("cut/checkpoints/2/") == []


def damaged(bucket, key):
    content = bytearray(bucket.get(key))
    content[len(content) // 2] ^= 1
    bucket.put(key, bytes(content))


@pytest.mark.slow
def test_whatever_object_is_damaged_is_named_and_the_checkpoint_set_aside(bucket):
    directory = as_path("gs://bucket/damaged-run/checkpoints")
    saved(directory, 1)
    sound = {key: bucket.get(key) for key in bucket.keys("damaged-run/checkpoints/1/")}
    data = next(key for key in sound if "/state/d/" in key)
    others = [key for key in sound if key.endswith(("/1/checksums.json", "/state/_METADATA", "/state/manifest.ocdbt"))]
    for harm in (damaged, Bucket.delete):
        for key in (data, *others[: 3 if harm is damaged else 1]):
            harm(bucket, key)
            (said,) = checkpoint.set_aside_damaged(directory)
            assert said.startswith("checkpoint 1 is damaged ("), said
            assert key.removeprefix("damaged-run/checkpoints/1/").split("/")[-1] in said
            assert "it is now gs://bucket/damaged-run/damaged/1" in said
            assert bucket.keys("damaged-run/checkpoints/") == []
            for path in [*bucket.keys("damaged-run/damaged/")]:
                bucket.delete(path)
            for path, content in sound.items():
                bucket.put(path, content)
    assert checkpoint.set_aside_damaged(directory) == []
    assert sorted(sound) == bucket.keys("damaged-run/checkpoints/1/")


def test_a_bucket_that_does_not_answer_damages_nothing(bucket, monkeypatch):
    directory = as_path("gs://bucket/silent/checkpoints")
    saved(directory, 1)
    monkeypatch.setenv("DPO_JAX_BUCKET_SECONDS", "1")
    for name in ("checksums.json", "_CHECKPOINT_METADATA", "manifest.ocdbt"):
        bucket.fault = lambda method, key, name=name: 503 if key.endswith(name) else None
        with pytest.raises(UserError, match="the bucket did not answer for 1 s"):
            checkpoint.set_aside_damaged(directory)
    bucket.calm()
    assert checkpoint.set_aside_damaged(directory) == []


@pytest.mark.slow
def test_the_newest_sound_one_is_next(bucket):
    directory = as_path("gs://bucket/next/checkpoints")
    saved(directory, 1, 2, 3)
    data = next(key for key in bucket.keys("next/checkpoints/3/state/d/"))
    damaged(bucket, data)
    (said,) = checkpoint.set_aside_damaged(directory)
    assert "checkpoint 3 is damaged" in said
    with checkpoint.open_checkpoints(directory, 5) as checkpoints:
        assert checkpoint.latest_step(checkpoints) == 2


def test_a_checkpoint_that_was_copied_to_a_disk_is_sound_there(bucket, tmp_path):
    saved(as_path("gs://bucket/copy/checkpoints"), 4)
    local = bucket.get_tree("copy", tmp_path / "copy")
    assert checkpoint.set_aside_damaged(local / "checkpoints") == []
    found = checkpoint.restore_part(local / "checkpoints/4", ABSTRACT)
    np.testing.assert_array_equal(found["b"]["c"], tree(4.0)["b"]["c"])
    path = next((local / "checkpoints/4/state/d").iterdir())
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "is damaged" in checkpoint.set_aside_damaged(local / "checkpoints")[0]


def test_one_that_was_local_is_sound_in_a_bucket(bucket, tmp_path):
    saved(tmp_path / "checkpoints", 4)
    bucket.put_tree(tmp_path / "checkpoints", "moved/checkpoints")
    directory = as_path("gs://bucket/moved/checkpoints")
    assert checkpoint.set_aside_damaged(directory) == []
    with checkpoint.open_checkpoints(directory, 5) as checkpoints:
        assert checkpoint.latest_step(checkpoints) == 4
        np.testing.assert_array_equal(checkpoint.restore(checkpoints, 4, ABSTRACT)["a"], tree(4.0)["a"])


def test_a_tree_of_its_own_and_its_damage(bucket):
    directory = as_path("gs://bucket/reference-run/reference")
    checkpoint.save_tree(directory, tree(7.0))
    np.testing.assert_array_equal(checkpoint.restore_tree(directory, ABSTRACT)["a"], tree(7.0)["a"])
    damaged(bucket, next(key for key in bucket.keys("reference-run/reference/") if "/d/" in key))
    with pytest.raises(
        UserError, match=r"gs://bucket/reference-run/reference is damaged \(.*d/.* is not what was written"
    ):
        checkpoint.restore_tree(directory, ABSTRACT)


@pytest.mark.slow
def test_a_storm_does_not_stop_a_save(bucket):
    refused = set()

    def fault(method, key):  # each object once, when it is written
        if method == "GET" or key in refused:
            return None
        refused.add(key)
        return (429, 503)[len(refused) % 2]

    bucket.fault = fault
    directory = as_path("gs://bucket/stormy/checkpoints")
    saved(directory, 1)
    bucket.calm()
    assert checkpoint.set_aside_damaged(directory) == []
    assert list(checkpoint_directories(as_path("gs://bucket/stormy"))) == [1]


def test_a_save_that_is_not_allowed_is_one_line(bucket):
    directory = as_path("gs://bucket/forbidden/checkpoints")
    bucket.fault = lambda method, key: 403 if "checkpoints/1/state" in key and method != "GET" else None
    with pytest.raises(UserError) as caught:
        saved(directory, 1)
    assert "\n" not in str(caught.value)
    assert caught.value.code == SAVE_FAILED
    assert str(caught.value).startswith("gs://bucket/forbidden/checkpoints: a checkpoint could not be saved (")
    bucket.calm()
    assert checkpoint_directories(as_path("gs://bucket/forbidden")) == {}


# ---- models


def test_a_model_in_a_bucket_is_copied_once_and_again_where_it_has_changed(bucket):
    bucket.put_tree(MODEL, "models/tiny")
    files = resolve_model("gs://bucket/models/tiny")
    assert {p.name for p in files.directory.iterdir()} <= {p.name for p in MODEL.iterdir()}
    for path in files.directory.iterdir():
        assert path.read_bytes() == (MODEL / path.name).read_bytes()
    bucket.asked.clear()
    assert resolve_model("gs://bucket/models/tiny/").directory == files.directory
    assert len(bucket.asked) == 1  # one listing tells that all is as it was
    bucket.put("models/tiny/config.json", bucket.get("models/tiny/config.json") + b"\n")
    again = resolve_model("gs://bucket/models/tiny")
    assert again.directory != files.directory
    assert (again.directory / "config.json").read_bytes().endswith(b"\n\n")


@pytest.mark.parametrize("what", ["model", "reference"])
def test_a_model_that_is_not_in_the_bucket(bucket, what):
    bucket.put("others/notes.txt", b"x")
    for address, words in (
        ("gs://bucket/none", "there is no such directory"),
        ("gs://bucket/others", "has no file of a model"),
        ("gs://bucket", "is no address in a bucket|needs a directory"),
        ("gs://no-such-bucket/model", "there is no such bucket"),
    ):
        with pytest.raises(UserError, match=words):
            resolve_model(address, what=what)
    with pytest.raises(UserError, match=f"{what}_?.*revision|in a bucket, where nothing has a revision"):
        resolve_model("gs://bucket/none", what=what, revision="main")


def test_a_model_whose_object_is_cut_off_while_it_is_copied(bucket, tmp_path, monkeypatch):
    bucket.put_tree(MODEL, "models/busy")
    monkeypatch.setenv("DPO_JAX_BUCKET_SECONDS", "1")
    bucket.fault = lambda method, key: 503 if key.endswith("model.safetensors") else None
    with pytest.raises(UserError, match="did not answer for 1 s") as caught:
        resolve_model("gs://bucket/models/busy")
    assert caught.value.code == SAVE_FAILED
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    bucket.calm()
    assert resolve_model("gs://bucket/models/busy").directory.is_dir()


# ---- what is wrong with a workdir is said at once


def refused(capfd, workdir):
    code = train.main(["train", "--config=configs/hhh.py:tiny", f"--workdir={workdir}"])
    said = capfd.readouterr().err
    assert said.startswith("error: "), said
    assert said.count("\n") == 1, said
    return code, said


def test_a_workdir_that_cannot_be_used(bucket, capfd, monkeypatch):
    monkeypatch.setenv("DPO_JAX_BUCKET_SECONDS", "1")
    for status, code, words in (
        (401, 2, "no Google credentials that the bucket takes"),
        (403, 2, "not allowed (403"),
        (429, SAVE_FAILED, "did not answer for 1 s (429"),
        (503, SAVE_FAILED, "did not answer for 1 s (503"),
        (4.0, SAVE_FAILED, "did not answer for 1 s"),
    ):
        bucket.fault = lambda method, key, status=status: status
        found, said = refused(capfd, "gs://bucket/any")
        assert (found, words in said) == (code, True), said
    bucket.calm()
    code, said = refused(capfd, "gs://no-such-bucket/run")
    assert code == 2
    assert "gs://no-such-bucket: there is no such bucket" in said
    code, said = refused(capfd, "gs://bucket")
    assert code == 2
    assert "give gs://BUCKET/DIR" in said


def test_compiled_programs_are_kept_in_a_bucket(bucket):
    config = dict(get_config("configs/hhh.py:tiny")) | {"compilation_cache": "gs://bucket/compiled"}
    before = {name: jax.config.values[name] for name in (_CACHE, _LEAST_SECONDS)}
    jax.config.update(_CACHE, None)
    try:
        keep_compiled(read_settings(config))
        assert jax.config.values[_CACHE] == "gs://bucket/compiled"
        jax.config.update(_LEAST_SECONDS, 0.0)
        compilation_cache.reset_cache()
        for _ in range(2):
            jax.clear_caches()
            assert jax.jit(lambda x: x * 3 + 1)(jnp.ones(7)).sum() == 28
        kept = [key for key in bucket.keys("compiled/") if key.endswith("-cache")]
        assert kept
        assert [key for method, key in bucket.asked if method == "GET" and key in kept]
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_a_cache_of_compiled_programs_in_a_bucket_that_is_not_there(bucket):
    config = dict(get_config("configs/hhh.py:tiny")) | {"compilation_cache": "gs://no-such-bucket/compiled"}
    before = jax.config.values[_CACHE]
    jax.config.update(_CACHE, None)
    try:
        with pytest.raises(UserError, match="gs://no-such-bucket: there is no such bucket"):
            keep_compiled(read_settings(config))
        assert jax.config.values[_CACHE] is None
    finally:
        jax.config.update(_CACHE, before)

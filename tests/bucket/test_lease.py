"""One run at a time in a directory of a bucket: free when the other gave no sign for long."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from dpo_jax.bucket import client, lease
from dpo_jax.bucket.path import as_path
from dpo_jax.errors import UserError

HOLDS = """
import sys, time
from dpo_jax.bucket import lease
from dpo_jax.bucket.path import as_path
lease.BEAT_SECONDS = float(sys.argv[2])
with lease.leased(as_path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def quick(monkeypatch):
    """Signs of life every tenth of a second."""
    for name, value in {"BEAT_SECONDS": 0.1, "EXPIRES_SECONDS": 0.6, "_LOOK_SECONDS": 0.05}.items():
        monkeypatch.setattr(lease, name, value)


@contextlib.contextmanager
def holder(bucket, directory, beat=10.0):
    """Another process that holds the directory."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(directory), str(beat)],
        env=os.environ | bucket.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "held\n", process.stderr.read()
        try:
            yield process
        finally:
            process.kill()


def elsewhere(bucket, key):
    """Let a lease be of another machine, whose processes cannot be seen."""
    bucket.put(key, json.dumps(json.loads(bucket.get(key)) | {"machine": "another", "host": "far"}).encode())


def test_it_is_there_while_held_and_gone_afterwards(bucket):
    directory = as_path("gs://bucket/held")
    with lease.leased(directory):
        assert bucket.keys("held/") == ["held/lease.json"]
        with (
            pytest.raises(UserError, match=r"workdir gs://bucket/held is in use by process \d+ on"),
            lease.leased(directory),
        ):
            pass
        assert bucket.keys("held/") == ["held/lease.json"]
    assert bucket.keys("held/") == []


def test_a_holder_that_was_killed_is_seen_to_be_gone_at_once(bucket):
    directory = as_path("gs://bucket/killed")
    with holder(bucket, directory) as process:
        with pytest.raises(UserError, match=f"in use by process {process.pid} on"), lease.leased(directory):
            pass
        process.kill()  # and not waited for: its number is still taken
        time.sleep(0.2)
        bucket.asked.clear()
        with lease.leased(directory):
            assert len(bucket.asked) <= 4


def test_a_holder_elsewhere_is_refused_while_it_gives_signs_and_free_when_it_gave_none(bucket, quick, capfd):
    directory, key = as_path("gs://bucket/elsewhere"), "elsewhere/lease.json"
    with lease.leased(directory):
        elsewhere(bucket, key)
    assert bucket.keys("elsewhere/") == [key]  # it is not ours any more
    over = threading.Event()

    def beats():
        while not over.wait(0.1):
            bucket.put(key, bucket.get(key))

    thread = threading.Thread(target=beats)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"in use by process \d+ on far; wait for it"), lease.leased(directory):
            pass
    finally:
        over.set()
        thread.join()
    began = time.monotonic()
    with lease.leased(directory):
        assert 0.5 < time.monotonic() - began < 3
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "which gives no sign; waiting" in said


def test_a_bucket_that_does_not_answer_is_not_asked_again_at_the_end(bucket):
    with contextlib.suppress(client.BucketError), lease.leased(as_path("gs://bucket/silent")):
        bucket.fault = lambda method, key: 503
        bucket.asked.clear()
        raise client.BucketError("it does not answer")
    assert bucket.asked == []


def test_only_one_of_many_gets_it(bucket):
    directory, got, refused = as_path("gs://bucket/many"), [], []
    start, end = threading.Barrier(5), threading.Event()

    def run():
        start.wait()
        try:
            with lease.leased(directory):
                got.append(1)
                end.wait(10)
        except UserError:
            refused.append(1)
            if len(refused) == 4:
                end.set()

    threads = [threading.Thread(target=run) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 4)


def test_a_holder_whose_lease_was_taken_ends_with_a_line(bucket):
    directory = as_path("gs://bucket/taken")
    with holder(bucket, directory, beat=0.1) as process:
        bucket.put("taken/lease.json", json.dumps({"process": 7, "host": "another"}).encode())
        assert process.wait(20) == 2
        said = process.stderr.read()
    assert said.startswith("error: workdir gs://bucket/taken is held by process 7 on another now"), said
    assert said.count("\n") == 1
    assert json.loads(bucket.get("taken/lease.json"))["process"] == 7


@pytest.mark.parametrize("content", [b"", b"null", b"{", b"[]", b'{"process": "x", "host": 3}', b"\xff"])
def test_a_lease_that_says_nothing_expires_too(bucket, quick, content):
    bucket.put("nonsense/lease.json", content)
    with lease.leased(as_path("gs://bucket/nonsense")):
        assert json.loads(bucket.get("nonsense/lease.json"))["beat"] == 0

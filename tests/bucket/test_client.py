"""Whatever a bucket answers is an object, or one line that says what to do."""

import time

import pytest

from dpo_jax.bucket import client
from dpo_jax.errors import SAVE_FAILED, UserError
from tests.fakes.bucket import BUCKET, forget_client

# Google's client leaves a connection open where the answer is an error.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def refused(ask):
    """The message of a UserError, and its code; it is one line."""
    with pytest.raises(UserError) as caught:
        ask()
    assert "\n" not in str(caught.value)
    return str(caught.value), caught.value.code


def test_objects_come_back_as_they_went(bucket):
    first = client.write_object(BUCKET, "come/a", b"one")
    assert client.read_object(BUCKET, "come/a") == (b"one", first)
    second = client.write_object(BUCKET, "come/a", b"two", generation=first)
    assert client.read_object(BUCKET, "come/a") == (b"two", second)
    held = client.find_object(BUCKET, "come/a")
    assert (held.size, held.generation, held.crc32c) == (3, second, "FRxiXg==") or held.crc32c
    client.copy_object(BUCKET, "come/a", "come/b/c")
    objects, below = client.list_objects(BUCKET, "come/", below=False)
    assert ([one.key for one in objects], below) == (["come/a"], ["come/b/"])
    assert [one.key for one in client.list_objects(BUCKET, "come/")[0]] == ["come/a", "come/b/c"]
    client.delete_object(BUCKET, "come/a")
    client.delete_object(BUCKET, "come/a")
    assert client.find_object(BUCKET, "come/a") is None
    with pytest.raises(FileNotFoundError):
        client.read_object(BUCKET, "come/a")


def test_of_two_writers_one_is_told_that_it_was_overtaken(bucket):
    first = client.write_object(BUCKET, "two/a", b"mine", generation=0)
    with pytest.raises(client.Overtaken):
        client.write_object(BUCKET, "two/a", b"theirs", generation=0)
    client.write_object(BUCKET, "two/a", b"mine again", generation=first)
    with pytest.raises(client.Overtaken):
        client.write_object(BUCKET, "two/a", b"theirs", generation=first)
    assert client.read_object(BUCKET, "two/a")[0] == b"mine again"


def test_a_write_whose_answer_was_lost_is_our_own(bucket):
    first = client.write_object(BUCKET, "lost/a", b"content", generation=0)
    assert client.write_object(BUCKET, "lost/a", b"content", generation=0) == first


def test_a_storm_of_429_and_503_is_waited_out(bucket):
    bucket.storm(seed=3, share=0.5)
    for number in range(4):
        client.write_object(BUCKET, f"storm/{number}", str(number).encode())
    assert [client.read_object(BUCKET, f"storm/{number}")[0] for number in range(4)] == [b"0", b"1", b"2", b"3"]
    assert len(bucket.asked) > 8


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_stays_busy_is_one_line_after_a_while(bucket, monkeypatch, status):
    monkeypatch.setenv("DPO_JAX_BUCKET_SECONDS", "1.5")
    bucket.fault = lambda method, path: status
    began = time.monotonic()
    for ask in (
        lambda: client.read_object(BUCKET, "busy/a"),
        lambda: client.write_object(BUCKET, "busy/a", b"x"),
    ):
        message, code = refused(ask)
        assert code == SAVE_FAILED
        assert message.startswith("gs://bucket/busy/a: the bucket did not answer for 2 s ("), message
        assert str(status) in message
        assert "same command" in message
    assert time.monotonic() - began < 10


def test_a_slow_server_is_waited_for_and_one_that_is_silent_is_one_line(bucket, monkeypatch):
    client.write_object(BUCKET, "slow/a", b"late")
    bucket.fault = lambda method, path: 0.3
    assert client.read_object(BUCKET, "slow/a")[0] == b"late"
    monkeypatch.setenv("DPO_JAX_BUCKET_SECONDS", "1")
    bucket.fault = lambda method, path: 4.0
    message, code = refused(lambda: client.read_object(BUCKET, "slow/a"))
    assert code == SAVE_FAILED
    assert "did not answer for 1 s" in message


def test_what_asking_again_does_not_mend_is_said_at_once(bucket):
    for status, words in (
        (401, "no Google credentials that the bucket takes"),
        (403, "not allowed (403"),
        (400, "refused the request (400"),
    ):
        bucket.fault = lambda method, path, status=status: status
        for ask in (
            lambda: client.read_object(BUCKET, "no/a"),
            lambda: client.write_object(BUCKET, "no/a", b"x"),
            lambda: client.list_objects(BUCKET, "no/"),
        ):
            bucket.asked.clear()
            message, code = refused(ask)
            assert (words in message, code) == (True, 2), message
            assert sum("no/" in key or "prefix" in key for _, key in bucket.asked) == 1


def test_a_bucket_that_is_not_there(bucket):
    for ask in (
        lambda: client.list_objects("no-such-bucket", "a/"),
        lambda: client.write_object("no-such-bucket", "a", b"x"),
    ):
        assert refused(ask) == ("gs://no-such-bucket: there is no such bucket; make it, or correct the address", 2)


def test_without_credentials(monkeypatch, tmp_path):
    """Not of the emulator, which asks for none: Google's own client looks for them, and finds none."""
    pytest.importorskip("google.cloud.storage", reason="google-cloud-storage is not installed")
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    forget_client()
    message, code = refused(lambda: client.read_object(BUCKET, "a"))
    assert code == 2
    assert message.startswith("gs://bucket/a: no Google credentials that the bucket takes (")
    assert "gcloud auth application-default login" in message


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "inf"])
def test_a_patience_that_is_none(monkeypatch, text):
    monkeypatch.setenv("DPO_JAX_BUCKET_SECONDS", text)
    assert refused(client.patience) == (
        f"DPO_JAX_BUCKET_SECONDS={text}: must be a positive number of seconds, or unset",
        2,
    )

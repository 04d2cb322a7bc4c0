"""Objects of a Google Cloud Storage bucket: the one door through which a run's files go there and come back.

Every request is tried again while the server is busy, breaks off or does not answer, for `patience()` seconds; what is
left is an error of one line. Credentials are Google's application default; where STORAGE_EMULATOR_HOST is set, none.
"""

import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import IO, Any

from dpo_jax.errors import SAVE_FAILED, UserError

EMULATOR = "STORAGE_EMULATOR_HOST"
PATIENCE = "DPO_JAX_BUCKET_SECONDS"
_PATIENCE_SECONDS = 120.0
_TRY_SECONDS = 60.0  # without a byte, then the request is made anew
_CONNECT_SECONDS = 10.0
_TOLD_AFTER, _TOLD_EVERY = 10.0, 60.0  # seconds of a request that is tried again
_LOGIN = "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS"


class Overtaken(Exception):  # noqa: N818 - not an error by itself
    """An object is not of the generation that was written last: somebody else has written it."""


class BucketError(UserError):
    """A bucket cannot be used, or does not answer: nothing is known of what is in it."""


@dataclasses.dataclass(frozen=True)
class Held:
    """An object as the bucket lists it; `crc32c` is the server's own checksum of its content, in base64."""

    key: str
    size: int
    crc32c: str
    generation: int
    updated: datetime.datetime


def patience() -> float:
    """Seconds for which a request is tried again: $DPO_JAX_BUCKET_SECONDS, else 120.

    Raises:
      UserError: it is no positive number.
    """
    text = os.environ.get(PATIENCE, "")
    try:
        seconds = float(text) if text else _PATIENCE_SECONDS
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"{PATIENCE}={text}: must be a positive number of seconds, or unset")
    return seconds


def check_installed(address: str) -> None:
    """Refuse an address in a bucket, with a UserError, where the packages for it are not installed."""
    for package in ("google.cloud.storage", "gcsfs"):
        with contextlib.suppress(ModuleNotFoundError):  # of a parent package
            if importlib.util.find_spec(package) is not None:
                continue
        raise UserError(f"{address}: needs the package {package}, which is not installed: pip install 'dpo_jax[gcs]'")


@functools.cache
def prepare_libraries() -> None:
    """Let Orbax, tensorstore and JAX, which open gs:// themselves, see what this module sees; called before them.

    Listings are never cached, as other processes write to the same bucket, and errors are told by us, not logged.
    """
    emulator = os.environ.get(EMULATOR, "")
    # By itself tensorstore waits for ever for a server that is silent.
    os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", f"{_CONNECT_SECONDS:.0f}")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", f"{_TRY_SECONDS:.0f}")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    if emulator:
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
        os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "anonymous")
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it asks Google's own servers
    import fsspec

    token = "anon" if emulator else "google_default"
    options = {"use_listings_cache": False, "requests_timeout": _TRY_SECONDS, "token": token}
    for protocol in ("gcs", "gs"):
        fsspec.config.conf.setdefault(protocol, options)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def list_objects(
    bucket: str, prefix: str, *, below: bool = True, most: int | None = None
) -> tuple[list[Held], list[str]]:
    """Objects whose keys begin with `prefix`, by key.

    Args:
      below: False leaves out what has another / after the prefix, and names the beginnings up to it instead.
      most: of objects; None: all.

    Returns:
      The objects, and the beginnings that were left out.

    Raises:
      BucketError: the bucket is not there, or may not be read.
    """
    with _asking(bucket, prefix, of_bucket=True):
        found = google_client().list_blobs(
            bucket, prefix=prefix, delimiter=None if below else "/", max_results=most, **_options()
        )
        objects = [_held(blob) for blob in found]
        return objects, sorted(found.prefixes)


def find_object(bucket: str, key: str) -> Held | None:
    """What the bucket says of an object; None: there is none."""
    with contextlib.suppress(FileNotFoundError), _asking(bucket, key):
        blob = google_client().bucket(bucket).blob(key)
        blob.reload(**_options())
        return _held(blob)
    return None


def read_object(bucket: str, key: str) -> tuple[bytes, int]:
    """The content of an object and its generation, compared with the server's checksum.

    Raises:
      FileNotFoundError: there is no such object.
    """
    with _asking(bucket, key):
        blob = google_client().bucket(bucket).blob(key)
        content = blob.download_as_bytes(**_options())
        return content, int(blob.generation)


def download_object(bucket: str, key: str, file: Any, *, checked: bool = True) -> None:
    """Write the content of an object to anything with `write`; `checked`: it is compared with the server's checksum.

    Raises:
      FileNotFoundError: there is no such object.
    """
    with _asking(bucket, key):
        google_client().bucket(bucket).blob(key).download_to_file(
            file, raw_download=True, checksum="auto" if checked else None, **_options()
        )


def write_object(bucket: str, key: str, content: bytes | IO[bytes], *, generation: int | None = None) -> int:
    """Write an object, whole or not at all.

    Args:
      content: bytes, or a file from where it stands.
      generation: that the object must have now, 0: there must be none; None: whatever there is.

    Returns:
      The generation that it has now.

    Raises:
      Overtaken: it is of another generation.
      BucketError: it cannot be written.
    """
    from google.api_core import exceptions

    blob = google_client().bucket(bucket).blob(key)
    options = _options() | ({} if generation is None else {"if_generation_match": generation})
    with _asking(bucket, key, of_bucket=True):
        try:
            if isinstance(content, bytes):
                blob.upload_from_string(content, content_type="application/octet-stream", **options)
            else:
                blob.upload_from_file(content, **options)
            return int(blob.generation)
        except exceptions.PreconditionFailed:
            pass
    if isinstance(content, bytes):  # our own, of a request whose answer was lost?
        with contextlib.suppress(FileNotFoundError):
            there, now = read_object(bucket, key)
            if there == content:
                return now
    raise Overtaken(f"gs://{bucket}/{key}")


def copy_object(bucket: str, key: str, to: str) -> None:
    """Copy an object within its bucket, by the server."""
    with _asking(bucket, key):
        source, target = (google_client().bucket(bucket).blob(one) for one in (key, to))
        token, _, _ = target.rewrite(source, **_options())
        while token is not None:
            token, _, _ = target.rewrite(source, token=token, **_options())


def delete_object(bucket: str, key: str, *, generation: int | None = None) -> None:
    """Delete an object; nothing happens where there is none, or none of this generation."""
    from google.api_core import exceptions

    missing = contextlib.suppress(FileNotFoundError)
    with missing, _asking(bucket, key), contextlib.suppress(exceptions.PreconditionFailed):
        google_client().bucket(bucket).blob(key).delete(
            **_options() | ({} if generation is None else {"if_generation_match": generation})
        )


@functools.cache
def google_client() -> Any:
    """Google's client: threads share it."""
    prepare_libraries()
    from google.cloud import storage

    return storage.Client()


def _held(blob: Any) -> Held:
    return Held(blob.name, int(blob.size or 0), blob.crc32c or "", int(blob.generation), blob.updated)


def _options() -> dict[str, Any]:
    """How long a request is waited for, and how it is tried again."""
    from google.api_core import retry

    seconds, began, told = patience(), time.monotonic(), 0.0

    def tell(error: Exception) -> None:
        nonlocal told
        now = time.monotonic()
        if now - began > _TOLD_AFTER and now - told > _TOLD_EVERY:
            told = now
            left = max(0.0, seconds - (now - began))
            print(f"the bucket does not answer ({_reason(error)}); trying for {left:.0f} s more", file=sys.stderr)

    trying = retry.Retry(predicate=_passes, initial=0.5, maximum=20.0, multiplier=2.0, timeout=seconds, on_error=tell)
    return {"retry": trying, "timeout": (_CONNECT_SECONDS, min(_TRY_SECONDS, seconds))}


def _passes(error: BaseException) -> bool:
    """Whether an error is of the kind that goes away when asked again."""
    import requests
    import urllib3
    from google.api_core import exceptions
    from google.auth import exceptions as auth
    from google.cloud.storage import exceptions as media

    if isinstance(error, exceptions.GoogleAPICallError):
        return error.code in (408, 429, 500, 502, 503, 504)
    if isinstance(error, media.InvalidResponse):
        return error.response.status_code in (408, 429, 500, 502, 503, 504)
    broken = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError, ConnectionError)
    others = (urllib3.exceptions.HTTPError, media.DataCorruption)
    return isinstance(error, (*broken, *others)) or (isinstance(error, auth.TransportError) and error.retryable)


@contextlib.contextmanager
def _asking(bucket: str, key: str, *, of_bucket: bool = False) -> Iterator[None]:
    """Ask for an object in here; whatever goes wrong is one line. `of_bucket`: what is not found is the bucket."""
    try:
        yield
    except (UserError, Overtaken):
        raise
    except Exception as error:  # of Google's client, its authentication, requests and urllib3: no parent in common
        raise _in_a_line(error, bucket, key, of_bucket) from error


def _in_a_line(error: Exception, bucket: str, key: str, of_bucket: bool) -> BucketError | FileNotFoundError:
    from google.api_core import exceptions
    from google.auth import exceptions as auth

    where, whole = f"gs://{bucket}/{key}", error
    if isinstance(error, exceptions.RetryError) and isinstance(error.cause, Exception):
        error = error.cause
    if isinstance(error, exceptions.Unauthorized | auth.DefaultCredentialsError | auth.RefreshError):
        return BucketError(f"{where}: no Google credentials that the bucket takes ({_reason(error)}); {_LOGIN}")
    if isinstance(error, exceptions.Forbidden):
        return BucketError(
            f"{where}: not allowed (403, {_reason(error)}); let the account have the role Storage Object User on "
            f"gs://{bucket}, or give another bucket"
        )
    if isinstance(error, exceptions.NotFound):
        if of_bucket or "bucket does not exist" in str(error.message):
            return BucketError(f"gs://{bucket}: there is no such bucket; make it, or correct the address")
        return FileNotFoundError(2, "no such object", where)
    if whole is not error or _passes(error):
        return BucketError(
            f"{where}: the bucket did not answer for {patience():.0f} s ({_reason(error)}); what is saved is kept, and "
            "the same command resumes the run when it answers again",
            code=SAVE_FAILED,
        )
    return BucketError(
        f"{where}: the bucket refused the request ({_reason(error)}); correct the address or its settings"
    )


def _reason(error: BaseException) -> str:
    """The kind and the beginning of an error's words, in one line."""
    code, said = getattr(error, "code", None), getattr(error, "message", None) or str(error)
    named = str(int(code)) if isinstance(code, int) else type(error).__name__
    words = " ".join(str(said).split())
    return f"{named}: {words:.160}" if words else named

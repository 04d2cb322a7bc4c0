"""Writing the files of a cache: pairs of token ids as they come, then what is known of them, then the manifest."""

import array
import contextlib
import errno
import gc
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module

from dpo_jax.data.cache.manifest import (
    ARRAYS,
    CONTENT,
    FORMAT,
    IDS_DIGEST,
    LARGEST_ID,
    MANIFEST,
    MARGIN,
    QUARANTINE,
    RECORDS,
    describe_files,
    sealed,
)
from dpo_jax.disk import digest

_LOOK_EVERY = 1000  # pairs, after which the writer is asked whether it can write


class Pair(NamedTuple):
    """One pair on its way into the cache: token ids, its source's number, the hash of its prompt (64 bits), its row.

    The row is `line` (from 1) of the source's file number `file`. All pairs of a cache have a margin, or none has.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    source: int
    prompt_hash: int
    file: int = 0
    line: int = 0
    margin: float | None = None


# Given the path for quarantined rows, yields the pairs and returns what the manifest keeps about them.
Produce = Callable[[Path], Generator[Pair, None, dict[str, Any]]]


def write_pairs(directory: Path, fingerprint: dict[str, Any], produce: Produce) -> None:
    """Writes all files of a cache; the arrays cost 32 bytes of memory a pair, the records none."""
    lengths, sources, hashes, origins = (array.array(code) for code in "iiQi")
    margins = array.array("f")
    # One record per group: the pipeline reads pairs in random order.
    (directory / QUARANTINE).touch()
    writer = array_record_module.ArrayRecordWriter(str(directory / RECORDS), "group_size:1")
    about: dict[str, Any] = {}
    largest, all_ids = -1, hashlib.blake2b(digest_size=12)

    def pairs() -> Iterator[Pair]:
        about.update((yield from produce(directory / QUARANTINE)))

    with _ending(writer, directory), _collecting_new_objects():
        for pair in pairs():
            ids = np.asarray([*pair.prompt, *pair.chosen, *pair.rejected], dtype="<i4")
            largest = max(largest, int(ids.max(initial=-1)))
            record = ids.tobytes()
            all_ids.update(record)
            writer.write(record)
            lengths.extend((len(pair.prompt), len(pair.chosen), len(pair.rejected)))
            sources.append(pair.source)
            hashes.append(pair.prompt_hash)
            origins.extend((pair.file, pair.line))
            if pair.margin is not None:
                margins.append(pair.margin)
            if len(sources) % _LOOK_EVERY == 0 and not writer.ok():
                break  # it says why when it is closed
    np.save(directory / "lengths.npy", np.asarray(lengths, dtype=np.int32).reshape(-1, 3))
    np.save(directory / "source.npy", np.asarray(sources, dtype=np.int32))
    np.save(directory / "prompt_hash.npy", np.asarray(hashes, dtype=np.uint64))
    np.save(directory / "origin.npy", np.asarray(origins, dtype=np.int32).reshape(-1, 2))
    if margins:
        assert len(margins) == len(sources), "some pairs have a margin, and others have none"
        np.save(directory / MARGIN, np.asarray(margins, dtype=np.float32))
    manifest = {
        "format": FORMAT,
        "id": uuid.uuid4().hex,
        "fingerprint": fingerprint,
        "pairs": len(sources),
        LARGEST_ID: largest,
        IDS_DIGEST: all_ids.hexdigest(),
        "files": (files := describe_files(directory)),
        CONTENT: digest(
            json.dumps(
                [
                    all_ids.hexdigest(),
                    *(files[f"{name}.npy"]["sha256"] for name in [*ARRAYS, *["margin"] * bool(margins)]),
                ]
            )
        ),
        **about,
    }
    (directory / MANIFEST).write_text(json.dumps(sealed(manifest), indent=1))


@contextlib.contextmanager
def _ending(writer: Any, directory: Path) -> Iterator[None]:
    """Closes the writer of records at the end; it keeps to itself until then that the disk is full."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(RuntimeError):
            writer.close()
        raise
    try:
        writer.close()
    except RuntimeError as error:
        codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
        code = next((code for code in codes if os.strerror(code) in str(error)), errno.EIO)
        raise OSError(code, os.strerror(code), str(directory / RECORDS)) from error


@contextlib.contextmanager
def _collecting_new_objects() -> Iterator[None]:
    """Within it the garbage collector looks at new objects only.

    Rows are many small objects that come and go. They would make it look again and again at everything that the process
    has loaded before, which takes a fifteenth of the time.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()

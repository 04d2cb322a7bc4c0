"""A run's directory is one run's: a lock while it runs, and what it was begun with, compared when it is resumed."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from dpo_jax.bucket.client import BucketError
from dpo_jax.bucket.lease import leased
from dpo_jax.bucket.path import BucketPath
from dpo_jax.config.saved import writing
from dpo_jax.data.cache.manifest import IDS_DIGEST
from dpo_jax.data.split import Split
from dpo_jax.disk import digest, file_digest, read_json, write_json
from dpo_jax.errors import UserError
from dpo_jax.parallel.mesh import agreed, any_process, from_first
from dpo_jax.records.directory import IDENTITY
from dpo_jax.records.shapes import Identity
from dpo_jax.weights.hub import ModelFiles

LOCK = ".lock"
_MEND = "restore it, or delete it to resume unchecked"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF)  # a file system that has none
_SHOWN = 3  # differences said in an error


def first_only(do: Callable[[], None]) -> None:
    """Do something in the first process; every process calls it, and all raise a UserError where it does."""
    refused = None
    if jax.process_index() == 0:
        try:
            do()
        except UserError as e:
            refused = e
    if not agreed(refused is None):
        raise refused or UserError("the first process has refused this run and says why")


def same_everywhere(parts: Mapping[str, Any]) -> None:
    """Refuse a run whose processes would not do the same: their rows would belong to different batches.

    `parts` must be the same in all processes, by name; anything that JSON can hold. Every process gives the same names.

    Raises:
      UserError: in all processes; those that differ from the first one name the part.
    """
    texts = (json.dumps(part, sort_keys=True) for part in parts.values())
    digests = np.array([int(digest(text, size=4), 16) for text in texts], np.uint32)
    other = [name for name, same in zip(parts, digests == from_first(digests), strict=True) if not same]
    if any_process(bool(other)):
        mine = f"process {jax.process_index()} has other {' and '.join(other)} than the first one; give all the same"
        raise UserError(mine if other else "another process differs from the first one, and says in what")


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Hold the directory while in here. The system lets go of it when the process ends, however it ends.

    One in a bucket is held by a lease (`bucket/lease.py`).

    Raises:
      UserError: another run holds it, or it cannot be written.
    """
    with contextlib.ExitStack() as held:
        hold = leased if isinstance(workdir, BucketPath) else _lock
        first_only(lambda: held.enter_context(hold(workdir)))
        yield


@contextlib.contextmanager
def _lock(workdir: Path) -> Iterator[None]:
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        file = _open_lock(workdir / LOCK)
    with file, contextlib.ExitStack() as held:
        try:
            # The directory's own lock, too: somebody may remove the file, and a second run would make itself another.
            # Where a file system has none for directories (NFS), the file's alone holds.
            with contextlib.suppress(NotImplementedError):
                directory = os.open(workdir, os.O_RDONLY | os.O_DIRECTORY)
                held.callback(os.close, directory)
                _flock(directory)
            with contextlib.suppress(NotImplementedError):
                _flock(file.fileno())
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"workdir {workdir} is in use by {file.read(200).strip() or 'another run'}; wait for it or end it, or "
                "choose another --workdir"
            ) from None
        with writing(workdir):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


def _flock(descriptor: int) -> None:
    """Lock a file or directory: a BlockingIOError where another process has it, a NotImplementedError without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as e:
        if e.errno not in _NO_LOCKS:
            raise BlockingIOError(e.errno, e.strerror) from None
        raise NotImplementedError from None


def _open_lock(path: Path) -> IO[str]:
    """The lock's file, which is written to: so it must not be another file by another name."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as e:
        if e.errno not in (errno.ELOOP, errno.EISDIR):
            raise
        kind = "a link" if e.errno == errno.ELOOP else "a directory"
        raise UserError(f"{path}: is {kind}, and not a file; remove it") from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise UserError(f"{path}: is no file of its own, but a device, a pipe or another file's second name; remove it")
    return os.fdopen(descriptor, "a+", encoding="utf-8", errors="replace")


def identify(split: Split, models: Mapping[str, ModelFiles | None]) -> dict[str, Any]:
    """What a run is begun with, beside its config: its pairs and the files of its models.

    `models` are by the config key that they come from; None: made from scratch.
    """
    cache = split.train.cache
    data = {key: value for key, value in cache.manifest["fingerprint"].items() if key != "code"}
    arrays: tuple[np.ndarray, ...] = (cache.lengths, cache.prompt_hash, split.train.index, split.evaluation.index)
    arrays = arrays if cache.margin is None else (*arrays, cache.margin)
    pairs = digest(np.ascontiguousarray(array).tobytes() for array in arrays)
    data |= {"training pairs": len(split.train), "held-out pairs": len(split.evaluation), "pairs": pairs}
    data[IDS_DIGEST] = cache.manifest.get(IDS_DIGEST)
    files = {
        key: {path.name: file_digest(path) for path in where.deciding()}
        for key, where in models.items()
        if where is not None
    }
    return {"data": data} | files


def first_day(workdir: Path) -> str:
    """The day (YYYY-MM-DD) of the date in the run's chat template: of the run that is there, else today's.

    The same in all processes, which may stand on both sides of midnight. Every process calls it.
    """
    day = datetime.date.today().isoformat()
    try:
        if (workdir / IDENTITY).exists():
            data = read_json(workdir / IDENTITY, _MEND, Identity).get("data", {})
            said = data.get("template_date")
            day = datetime.date.fromisoformat(said).isoformat() if said else day
    except BucketError:  # which says nothing about the file
        raise
    except (UserError, OSError, ValueError):
        pass  # `keep_identity` says what is wrong with the file
    number = int(from_first(np.array(datetime.date.fromisoformat(day).toordinal(), np.int32)))
    return datetime.date.fromordinal(number).isoformat()


def keep_identity(
    workdir: Path, identity: Mapping[str, Any], *, resumed: bool, whole: Mapping[str, Any] | None = None
) -> None:
    """Keep what the run is begun with, and its `whole` config; where it is resumed, refuse other pairs or other models.

    The same token ids are the same pairs, in whatever words another release or another template describes them.

    Raises:
      UserError: with the first differences; or it cannot be written.
    """
    path = workdir / IDENTITY
    mine = json.loads(json.dumps(identity))
    theirs = read_json(path, _MEND, Identity) if resumed and path.exists() else mine
    theirs = {key: part for key, part in theirs.items() if key != "config"}
    if _decisive(theirs, mine) != _decisive(mine, theirs):
        changed = list(_differences(theirs, mine))
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise UserError(
            f"{workdir} was begun with other files ({'; '.join(changed[:_SHOWN])}{more}); bring them back, or use "
            "another --workdir"
        )
    with writing(workdir):
        write_json(path, mine | ({} if whole is None else {"config": dict(whole)}))


def _decisive(identity: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What a run may not go on without, of what both identities have."""
    data, with_ids = identity.get("data", {}), all(x.get("data", {}).get(IDS_DIGEST) for x in (identity, other))
    kept = {key: data.get(key) for key in ("training pairs", "held-out pairs", "pairs")}
    if with_ids:
        kept[IDS_DIGEST] = data[IDS_DIGEST]
    else:  # begun before ids were part of it: the files, then, and the lengths and prompts that `pairs` is made of
        files = (file for source in data.get("sources", []) for file in source["files"])
        kept["files"] = [[file["bytes"], file["digest"]] for file in files]
    models = {key: files for key, files in identity.items() if key in other}  # a version before may not have named all
    return {**models, "data": kept}


def _differences(theirs: Any, mine: Any, where: str = "") -> Iterator[str]:
    """Every leaf that differs: `data: sources train.jsonl bytes: 1200 there, 1300 now`."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in [*theirs, *(k for k in mine if k not in theirs)]:
            below = f"{where} {key}" if where else f"{key}:"
            yield from _differences(theirs.get(key), mine.get(key), below)
    elif isinstance(theirs, list) and isinstance(mine, list) and len(theirs) == len(mine):
        for number, (a, b) in enumerate(zip(theirs, mine, strict=True)):
            named = next((b[k] for k in ("path", "name") if isinstance(b, dict) and k in b), number)
            yield from _differences(a, b, f"{where} {named}")
    elif theirs != mine:
        yield f"{where}: {_short(theirs)} there, {_short(mine)} now"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return "nothing" if value is None else text if len(text) <= 60 else text[:57] + "..."

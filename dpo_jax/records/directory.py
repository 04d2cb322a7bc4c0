"""A run's directory: what its files are called, and which checkpoints are in it. No JAX."""

import re
from pathlib import Path

from dpo_jax.bucket.tree import is_committed

CONFIG, METRICS, SAMPLES = "config.json", "metrics.jsonl", "samples.jsonl"
EVENTS = "events.jsonl"  # skipped updates and loss spikes, with the pairs of their batches
IDENTITY = "identity.json"  # the files that the run was begun with
CHECKPOINTS, ROUNDS = "checkpoints", "rounds"
DAMAGED = "damaged"  # where checkpoints go that are not as they were written
MADE_WITH = "made_with.json"  # in a checkpoint: its number, the config and the records that it was made with

_NUMBER = re.compile(r"0|[1-9][0-9]{0,9}", re.ASCII)


def checkpoint_number(name: str) -> int | None:
    """The number of a checkpoint by its directory's name; None: no run of ours makes such a name.

    >>> checkpoint_number("12"), checkpoint_number("012"), checkpoint_number("１２"), checkpoint_number("3000000000")
    (12, None, None, None)
    """
    number = int(name) if _NUMBER.fullmatch(name) else -1
    return number if 0 <= number < 2**31 - 1 else None


def checkpoint_directories(workdir: Path) -> dict[int, Path]:
    """The finished checkpoints of a run by their numbers, lowest first."""
    try:
        names = [path.name for path in (workdir / CHECKPOINTS).iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    numbers = sorted(n for name in names if (n := checkpoint_number(name)) is not None)
    found = {number: workdir / CHECKPOINTS / str(number) for number in numbers}
    return {number: path for number, path in found.items() if path.is_dir() and is_committed(path)}

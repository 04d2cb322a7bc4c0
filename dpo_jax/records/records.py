"""A run's records: what one is, how its numbers are shown to a person, and the JSON-lines files that hold them.

`metrics.jsonl` is the truth about a run: one strict JSON object a line, appended and flushed, so that a killed run
loses at most the line it was writing. JSON has neither NaN nor infinity: a number that is not finite is written as
`null`, and readers treat it as missing.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dpo_jax.disk import write_whole
from dpo_jax.errors import UserError

Record = dict[str, Any]
EVENTS = "events.jsonl"  # skipped updates and loss spikes, with the pairs of their batches

# How a metric is written for a person; anything not listed gets four significant digits.
FORMATS = {
    "loss": ".4f",
    "dpo_loss": ".4f",
    "accuracy": ".3f",
    "margin": ".4f",
    "chosen_reward": ".4f",
    "rejected_reward": ".4f",
    "chosen_logp": ".2f",
    "rejected_logp": ".2f",
    "learning_rate": ".2e",
    "pairs_per_second": ".1f",
    "step_seconds": ".3f",
    "useful_token_fraction": ".3f",
    "memory_gb": ".2f",
    "length_correlation": ".3f",
    "kl": ".3f",
    "kl_error": ".3f",
    "kl_per_token": ".4f",
}
HELD_OUT = (
    "dpo_loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp", "kl",
    "kl_per_token", "length_correlation",
)  # fmt: skip


def show_metric(name: str, value: float | None) -> str:
    """A metric's value for a person: `show_metric("dpo_loss", 0.69315)` is "0.6931"."""
    if value is None or not math.isfinite(value):
        return "nan"
    return format(value, FORMATS.get(name.partition("/")[0], ".4g"))  # accuracy/SOURCE is an accuracy


def printable(text: str) -> str:
    """Make control characters visible: a model's answer may hold escape codes that would drive the terminal."""
    return "".join(
        c if c in "\n\t" or 32 <= ord(c) < 127 or ord(c) >= 160 else chr(0x2400 + ord(c)) if ord(c) < 32 else "\ufffd"
        for c in text
    )


def read_records(path: Path) -> list[Record]:
    """All records of a JSON-lines file; none if it is missing; a half-written last line is left out.

    Raises:
      UserError: a line before the last is not a JSON object, which no interrupted write explains.
    """
    lines = _lines(path)
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number < len(lines):
            raise UserError(f"{path} line {number} is not a JSON object; remove the line, or restore the file")
    return records


def json_line(record: Mapping[str, Any]) -> str:
    """A record as a line of strict JSON: numbers that are not finite become null."""
    return json.dumps(without_nan(record), allow_nan=False) + "\n"


def without_nan(record: Mapping[str, Any]) -> Record:
    """The record with None for every number that is not finite."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in record.items()}


def truncate_records(path: Path, keep: Callable[[Record], bool]) -> None:
    """Rewrite a JSON-lines file to the records for which `keep` is true, at once or not at all.

    For resuming: what was written after the checkpoint will be written again. A half-written last line goes too, so
    that the next append starts on a line of its own. A missing file stays missing.
    """
    if not path.exists():
        return
    # The lines' own bytes are kept: only a half-written last one has no record.
    kept = [line for line, record in zip(_lines(path), read_records(path), strict=False) if keep(record)]
    write_whole(path, b"".join(line + b"\n" for line in kept))


def before_after(records: Iterable[Record]) -> list[tuple[str, float | None, float | None]]:
    """The held-out metrics at step 0 and at the last evaluation after it: (name, before, after); None if not there.

    An accuracy of 0 before training is None too: the policy is its own reference, every pair ties and none is won.
    """
    evals = {record.get("step", 0): record for record in records if record.get("split") == "eval"}
    before = evals.pop(0, {})
    after = evals[max(evals)] if evals else {}
    by_source = sorted(name for name in {**before, **after} if name.startswith(("accuracy/", "margin/")))
    names = [name for name in HELD_OUT if name in before or name in after]
    tied = {name for name, value in before.items() if name.startswith("accuracy") and not value}
    return [(name, None if name in tied else before.get(name), after.get(name)) for name in (*names, *by_source)]


def _lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().split(b"\n") if line.strip()] if path.exists() else []

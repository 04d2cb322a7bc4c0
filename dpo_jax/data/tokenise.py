"""Rows to pairs of token ids on their way into the cache, with a count of every row that is left out."""

import collections
import itertools
import json
import shutil
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from dpo_jax.data.cache.store import Pair
from dpo_jax.data.comparison import LabeledComparison, Skip
from dpo_jax.data.files import BadLine, read_rows
from dpo_jax.data.lengths import PARTS
from dpo_jax.data.render import Renderer, render_batch
from dpo_jax.data.sources import Source
from dpo_jax.disk import digest
from dpo_jax.errors import UserError

_BATCH = 512  # rows parsed and tokenised together: enough for the tokenizer's threads, little memory
_PLAINLY = 20_000  # rows without one good one
_WRONG_COLUMNS = ("unknown_columns", "missing_column")


def tokenise(
    sources: tuple[Source, ...],
    renderer: Renderer,
    drop_ties: bool,
    bad_rows: Path,
    quarantine: Path | None,
    tell: Callable[[int, int, int], None],
) -> Generator[Pair, None, dict[str, Any]]:
    """Yields the pairs of all sources; returns the manifest's entries: what was read, kept, dropped and truncated.

    Bad rows go to the file `bad_rows`, and to `quarantine` too where reading stops at once. `tell` is given the bytes,
    rows and pairs that are new since its last call.
    """
    names = list(dict.fromkeys(source.name for source in sources))
    entries: list[dict[str, Any]] = []
    start = 0
    with open(bad_rows, "w") as file:
        for source in sources:
            tally = _Tally(source, file)
            rows = itertools.chain.from_iterable(read_rows(path, lambda n: tell(n, 0, 0)) for path in source.files)
            while batch := list(itertools.islice(rows, _BATCH)):
                kept = tally.kept
                for pair in _batch_pairs(batch, renderer, drop_ties, tally):
                    yield pair._replace(source=names.index(source.name))
                tell(0, len(batch), tally.kept - kept)
                if tally.read >= _PLAINLY:
                    _refuse_wrong_columns(tally, quarantine)
            _refuse_wrong_columns(tally, quarantine)
            entries.append(tally.entry(start))
            start += tally.kept
    return {"sources": entries, "source_names": names}


@dataclass
class _Tally:
    """What becomes of one source's rows: counts, and the first bad row of each reason. `bad_rows` has all of them."""

    source: Source
    bad_rows: IO[str]
    read: int = 0
    kept: int = 0
    boundary_moved: int = 0
    dropped: collections.Counter[str] = field(default_factory=collections.Counter)
    truncated: collections.Counter[str] = field(default_factory=collections.Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def drop(self, location: str, skip: Skip, row: Any) -> None:
        self.dropped[skip.reason] += 1
        if skip.deliberate:
            return
        self.examples.setdefault(skip.reason, f"{location}: {skip.detail}" if skip.detail else location)
        line = {"location": location, "reason": skip.reason, "detail": skip.detail, "row": row}
        self.bad_rows.write(json.dumps(line, default=str) + "\n")

    def entry(self, start: int) -> dict[str, Any]:
        """For the manifest; `start` is the cache's first pair of this source."""
        return {
            "name": self.source.name,
            "split": self.source.split,
            "files": list(self.source.files),
            "read": self.read,
            "kept": self.kept,
            "dropped": dict(self.dropped.most_common()),
            "truncated": {part: self.truncated[part] for part in PARTS},
            "boundary_moved": self.boundary_moved,
            "examples": self.examples,
            "start": start,
            "stop": start + self.kept,
        }


def _batch_pairs(
    batch: list[tuple[str, dict[str, Any] | BadLine]], renderer: Renderer, drop_ties: bool, tally: _Tally
) -> Iterator[Pair]:
    source = tally.source
    good: list[tuple[str, dict[str, Any], LabeledComparison]] = []
    tally.read += len(batch)
    for location, row in batch:
        if isinstance(row, BadLine):
            tally.drop(location, Skip(row.reason), row.text)
            continue
        parsed = source.spec.parse(row)
        if isinstance(parsed, LabeledComparison) and (parsed.label == "Tie" or (drop_ties and source.spec.tied(row))):
            parsed = Skip("tie")
        if isinstance(parsed, Skip):
            tally.drop(location, parsed, row)
        else:
            good.append((location, row, parsed))
    number = {path: n for n, path in enumerate(source.files)}
    for (location, row, pair), rendered in zip(good, render_batch(renderer, [item[2] for item in good]), strict=True):
        if isinstance(rendered, Skip):
            tally.drop(location, rendered, row)
            continue
        tally.kept += 1
        tally.boundary_moved += rendered.boundary_moved
        tally.truncated.update(rendered.truncated)
        path, _, line = location.rpartition(":")
        turns = [[message["role"], message["content"]] for message in pair.comparison.prompt_conversation]
        prompt_hash = int.from_bytes(bytes.fromhex(digest(json.dumps(turns), size=8)), "little")
        yield Pair(rendered.prompt, rendered.chosen, rendered.rejected, 0, prompt_hash, number[path], int(line))


def _refuse_wrong_columns(tally: _Tally, quarantine: Path | None) -> None:
    """Stops where the columns are plainly not those of the format."""
    wrong = sum(tally.dropped[reason] for reason in _WRONG_COLUMNS)
    if not tally.kept and wrong > 0.9 * tally.read:
        tally.bad_rows.flush()
        copy_bad_rows(Path(tally.bad_rows.name), quarantine)  # no cache will be there to copy them from
        raise UserError(next(tally.examples[reason] for reason in _WRONG_COLUMNS if reason in tally.examples))


def copy_bad_rows(kept: Path, quarantine: Path | None) -> str | None:
    """Copies a cache's bad rows beside the run; a file that an earlier run left there goes if there are none.

    Returns where the bad rows are, or None if there are none; UserError if they cannot be written.
    """
    if quarantine is None:
        return str(kept) if kept.stat().st_size else None
    try:
        if not kept.stat().st_size:
            quarantine.unlink(missing_ok=True)
            return None
        quarantine.parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copyfile(kept, quarantine))
    except OSError as error:
        raise UserError(
            f"{quarantine}: bad rows cannot be written there ({error.strerror}); choose another --workdir"
        ) from None

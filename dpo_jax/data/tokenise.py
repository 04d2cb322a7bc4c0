"""Rows to pairs of token ids on their way into the cache, with a count of every row that is left out."""

import itertools
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from dpo_jax.data.cache.write import Pair
from dpo_jax.data.comparison import DELIBERATE, Comparison, LabeledComparison, Skip
from dpo_jax.data.containers import read_rows
from dpo_jax.data.forms.scores import margin_of
from dpo_jax.data.raw import LONGEST_ROW, BadLine, size_of
from dpo_jax.data.render import Rendered, Renderer, render_batch
from dpo_jax.data.sources import Source
from dpo_jax.data.tally import Tally
from dpo_jax.disk import copy_file, digest, is_full
from dpo_jax.errors import BAD_INPUT, SAVE_FAILED, UserError, escaped


class Recast(Protocol):
    """What pairs become before they are rendered, such as questions with a label for an answer."""

    @property
    def identity(self) -> list[object]:
        """What decides it: for the fingerprint of a cache."""
        ...

    def asked(self, pairs: Sequence[LabeledComparison]) -> list[LabeledComparison]:
        """Other pairs in the place of these."""
        ...

    def cut(self, rendered: Rendered) -> tuple[Any, Any]:
        """Token ids of chosen and rejected that are kept."""
        ...


_BATCH = 512  # rows parsed and tokenised together: enough for the tokenizer's threads, little memory
PLAINLY = 20_000  # rows without one good one
_WRONG_COLUMNS = ("unknown_columns", "missing_column", "unread_field")


def tokenise(
    sources: tuple[Source, ...],
    renderer: Renderer,
    drop_ties: bool,
    bad_rows: Path,
    quarantine: Path | None,
    tell: Callable[[int, int, int], None],
    margin: str = "",
    recast: Recast | None = None,
) -> Generator[Pair, None, dict[str, Any]]:
    """Yields the pairs of all sources; returns the manifest's entries: what was read, kept, dropped and truncated.

    Bad rows go to the file `bad_rows`, and to `quarantine` too where reading stops at once. `tell` is given the bytes,
    rows and pairs that are new since its last call. `margin`: what the pairs' margins are, see `margin_of`; empty: they
    have none. `recast`: what pairs become before they are rendered.
    """
    names = list(dict.fromkeys(source.name for source in sources))
    entries: list[dict[str, Any]] = []
    start = 0
    seen: set[str] = set()
    with open(bad_rows, "w") as file:
        for source in sources:
            tally = Tally(source, file)
            rows = itertools.chain.from_iterable(read_rows(path, lambda n: tell(n, 0, 0)) for path in source.files)
            while batch := _take(rows):
                kept = tally.kept
                yield from _batch_pairs(batch, renderer, drop_ties, tally, names.index(source.name), margin, recast)
                tell(0, len(batch), tally.kept - kept)
                if tally.read >= PLAINLY:
                    _refuse_wrong_columns(tally, quarantine)
                    _refuse_template(tally, quarantine)
            tally.end()
            _refuse_template(tally, quarantine)
            _refuse_wrong_columns(tally, quarantine)
            seen |= tally.seen
            entries.append(tally.entry(start))
            start += tally.kept
    if absent := sorted({name for source in sources for name in source.spec.columns.absent(seen)}):
        raise UserError(
            f"columns: no row has a column {absent[0]}; found {', '.join(n[:40] for n in sorted(seen)[:20])}"
        )
    return {"sources": entries, "source_names": [escaped(name) for name in names]}


def _take(rows: Iterator[tuple[str, dict[str, Any] | BadLine]]) -> list[tuple[str, dict[str, Any] | BadLine]]:
    """The next rows; fewer where they are long."""
    batch, size = [], 0
    for location, row in itertools.islice(rows, _BATCH):
        batch.append((location, row))
        size += len(row.text) if isinstance(row, BadLine) else size_of(row)
        if size >= LONGEST_ROW:
            break
    return batch


def _batch_pairs(
    batch: list[tuple[str, dict[str, Any] | BadLine]],
    renderer: Renderer,
    drop_ties: bool,
    tally: Tally,
    name: int,
    margin: str,
    recast: Recast | None,
) -> Iterator[Pair]:
    """The pairs of some rows of one source; `name` is the number of its name."""
    source = tally.source
    spec = source.spec
    good: list[tuple[str, dict[str, Any], LabeledComparison]] = []
    margins: list[float] = []
    tally.read += len(batch)
    for location, row in batch:
        if isinstance(row, BadLine):
            tally.drop(location, Skip(row.reason), row.text)
            continue
        named = spec.columns.apply(row) if spec.columns else row
        for pair in tally.pairs(location, row, spec.read(named)):
            wanted = margin_of(named, margin) if margin else 0.0
            if pair.label == "Tie" or (drop_ties and spec.tied(named)):
                tally.drop(location, Skip("tie"), row)
            elif isinstance(wanted, Skip):
                tally.drop(location, wanted, row)
            else:
                good.append((location, row, pair))
                margins.append(wanted)
    number = {path: n for n, path in enumerate(source.files)}
    pairs = [pair for _, _, pair in good]
    rendered_pairs = render_batch(renderer, pairs if recast is None else recast.asked(pairs))
    for at, ((location, row, pair), rendered) in enumerate(zip(good, rendered_pairs, strict=True)):
        if isinstance(rendered, Skip):
            tally.drop(location, rendered, row)
            continue
        tally.keep(pair)
        tally.notes.add(renderer, rendered)
        tally.truncated.update(rendered.truncated)
        path, _, line = location.rpartition(":")
        # Of text that only the tokenizer can divide, the prompt is known by its ids.
        known_by: object = spoken_turns(pair.comparison)
        if not known_by:
            known_by = list(rendered.prompt) if recast is None else _shared_beginning(pair)
        prompt_hash = hash_of(known_by)
        chosen, rejected = (rendered.chosen, rendered.rejected) if recast is None else recast.cut(rendered)
        where = name, prompt_hash, number[path], int(line)
        yield Pair(rendered.prompt, chosen, rejected, *where, margins[at] if margin else None)


def spoken_turns(comparison: Comparison) -> list[list[str]]:
    """Roles and contents of the prompt's messages, by whose `hash_of` equal prompts are found."""
    return [[message["role"], message["content"]] for message in comparison.prompt_conversation]


def hash_of(known_by: object) -> int:
    """64 bits of what a prompt is known by, which JSON can hold."""
    return int.from_bytes(bytes.fromhex(digest(json.dumps(known_by), size=8)), "little")


def _shared_beginning(pair: LabeledComparison) -> str:
    """What both texts of a pair begin with, of which only a tokenizer can tell the prompt."""
    prompt, a, b = pair.comparison.texts or ("", "", "")
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return prompt + a[:same]


def _refuse_wrong_columns(tally: Tally, quarantine: Path | None) -> None:
    """Stops where the columns are plainly not those of the format."""
    wrong = sum(tally.dropped[reason] for reason in _WRONG_COLUMNS)
    if not tally.kept and wrong > 0.9 * tally.read:
        tally.bad_rows.flush()
        copy_bad_rows(Path(tally.bad_rows.name), quarantine)  # no cache will be there to copy them from
        raise UserError(next(tally.examples[reason] for reason in _WRONG_COLUMNS if reason in tally.examples))


def _refuse_template(tally: Tally, quarantine: Path | None) -> None:
    """Stops where the chat template refuses every row that it is given."""
    refused = tally.dropped["template_error"]
    bad = sum(count for reason, count in tally.dropped.items() if reason not in DELIBERATE)
    if refused and not tally.kept and refused > 0.5 * bad:
        tally.bad_rows.flush()
        copy_bad_rows(Path(tally.bad_rows.name), quarantine)  # no cache will be there to copy them from
        raise UserError(
            f"{tally.source.name}: the chat template refuses all {refused:,} rows that it was given, first "
            f"{tally.examples['template_error']}; give rows that it takes, another --config.chat_template of the "
            "tokenizer's, or --config.prompt_format=plain"
        )


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
        return str(copy_file(kept, quarantine))
    except OSError as error:
        raise UserError(
            f"{quarantine}: bad rows cannot be written there ({error.strerror}); make room or choose another --workdir",
            code=SAVE_FAILED if is_full(error) else BAD_INPUT,
        ) from None

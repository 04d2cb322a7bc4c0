"""A run's data in numbers and in tokens: gathered here, shown by `console` and on a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_jax.data.comparison import DELIBERATE
from dpo_jax.data.lengths import PARTS
from dpo_jax.data.prepare import Prepared
from dpo_jax.records.records import printable
from dpo_jax.rows.schedule import Schedule

_CONTEXT = 4  # pieces before a piece, decoded with it: some decoders drop the space in front of a text
_CHARACTER = 4  # tokens that may have to come together before their bytes are a character
SHAPE_HEAD = ("rows x [P | C | R]", "pairs a row", "at most", "steps", "real tokens")


@dataclass(frozen=True)
class Piece:
    """What one token adds to the text, or the few whose bytes make a character together."""

    text: str
    ids: tuple[int, ...]
    special: bool = False

    @property
    def visible(self) -> str:
        """The text without anything that a reader could overlook: line ends, control characters, blank tokens."""
        text = printable(self.text)
        if text.isspace():
            text = "".join(c if c == "\n" else "⇥" if c == "\t" else "·" for c in text)
        return text.replace("\n", "⏎\n")


@dataclass(frozen=True)
class Example:
    """A training pair as the model sees it: its number, where it is from, and the pieces of each of `PARTS`."""

    number: int
    source: str
    parts: Mapping[str, tuple[Piece, ...]]


@dataclass(frozen=True)
class ScheduleUse:
    """What the first epoch of a schedule does with its row shapes.

    where: for which batch and devices, in words.
    rows: the cells under `SHAPE_HEAD`, for each shape.
    words: the schedule as a whole.
    """

    where: str
    rows: list[tuple[str, str, int, int, str]]
    words: str


@dataclass(frozen=True)
class Inspection:
    """All that is shown.

    report: a run's data.json.
    schedule: None where there are too few pairs for a batch; `note` is then the reason.
    """

    report: Mapping[str, Any]
    schedule: ScheduleUse | None
    note: str
    examples: tuple[Example, ...]


def bad_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, int, str]]:
    """What is wrong with the files: (source, split, reason, rows, where the first one is)."""
    return [
        (source["name"], source["split"], reason, n, source.get("examples", {}).get(reason, ""))
        for source in report["sources"]
        for reason, n in source["dropped"].items()
        if reason not in DELIBERATE
    ]


def schedule_use(schedule: Schedule, where: str, run_steps: int) -> ScheduleUse:
    """The first epoch of a schedule for the batch and devices `where`, in a run of `run_steps` updates of DPO."""
    counts = {shape: np.zeros(3, np.int64) for shape in schedule.shapes}  # steps, pairs, real tokens
    for step in range(schedule.steps_per_epoch):
        shape, placed = schedule.place(step)
        ids = placed[placed >= 0]
        counts[shape] += (1, len(ids), schedule.lengths[ids].sum())
    rows, computed = [], 0
    for shape, (steps, pairs, tokens) in ((shape, numbers.tolist()) for shape, numbers in counts.items()):
        name = f"{shape.rows} x [{' | '.join(map(str, shape.widths))}]"
        each = f"{pairs / (steps * shape.rows):.1f}" if steps else "–"  # of a shape that no step has there is no mean
        real = f"{tokens / (steps * shape.tokens):.1%}" if steps else "–"
        rows.append((name, each, shape.places, steps, real))
        computed += steps * shape.tokens
    words = [
        f"{schedule.steps_per_epoch:,} steps an epoch, {run_steps:,} in the run",
        f"{sum(tokens for *_, tokens in counts.values()) / max(1, computed):.1%} of tokens real",
    ]
    if len(rows) > 1:
        words.append(f"the shape that always fits is used {rows[-1][3]:,} times")
    return ScheduleUse(where, rows, "; ".join(words))


def pair_examples(prepared: Prepared, tokenizer: Any, number: int) -> tuple[Example, ...]:
    """Training pairs spread evenly over the files, so over the sources too."""
    pairs, shown = prepared.train, []
    for position in np.linspace(0, len(pairs) - 1, min(number, len(pairs)), dtype=np.int64).tolist():
        prompt, chosen, rejected = (ids.tolist() for ids in pairs[position])
        parts = [pieces(tokenizer, prompt)] + [pieces(tokenizer, ids, before=prompt) for ids in (chosen, rejected)]
        source = prepared.report["source_names"][pairs.source[position]]
        shown.append(Example(position, source, dict(zip(PARTS, parts, strict=True))))
    return tuple(shown)


def pieces(tokenizer: Any, ids: Sequence[int], before: Sequence[int] = ()) -> tuple[Piece, ...]:
    """The text that each token adds behind the tokens `before`; all ids in order, each in one piece."""
    known = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(i for i, token in known.items() if token.special)}
    shown: list[Piece] = []
    groups = [_whole_characters(tokenizer, before)]  # of a piece's tokens each, so that no character is cut
    waiting: list[int] = []
    for at, token in enumerate(ids):
        waiting.append(token)
        context = [i for group in groups for i in group]
        text = _added(tokenizer, context, waiting)
        follows = at + 1 < len(ids) and ids[at + 1] not in special
        if text.endswith("\ufffd") and len(waiting) < _CHARACTER and token not in special and follows:
            continue  # part of a character
        words = text or "".join(map(str, tokenizer.convert_ids_to_tokens(waiting)))
        shown.append(Piece(words, tuple(waiting), token in special))
        groups, waiting = [*groups, waiting][-_CONTEXT:], []
    return tuple(shown)


def _whole_characters(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """The last few of `ids`, beginning with a whole character."""
    few = range(_CONTEXT, _CONTEXT + _CHARACTER)
    return next((list(ids[-n:]) for n in few if not _decode(tokenizer, list(ids[-n:])).startswith("\ufffd")), [])


def _added(tokenizer: Any, context: list[int], ids: list[int]) -> str:
    before, whole = (_decode(tokenizer, x) for x in (context, context + ids))
    return whole[len(before) :] if whole.startswith(before) else _decode(tokenizer, ids)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""

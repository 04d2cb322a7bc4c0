"""What a file of pairs holds, in numbers: from the file, a line at a time, and from its record. No JAX."""

import dataclasses
import json
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from dpo_jax.collecting.output import PairFile
from dpo_jax.collecting.prompts import REASONS
from dpo_jax.judging.console import number, print_heading, print_table, share
from dpo_jax.sampling.selection import OF_ANSWERS, OF_PROMPTS

WORDS = {**REASONS, **OF_ANSWERS, **OF_PROMPTS}


@dataclasses.dataclass(frozen=True)
class Summary:
    """The figures of a file of pairs.

    Attributes:
      policy, judge: their names.
      prompts: that were answered or left out; `pairs` that came of them.
      answers, tokens: that were drawn.
      dropped: by reason, see `WORDS`.
      scores, lengths: of the better and the worse answers, `[2, pairs]`; lengths in tokens.
      seconds: of wall time, by what took it.
    """

    policy: str
    judge: str
    prompts: int
    pairs: int
    answers: int
    tokens: int
    dropped: Mapping[str, int]
    scores: np.ndarray
    lengths: np.ndarray
    seconds: Mapping[str, float]

    @property
    def tokens_per_second(self) -> float:
        """Drawn, while answers were drawn."""
        seconds = self.seconds.get("sampling", 0.0)
        return self.tokens / seconds if seconds else float("nan")

    @property
    def longer(self) -> float:
        """The share of pairs whose better answer has more tokens; of equal lengths half."""
        if not self.pairs:
            return float("nan")
        return float(np.mean(np.sign(self.lengths[0] - self.lengths[1]) / 2 + 0.5))


def summarised(file: PairFile) -> Summary:
    """The figures of a file."""
    scores, lengths = array("d"), array("q")
    for line in collected_lines(file.path):
        scores.extend((line["score_a"], line["score_b"]))
        lengths.extend((line["tokens_a"], line["tokens_b"]))
    counts: dict[str, int] = dict(file.about["counts"])
    return Summary(
        policy=file.about["model"],
        judge=file.about["judge"]["name"],
        prompts=file.done,
        pairs=len(scores) // 2,
        answers=counts.get("answers", 0),
        tokens=counts.get("tokens", 0),
        dropped={reason: counts[reason] for reason in WORDS if counts.get(reason)},
        scores=np.asarray(scores, np.float64).reshape(-1, 2).T,
        lengths=np.asarray(lengths, np.int64).reshape(-1, 2).T,
        seconds=file.about["seconds"],
    )


def collected_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of pairs, one at a time."""
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def print_collected(result: Summary, console: Console) -> None:
    """The table of a file of pairs."""
    print_heading(console, f"pairs of {result.policy}, judge {result.judge}")
    mean = lambda values, digits: number(float(values.mean()), digits) if values.size else "–"
    rows = [
        ("prompts, answers", f"{result.prompts:,}, {result.answers:,}"),
        ("pairs", f"{result.pairs:,}"),
        ("score, better and worse", ", ".join(mean(side, 3) for side in result.scores)),
        ("tokens, better and worse", ", ".join(mean(side, 1) for side in result.lengths)),
        ("better is longer", share(result.longer)),
        ("sampling", f"{number(result.tokens_per_second, 0)} tokens/s"),
        ("seconds", ", ".join(f"{name} {number(value, 1)}" for name, value in result.seconds.items()) or "–"),
    ]
    print_table(console, ("", ""), [*rows, *((WORDS[why], f"{count:,}") for why, count in result.dropped.items())])

"""Two files of answers and a judge: verdicts in both orders, and the win rate of the first file over the second.

No JAX of its own.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpo_jax.judging.answers import Match, Matched, answers_digest
from dpo_jax.judging.kept import KeptLines, Line
from dpo_jax.judging.progress import JudgingTracker
from dpo_jax.preference.models import PreferenceModel
from dpo_jax.preference.statistics import (
    WinRate,
    both_orders_verdict,
    group_means,
    length_controlled,
    mean_or_nan,
    win_rate,
    wins_of,
)
from dpo_jax.preference.verdicts import ask, blocks, comparisons_at_once

NO_SOURCE = "(none)"


@dataclass(frozen=True)
class Compared:
    """The figures of a comparison; docs/judging.md has what each one means. NaN where there is none.

    Attributes:
      judge, a, b: their names.
      win_rate, win_rate_error: of A over B, and its standard error over prompts.
      length_controlled_win_rate, length_controlled_error: the same at equal lengths.
      wins, ties, losses: shares of verdicts for A, for none and for B.
      order_agreement: share of comparisons of which both orders name the same.
      no_verdict: comparisons without a verdict, left out of all the above.
      mean_length_a, mean_length_b: of all answers that were compared, in `length_unit`.
      prompts, comparisons: that were compared.
      only_a, only_b, unpaired: see `Matched`.
      by_source: win_rate, win_rate_error, ties, no_verdict, prompts for each source, if the files have any.
      disagreement: of an ensemble: mean standard deviation of its members' verdicts; None of any other judge.
    """

    judge: str
    a: str
    b: str
    win_rate: float
    win_rate_error: float
    length_controlled_win_rate: float
    length_controlled_error: float
    wins: float
    ties: float
    losses: float
    order_agreement: float
    no_verdict: int
    mean_length_a: float
    mean_length_b: float
    length_unit: str
    prompts: int
    comparisons: int
    only_a: int = 0
    only_b: int = 0
    unpaired: int = 0
    by_source: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    disagreement: float | None = None


@dataclass(frozen=True)
class Verdicts:
    """What was said of n comparisons, as arrays `[n]`; `spread` is None without an ensemble."""

    forward: np.ndarray
    backward: np.ndarray
    lengths: np.ndarray  # [n, 2]
    spread: np.ndarray | None

    @property
    def both(self) -> np.ndarray:
        return both_orders_verdict(self.forward, self.backward)


def about_comparison(judge: Mapping[str, Any], matched: Matched, unit: str) -> dict[str, Any]:
    """What a file of verdicts is begun with; `judge` is its identity."""
    sides = [answers_digest(side) for side in ((m.a for m in matched.matches), (m.b for m in matched.matches))]
    return {"command": "compare", "judge": judge, "digest": sides, "settings": {"lengths": unit}}


def is_verdict_of(matches: Sequence[Match], at: int, line: Line) -> bool:
    """Whether a line of a file of verdicts is that of the comparison at this place."""
    if line.get("id") != matches[at].a.id or line.get("sample") != matches[at].sample:
        return False
    orders = line.get("orders")
    if not isinstance(orders, list) or len(orders) != 2:
        return False
    numbers = all(one is None or isinstance(one, int | float) for one in orders)
    return numbers and all(isinstance(line.get(f"length_{side}"), int) for side in "ab")


def judge_matches(
    judge: PreferenceModel, matches: Sequence[Match], unit: str, kept: KeptLines, *, quiet: bool = False
) -> Verdicts:
    """The verdict of every comparison; those that are kept are not asked for again."""
    lines, done = list(kept.done), len(kept.done)
    with JudgingTracker(len(matches), done, "comparisons", quiet=quiet or done == len(matches)) as tracker:
        for block in blocks(len(matches), done, comparisons_at_once(judge)):
            part = matches[block]
            asked = ask(judge, [match.comparison for match in part])
            new = [_line(match, unit, asked.orders[:, i]) for i, match in enumerate(part)]
            if asked.spread is not None:
                new = [line | {"disagreement": _or_none(one)} for line, one in zip(new, asked.spread, strict=True)]
            kept.write(new)
            lines += new
            tracker.judged(len(part))
    column = lambda get: np.array([math.nan if (one := get(line)) is None else one for line in lines], np.float64)
    return Verdicts(
        forward=column(lambda line: line["orders"][0]),
        backward=column(lambda line: line["orders"][1]),
        lengths=np.array([[line["length_a"], line["length_b"]] for line in lines], np.int64),
        spread=column(lambda line: line.get("disagreement")) if "disagreement" in lines[0] else None,
    )


def _line(match: Match, unit: str, orders: np.ndarray) -> Line:
    a, b = match.lengths(unit)
    return {
        "id": match.a.id,
        "sample": match.sample,
        "verdict": _or_none(both_orders_verdict(*orders)),
        "orders": [_or_none(one) for one in orders],
        "length_a": a,
        "length_b": b,
    }


def _or_none(value: float | np.ndarray) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else float(value)


def compared(
    matched: Matched, verdicts: Verdicts, *, judge: str, names: tuple[str, str], unit: str, seed: int = 0
) -> Compared:
    """The figures of all verdicts."""
    prompts = np.array([match.prompt for match in matched.matches])
    whole = win_rate(verdicts.forward, verdicts.backward, prompts, seed=seed)
    differences = verdicts.lengths[:, 0] - verdicts.lengths[:, 1]
    equal = length_controlled(wins_of(verdicts.forward, verdicts.backward), differences, prompts)
    lengths = [mean_or_nan(group_means(side.astype(np.float64), prompts)) for side in verdicts.lengths.T]
    there = None if verdicts.spread is None else verdicts.spread[~np.isnan(verdicts.spread)]
    return Compared(
        judge=judge,
        a=names[0],
        b=names[1],
        win_rate=whole.rate,
        win_rate_error=whole.error,
        length_controlled_win_rate=equal.rate,
        length_controlled_error=equal.error,
        wins=whole.wins,
        ties=whole.ties,
        losses=whole.losses,
        order_agreement=whole.agreement,
        no_verdict=whole.no_verdict,
        mean_length_a=lengths[0],
        mean_length_b=lengths[1],
        length_unit=unit,
        prompts=matched.prompts,
        comparisons=len(matched.matches),
        only_a=matched.only_a,
        only_b=matched.only_b,
        unpaired=matched.unpaired,
        by_source=_by_source(matched, verdicts, prompts, seed),
        disagreement=None if there is None else mean_or_nan(there),
    )


def _by_source(matched: Matched, verdicts: Verdicts, prompts: np.ndarray, seed: int) -> dict[str, dict[str, float]]:
    sources = np.array([match.a.source or match.b.source or NO_SOURCE for match in matched.matches])
    if set(sources.tolist()) == {NO_SOURCE}:
        return {}
    found = {}
    for name in sorted(set(sources.tolist())):
        of = sources == name
        found[name] = _short(win_rate(verdicts.forward[of], verdicts.backward[of], prompts[of], seed=seed))
        found[name]["prompts"] = len(set(prompts[of].tolist()))
    return found


def _short(one: WinRate) -> dict[str, float]:
    return {"win_rate": one.rate, "win_rate_error": one.error, "ties": one.ties, "no_verdict": one.no_verdict}


def figures(result: Any) -> dict[str, Any]:
    """A result as JSON: None for what is not there."""
    whole: dict[str, Any] = _finite(dataclasses.asdict(result))
    return {name: value for name, value in whole.items() if name != "disagreement" or value is not None}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Pages about judging, in the look of a run's report: figures, verdicts, and the answers side by side. No JAX."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.data.comparison import Message
from dpo_jax.judging.answers import Match, Matched
from dpo_jax.judging.compare import Compared, Verdicts, figures
from dpo_jax.judging.measure import Measured
from dpo_jax.judging.tasks import Candidate, JudgedTask
from dpo_jax.preference.statistics import wins_of
from dpo_jax.report.charts import Chart, Series, histogram_chart, line_chart
from dpo_jax.report.html import write_page

EXTRA = "judging/templates/judging"
_BIN = 0.1  # width of a bin of verdicts
_GROUPS = 8  # of comparisons by length difference
_FEWEST = 40  # comparisons from which these are shown

Turns = list[tuple[str, str]]  # roles and texts


@dataclass(frozen=True)
class Side:
    """One answer of an item: `kind` is better, worse or empty."""

    name: str
    messages: Turns
    kind: str
    note: str


@dataclass(frozen=True)
class ShownItem:
    """A comparison on the page; `kinds` are what it is found by."""

    title: str
    prompt: Turns
    kinds: Sequence[str]
    verdict: str
    detail: str
    sides: Sequence[Side]


def write_comparison_page(
    path: Path, result: Compared, matched: Matched, verdicts: Verdicts, models: tuple[str, str], shown: int
) -> Path:
    """The page of `judge compare`.

    Raises:
      UserError: it cannot be written.
    """
    which = spread_over(len(matched.matches), shown)
    names = [f"{file} ({model})" if model else file for file, model in zip((result.a, result.b), models, strict=True)]
    return write_page(
        path,
        "judging/templates/compared.html",
        option="--html",
        extra=EXTRA,
        title=f"{Path(result.a).name} against {Path(result.b).name}",
        names=names,
        r=figures(result),
        left_out=matched.said(result.a, result.b),
        figures=[one for one in (_verdict_chart(verdicts.both, "verdict"), _length_chart(result, verdicts)) if one],
        shown=shown_of(len(which), len(matched.matches), "comparisons"),
        kinds=(
            ("a", "A is better"),
            ("b", "B is better"),
            ("tie", "tie"),
            ("none", "no verdict"),
            ("split", "orders differ"),
        ),
        items=[_compared_item(matched.matches[i], verdicts, i, result.length_unit) for i in which],
    )


def write_benchmark_page(path: Path, result: Measured, judged: Sequence[JudgedTask], shown: int) -> Path:
    """The page of `judge benchmark`; raises as `write_comparison_page` does."""
    which = spread_over(len(judged), shown)
    margins = np.concatenate([one.orders.mean(0).ravel() for one in judged])
    chart = _verdict_chart(margins, "verdict for the better answer")
    return write_page(
        path,
        "judging/templates/measured.html",
        option="--html",
        extra=EXTRA,
        title=f"{result.judge} on {Path(result.data).name} ({result.format})",
        r=figures(result),
        figures=[chart] if chart else [],
        shown=shown_of(len(which), len(judged), "rows"),
        kinds=(("right", "right"), ("wrong", "wrong"), ("tie", "tie"), ("none", "no verdict")),
        items=[_judged_item(judged[i]) for i in which],
    )


def spread_over(count: int, shown: int) -> list[int]:
    """At most `shown` places of `count`, evenly spread; 0: all."""
    if not 0 < shown < count:
        return list(range(count))
    return np.unique(np.linspace(0, count - 1, shown).round().astype(int)).tolist()


def shown_of(some: int, every: int, what: str) -> str:
    """How many of all there are on a page, in words."""
    return f"{some:,} of {every:,} {what}, spread over all." if some < every else f"All {every:,} {what}."


def _verdict_chart(verdicts: np.ndarray, unit: str) -> Chart | None:
    there = verdicts[~np.isnan(verdicts)]
    middles = np.round(np.arange(-1, 1 + _BIN / 2, _BIN), 6)  # so that -1, 0 and 1 are in the middle of a bin
    counts = np.bincount(np.abs(there[:, None] - middles).argmin(1), minlength=len(middles))
    points = list(zip(middles.tolist(), counts.astype(float).tolist(), strict=True))
    return histogram_chart("Verdicts", [Series("comparisons", "accent", points)], _BIN, unit=unit)


def _length_chart(result: Compared, verdicts: Verdicts) -> Chart | None:
    """Win rates of comparisons by how much longer A's answer is, in groups of about the same number."""
    wins = wins_of(verdicts.forward, verdicts.backward)
    there = ~np.isnan(wins)
    wins, differences = wins[there], (verdicts.lengths[:, 0] - verdicts.lengths[:, 1])[there]
    if len(wins) < _FEWEST:
        return None
    groups = [one for one in np.array_split(np.argsort(differences, kind="stable"), _GROUPS) if len(one)]
    points = {float(differences[one].mean()): wins[one] for one in groups}  # the same mean: the later group
    errors = {x: float(of.std() / math.sqrt(len(of))) for x, of in points.items()}
    series = Series(
        "win rate of A", "accent", [(x, float(of.mean())) for x, of in points.items()], held_out=True, errors=errors
    )
    unit = f"{result.length_unit} longer"
    chart = line_chart(f"Win rate of A by how many {unit} its answer is", [series], guide=(0.5, "even"), small=True)
    return chart and replace(chart, unit=unit)


def _compared_item(match: Match, verdicts: Verdicts, at: int, unit: str) -> ShownItem:
    forward, backward, verdict = verdicts.forward[at], verdicts.backward[at], verdicts.both[at]
    kinds = ["none"] if math.isnan(verdict) else ["a"] if verdict < 0 else ["b"] if verdict > 0 else ["tie"]
    words = {"none": "No verdict", "a": "A is better", "b": "B is better", "tie": "A tie"}[kinds[0]]
    if not math.isnan(verdict) and np.sign(forward) != -np.sign(backward):
        kinds.append("split")
    said = [f"shown A first {_signed(forward)}", f"shown B first {_signed(-backward)}"]
    if verdicts.spread is not None:
        said.append(f"judges differ by {_signed(verdicts.spread[at]).removeprefix('+')}")
    better = {"a": ("better", "worse"), "b": ("worse", "better")}.get(kinds[0], ("", ""))
    comparison, source = match.comparison, match.a.source or match.b.source
    return ShownItem(
        title=f"{match.a.id}{f', answer {match.sample + 1}' if match.sample else ''}{f' · {source}' if source else ''}",
        prompt=turns_of(comparison.prompt_conversation),
        kinds=kinds,
        verdict=words if math.isnan(verdict) else f"{words} ({_signed(verdict)})",
        detail=", ".join(said),
        sides=[
            Side(name, turns_of(messages), kind, f"{length:,} {unit}")
            for name, messages, kind, length in zip(
                "AB", (comparison.completion_a, comparison.completion_b), better, verdicts.lengths[at], strict=True
            )
        ],
    )


def _judged_item(one: JudgedTask) -> ShownItem:
    """The good answer beside the bad one that it is least above."""
    task, margins = one.task, one.margins
    none = np.isnan(margins)
    at = np.unravel_index(int(np.where(none, -np.inf, margins).argmin()), margins.shape)
    margin = margins[at]
    kind = "none" if none[at] else "right" if margin > 0 else "wrong" if margin < 0 else "tie"
    words = {"none": "No verdict", "right": "Right", "wrong": "Wrong", "tie": "A tie"}[kind]
    several = f"; the nearest of {margins.size} comparisons" if margins.size > 1 else ""
    good, bad = task.good[at[0]], task.bad[at[1]]
    return ShownItem(
        title=f"{task.part} · {task.id or Path(task.where).name}",
        prompt=turns_of(task.asked.prompt_conversation) or _texts(task.asked.texts),
        kinds=[kind],
        verdict=words if none[at] else f"{words} ({_signed(margin)})",
        detail=f"shown first {_signed(one.orders[0][at])}, second {_signed(one.orders[1][at])}{several}",
        sides=[Side("better", _said(good), "better", ""), Side("worse", _said(bad), "worse", "")],
    )


def _said(one: Candidate) -> Turns:
    return turns_of(one.messages) or [("assistant", one.text or "")]


def _texts(texts: tuple[str, str, str] | None) -> Turns:
    return [("text", texts[0])] if texts and texts[0] else []


def turns_of(messages: Sequence[Message]) -> Turns:
    """Roles and texts; whatever else a message has is shown as JSON."""
    found = []
    for message in messages:
        others: Mapping[str, Any] = {key: one for key, one in message.items() if key not in ("role", "content")}
        more = "\n" + json.dumps(others, ensure_ascii=False, default=str) if others else ""
        found.append((message["role"], f"{message['content']}{more}".strip() or "(empty)"))
    return found


def _signed(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:+.2f}".replace("-", "−")

"""The page of a file of pairs, in the look of a run's report: scores, lengths, what was dropped, examples. No JAX."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.collecting.summary import WORDS, Summary, collected_lines
from dpo_jax.judging.page import EXTRA, ShownItem, Side, shown_of, spread_over, turns_of
from dpo_jax.report.charts import Chart, Series, histogram_chart
from dpo_jax.report.html import write_page

_BINS = 40
_SIDES = (("better", "accent"), ("worse", "run-3"))


def write_pairs_page(path: Path, result: Summary, pairs: Path, shown: int) -> Path:
    """The page of `python -m dpo_jax.collect`.

    Raises:
      UserError: it cannot be written.
    """
    which = set(spread_over(result.pairs, shown))
    items = [_item(line) for at, line in enumerate(collected_lines(pairs)) if at in which]
    charts = [
        _chart("Scores", result.scores, "score"),
        _chart("Lengths", result.lengths.astype(np.float64), "tokens"),
        _chart("Differences of scores", (result.scores[0] - result.scores[1])[None], "better less worse"),
    ]
    return write_page(
        path,
        "collecting/templates/pairs.html",
        option="--html",
        extra=EXTRA,
        title=f"Pairs of {Path(result.policy).name}",
        r=result,
        means={"scores": _means(result.scores), "lengths": _means(result.lengths)},
        dropped=[(WORDS[reason], count) for reason, count in result.dropped.items()],
        figures=[chart for chart in charts if chart],
        shown=shown_of(len(which), result.pairs, "pairs"),
        kinds=(("longer", "better is longer"), ("shorter", "better is shorter"), ("same", "equally long")),
        items=items,
    )


def _means(both: np.ndarray) -> list[float | None]:
    return [float(side.mean()) if side.size else None for side in both]


def _chart(title: str, sides: np.ndarray, unit: str) -> Chart | None:
    """Histograms over one another of one or both sides."""
    if not sides.size:
        return None
    low, high = float(sides.min()), float(sides.max())
    width = (high - low) / _BINS or 1.0
    if unit == "tokens":
        width = max(1.0, np.ceil(width))
    edges = np.arange(low, high + 1.5 * width, width)
    series = []
    for values, (name, color) in zip(sides, _SIDES, strict=False):
        counts, _ = np.histogram(values, edges)
        middles = (edges[:-1] + width / 2).tolist()
        points = list(zip(middles, counts.astype(float).tolist(), strict=True))
        series.append(Series(name if len(sides) > 1 else "pairs", color, points))
    return histogram_chart(title, series, width, unit=unit)


def _item(line: Mapping[str, Any]) -> ShownItem:
    a, b = int(line["tokens_a"]), int(line["tokens_b"])
    sides = [
        Side(
            name,
            turns_of(_messages(line[f"completion_{side}"], "assistant")),
            name,
            f"{tokens:,} tokens, score {line[f'score_{side}']:.4g}, answer {line[f'sample_{side}'] + 1}"
            + ("" if line[f"finish_reason_{side}"] == "stop" else ", cut off"),
        )
        for name, side, tokens in (("better", "a", a), ("worse", "b", b))
    ]
    return ShownItem(
        title=str(line["id"]),
        prompt=turns_of(_messages(line["prompt_conversation"], "user")),
        kinds=["longer" if a > b else "shorter" if a < b else "same"],
        verdict=f"Better by {line['score_a'] - line['score_b']:.4g}",
        detail="",
        sides=sides,
    )


def _messages(said: Any, role: str) -> list[Any]:
    """Messages as they are; of a text one of this role."""
    return [{"role": role, "content": said}] if isinstance(said, str) else said

"""The rounds of a run that trains on its policy's own answers: what was collected, and what came of it."""

import re
from collections.abc import Sequence
from typing import Any

from dpo_jax.records.records import Record
from dpo_jax.report.charts import Chart, Series, line_chart
from dpo_jax.report.runs import RunFiles

_SECONDS = ("sampling_seconds", "judging_seconds")


def rounds_of(run: RunFiles) -> dict[str, Any]:
    """Rows of a table, one for each round, a figure of scores and one of lengths, and where the time went."""
    collected = [r for r in run.records if r["split"] == "collect"]
    if not collected:
        return {}
    ends = [r["step"] for r in collected[1:]] + [run.last_step]
    rows = [_row(run.records, one, end) for one, end in zip(collected, ends, strict=True)]
    charts = [
        _chart("Scores", collected, "score"),
        _chart("Tokens of an answer", collected, "tokens"),
    ]
    return {"rows": rows, "charts": [chart for chart in charts if chart], "words": _time(run, collected)}


def _row(records: Sequence[Record], one: Record, end: int) -> dict[str, Any]:
    """A round: its record, how many answers and prompts were dropped, and the evaluation at its end."""
    after = next((r for r in records if r["split"] == "eval" and r["step"] == end and end > one["step"]), {})
    dropped = {
        name.partition("/")[2].replace("_", " "): n for name, n in one.items() if name.startswith("dropped/") and n
    }
    words = ", ".join(f"{n:,.0f} {name}" for name, n in dropped.items())
    return {"record": one, "dropped": words, "after": after}


def _chart(title: str, collected: Sequence[Record], name: str) -> Chart | None:
    rounds = [r for r in collected if re.fullmatch(r"[0-9]{1,9}", r.get("round", ""))]
    both = (("better", "chosen"), ("worse", "rejected"))
    lines = [
        Series(side, color, [(float(r["round"]), r.get(f"{name}_{side}")) for r in rounds]) for side, color in both
    ]
    return line_chart(title, lines, note="Means of the pairs' answers, by round.", small=True)


def _time(run: RunFiles, collected: Sequence[Record]) -> str:
    """Shares of sampling, judging and updates in their sum."""
    seconds = [sum(r.get(name) or 0.0 for r in collected) for name in _SECONDS]
    seconds.append(run.training_seconds or 0.0)
    total = sum(seconds) or 1.0
    shares = ", ".join(
        f"{name} {value / total:.0%}" for name, value in zip(("drawing", "judging", "updates"), seconds, strict=True)
    )
    return f"Of {total:,.0f} seconds: {shares}; evaluation and compiling are not counted."

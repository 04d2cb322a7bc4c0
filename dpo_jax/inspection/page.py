"""An inspection as one self-contained page, in the look of a run's report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_jax.data.lengths import PARTS, length_report
from dpo_jax.inspection.gather import (
    Example,
    Inspection,
    PlanUse,
    bad_reasons,
    length_bias,
    mixture_words,
    plan_words,
    shape_words,
    visible,
)
from dpo_jax.report.html import count, fold, section, table, text
from dpo_jax.report.lengths import length_charts

OPEN_EXAMPLES = 3  # shown at once; the others are folded


def page(inspection: Inspection) -> tuple[str, str]:
    """The title and the HTML body."""
    report = inspection.report
    dataset = inspection.dataset if report.get("mixture") else Path(inspection.dataset).name
    title = f"Data: {dataset} for {Path(inspection.model).name}"
    pairs = {name: entry["pairs"] for name, entry in report["splits"].items()}
    dropped = sum(sum(source["dropped"].values()) for source in report["sources"])
    words = f"{pairs['train']:,} training pairs, {pairs['eval']:,} held out, {dropped:,} rows dropped"
    return title, "".join(
        (
            f'<header><h1>{text(title)}</h1><p class="sub">{text(words)}</p></header>',
            section("Rows", _rows(inspection), _below_rows(report)),
            section("Lengths", _lengths(inspection), length_bias(inspection)),
            section("Plan of the first epoch", _plan(inspection.plan), inspection.plan.where)
            if inspection.plan
            else section("Plan", f"<p>{text(inspection.note)}</p>"),
            section("Pairs as the model sees them", _examples(inspection), "The loss is on the coloured tokens."),
        )
    )


def _below_rows(report: Mapping[str, Any]) -> str:
    mixture = mixture_words(report)
    return (f"Mixture: {mixture}. " if mixture else "") + f"Evaluation: {report['held_out'].removesuffix('.')}."


def _rows(inspection: Inspection) -> str:
    sources = inspection.report["sources"]
    cells = [
        (
            text(source["name"]),
            text(source["split"]),
            count(source["read"]),
            count(source["kept"]),
            _reasons(source["dropped"]),
            _reasons(source["truncated"]),
        )
        for source in sources
    ]
    bad = [
        (text(source["name"]), text(source["split"]), text(reason), count(n), text(first))
        for source in sources
        for reason, n, first in bad_reasons(source)
    ]
    files = "".join(f"<div><code>{text(file)}</code></div>" for source in sources for file in source["files"])
    kept_in = inspection.report.get("quarantine")
    return (
        table(("source", "split", "read", "kept", "dropped", "truncated"), cells, words=(0, 1, 4, 5))
        + (table(("bad rows of", "split", "reason", "rows", "first"), bad, words=(0, 1, 2, 4)) if bad else "")
        + (f'<p class="warn">Bad rows are kept in <code>{text(kept_in)}</code>.</p>' if kept_in else "")
        + fold("Files", f"<div>{files}</div>")
    )


def _reasons(found: Mapping[str, int]) -> str:
    parts = [f"<i>{text(reason.replace('_', ' '))} {count(n)}</i>" for reason, n in found.items() if n]
    return " · ".join(parts) or '<span class="none">–</span>'


def _lengths(inspection: Inspection) -> str:
    cells = [
        (text(split), count(entry["pairs"]), text(part), *(count(stats[key]) for key in ("mean", "p50", "p90", "max")))
        for split, entry in inspection.report["splits"].items()
        for part, stats in entry["tokens"].items()
    ]
    head = ("split", "pairs", "tokens of", "mean", "median", "p90", "max")
    return table(head, cells, words=(0, 2)) + length_charts(length_report(inspection.lengths).get("histograms", {}))


def _plan(plan: PlanUse) -> str:
    cells = [
        (
            *map(text, shape_words(use)),
            count(use.shape.pairs),
            count(use.steps),
            f"{use.fraction:.1%}" if use.steps else "–",
        )
        for use in plan.uses
    ]
    head = ("rows x [P | C | R]", "pairs a row", "at most", "steps", "real tokens")
    return table(head, cells) + f'<p class="note">{text(plan_words(plan))}.</p>'


def _examples(inspection: Inspection) -> str:
    blocks = [_example(example) for example in inspection.examples]
    rest = blocks[OPEN_EXAMPLES:]
    return "".join(blocks[:OPEN_EXAMPLES]) + (fold(f"{len(rest)} more pairs", "".join(rest)) if rest else "")


def _example(example: Example) -> str:
    def said(part: str) -> str:
        spans = "".join(
            f'<span data-ids="{" ".join(map(str, piece.ids))}" title="{" ".join(map(str, piece.ids))}">'
            + (f"<b>{text(visible(piece))}</b>" if piece.special else text(visible(piece)))
            + "</span>"
            for piece in getattr(example, part)
        )
        return f'<div class="said tokens {part}">{spans}</div>'

    answers = "".join(f'<div><h3 class="{part}">{part}</h3>{said(part)}</div>' for part in PARTS[1:])
    return (
        f'<article class="sample"><div class="prompt"><h3>{text(example.source)}, pair {example.number}: prompt</h3>'
        f'{said("prompt")}</div><div class="pair">{answers}</div></article>'
    )

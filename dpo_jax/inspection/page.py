"""An inspection as one self-contained page, in the look of a run's report: its template's values."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_jax.data.lengths import PARTS, length_report
from dpo_jax.inspection.gather import (
    SHAPE_HEAD,
    Example,
    Inspection,
    bad_rows,
    length_bias,
    visible_text,
)
from dpo_jax.report.html import write_page
from dpo_jax.report.lengths import length_charts
from dpo_jax.report.sections import mixture_parts


def write_inspection(inspection: Inspection, path: Path) -> Path:
    """Write the page.

    Raises:
      UserError: the place cannot be written.
    """
    report = inspection.report
    dataset = inspection.dataset if report.get("mixture") else Path(inspection.dataset).name
    pairs = {name: entry["pairs"] for name, entry in report["splits"].items()}
    dropped = sum(sum(source["dropped"].values()) for source in report["sources"])
    return write_page(
        path,
        "inspection/templates/inspection.html",
        option="--html",
        title=f"Data: {dataset} for {Path(inspection.model).name}",
        counts=f"{pairs['train']:,} training pairs, {pairs['eval']:,} held out, {dropped:,} rows dropped",
        origin=_origin(report),
        report=report,
        bad=bad_rows(report),
        bias=length_bias(inspection),
        histograms=length_charts(length_report(inspection.lengths).get("histograms", {})),
        schedule=inspection.schedule,
        shape_head=SHAPE_HEAD,
        note=inspection.note,
        examples=[_example(example) for example in inspection.examples],
    )


def _origin(report: Mapping[str, Any]) -> str:
    mixture = "; ".join(mixture_parts(report))
    return (f"Mixture: {mixture}. " if mixture else "") + f"Evaluation: {report['held_out'].removesuffix('.')}."


def _example(example: Example) -> dict[str, Any]:
    """By part: (text, ids, whether special) of each piece."""
    pieces = {part: getattr(example, part) for part in PARTS}
    return {"source": example.source, "number": example.number} | {
        part: [(visible_text(p), " ".join(map(str, p.ids)), p.special) for p in pieces[part]] for part in PARTS
    }

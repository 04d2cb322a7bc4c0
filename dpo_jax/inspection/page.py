"""An inspection as one self-contained page, in the look of a run's report: its template's values."""

from pathlib import Path

from dpo_jax.inspection.gather import SHAPE_HEAD, Inspection, bad_rows
from dpo_jax.report.html import write_page
from dpo_jax.report.sections import data_lengths, mixture_parts


def write_inspection(inspection: Inspection, path: Path) -> Path:
    """Write the page.

    Raises:
      UserError: the place cannot be written.
    """
    report = inspection.report
    mixture = "; ".join(mixture_parts(report))
    dataset = inspection.dataset if mixture else Path(inspection.dataset).name
    pairs = {name: entry["pairs"] for name, entry in report["splits"].items()}
    dropped = sum(sum(source["dropped"].values()) for source in report["sources"])
    return write_page(
        path,
        "inspection/templates/inspection.html",
        option="--html",
        title=f"Data: {dataset} for {Path(inspection.model).name}",
        counts=f"{pairs['train']:,} training pairs, {pairs['eval']:,} held out, {dropped:,} rows dropped",
        origin=(f"Mixture: {mixture}. " if mixture else "") + f"Evaluation: {report['held_out'].removesuffix('.')}.",
        report=report,
        bad=bad_rows(report),
        lengths=data_lengths(report),
        schedule=inspection.schedule,
        shape_head=SHAPE_HEAD,
        note=inspection.note,
        examples=inspection.examples,
    )

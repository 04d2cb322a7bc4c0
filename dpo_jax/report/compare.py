"""What the page that compares runs shows: the values of `report/templates/compare.html`."""

from collections.abc import Sequence
from typing import Any

from dpo_jax.config.saved import differing_keys
from dpo_jax.records.records import HELD_OUT, before_after
from dpo_jax.report.charts import Chart, line_chart
from dpo_jax.report.html import run_color
from dpo_jax.report.runs import OTHER_PLOTS, Plot, RunFiles, main_plots, metric_label, metric_series

ANSWERED = 4  # prompts shown


def compare_page(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """The values of the page's template; numbers, keys and answers have one entry for each run."""
    names = _names(runs)
    tables = [run.saved.table for run in runs]
    plots = (*main_plots(runs), *OTHER_PLOTS)
    figures = [_figure(runs, names, plot, name) for plot in plots for name in plot.names]
    return {
        "title": "Compared: " + ", ".join(names),
        "names": names,
        "colors": [run_color(i) for i in range(len(runs))],
        "finals": _finals(runs),
        "differences": [(key, [table.get(key) for table in tables]) for key in differing_keys(tables)],
        "figures": [figure for figure in figures if figure],
        "answered": _answers(runs),
    }


def _names(runs: Sequence[RunFiles]) -> list[str]:
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, 1)]


def _finals(runs: Sequence[RunFiles]) -> list[tuple[str, str, float | None, list[tuple[float | None, float | None]]]]:
    """By metric: name, its words, the best value where values can be ranked, (value, standard error) of each run."""
    finals = [{name: after for name, _, after in before_after(run.records)} for run in runs]
    groups = dict.fromkeys(name for final in finals for name in final if name.startswith("accuracy/"))
    rows = []
    for name in (*HELD_OUT, *groups):
        values = [final.get(name) for final in finals]
        known = [value for value in values if value is not None]
        if known:
            # Accuracy alone can be ranked: loss, margin and rewards depend on each run's beta.
            ranked = name == "accuracy"
            cells = [(value, run.standard_error(name, value)) for run, value in zip(runs, values, strict=True)]
            rows.append((name, metric_label(name), max(known) if ranked else None, cells))
    alone = {
        ("step", "Last step"): (run.last_step for run in runs),
        ("pairs_per_second", "Pairs per second (median)"): (run.median("pairs_per_second") for run in runs),
        ("memory_gb", "Peak memory, GB"): (max(run.training_values("memory_gb"), default=None) for run in runs),
    }
    return rows + [(*names, None, [(value, None) for value in values]) for names, values in alone.items()]


def _answers(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Prompts that every run answered after training, with each run's answer."""
    by_run = []
    for run in runs:
        shown = (s for s in run.samples if (s.get("when"), s.get("mode")) == ("after", "greedy"))
        by_run.append({s.get("prompt", ""): s.get("answer", "") for s in shown})
    shared = [prompt for prompt in by_run[0] if all(prompt in answers for answers in by_run)]
    return [(prompt, [answers[prompt] for answers in by_run]) for prompt in shared[:ANSWERED]]


def _figure(runs: Sequence[RunFiles], names: Sequence[str], plot: Plot, name: str) -> Chart | None:
    each = [metric_series(run, plot, name, names[i], run_color(i)) for i, run in enumerate(runs)]
    series = [s for of_run in each for s in of_run]
    return line_chart(metric_label(name), series, guide=plot.guide, from_zero=plot.from_zero)

"""The page that compares runs: final numbers, differences of their configs, curves over one another."""

import json
from collections.abc import Sequence

from dpo_jax.records.records import HELD_OUT, before_after
from dpo_jax.report.charts import chart
from dpo_jax.report.html import RUN_COLORS, count, number, section, setting, table, text
from dpo_jax.report.runs import (
    OTHER_PLOTS,
    Plot,
    Run,
    accuracy_error,
    held_out_series,
    largest,
    last_step,
    main_plots,
    median,
    metric_label,
    training_series,
)

AFTER = ("after", "greedy")
ANSWERED = 4  # prompts shown


def compare_page(runs: Sequence[Run]) -> tuple[str, str]:
    """The title and the HTML body."""
    names = _names(runs)
    swatches = "".join(
        f'<span><i class="dot" style="color:var(--{_color(i)})"></i>{text(name)}</span>' for i, name in enumerate(names)
    )
    differences = _differences(runs)
    words = tuple(range(len(runs) + 1))
    body = [
        f'<header><h1>{len(runs)} DPO runs</h1><p class="key">{swatches}</p></header>',
        section("Held-out pairs at the end", table(("", *names), _finals(runs)), "The best accuracy is bold."),
        section(
            "What differs",
            table(("key", *names), differences, words=words)
            if differences
            else "<p>The configurations are equal, or not there.</p>",
        ),
        section("Curves", _curves(runs, names), "By step. Dots are held-out pairs, thin lines training batches."),
        section("Answers after training", _answers(runs, names), "Greedy, to prompts that all runs answered."),
    ]
    return "Compared: " + ", ".join(names), "".join(body)


def _color(i: int) -> str:
    return f"run-{i % RUN_COLORS}"


def _names(runs: Sequence[Run]) -> list[str]:
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, 1)]


def _differences(runs: Sequence[Run]) -> list[list[str]]:
    keys = dict.fromkeys(key for run in runs for key in run.config)
    return [
        [f"<code>{text(key)}</code>", *(f"<code>{setting(run.config.get(key))}</code>" for run in runs)]
        for key in keys
        if len({json.dumps(run.config.get(key)) for run in runs}) > 1
    ]


def _finals(runs: Sequence[Run]) -> list[list[str]]:
    finals = [{name: after for name, _, after in before_after(run.records)} for run in runs]
    groups = dict.fromkeys(name for final in finals for name in final if name.startswith("accuracy/"))
    rows = []
    for name in (*HELD_OUT, *groups):
        values = [final.get(name) for final in finals]
        known = [value for value in values if value is not None]
        if not known:
            continue
        # Accuracy alone can be ranked: loss, margin and rewards depend on each run's beta.
        best = max(known) if name == "accuracy" else None
        cells = []
        for run, value in zip(runs, values, strict=True):
            error = accuracy_error(run, value) if name == "accuracy" else None
            cell = number(name, value) + (f" ± {number(name, error)}" if error is not None else "")
            cells.append(f"<strong>{cell}</strong>" if value is not None and value == best else cell)
        rows.append([text(metric_label(name)), *cells])
    rows.append(["Last step", *(count(last_step(run)) for run in runs)])
    rows.append(
        ["Pairs per second (median)", *(number("pairs_per_second", median(run, "pairs_per_second")) for run in runs)]
    )
    rows.append(["Peak memory, GB", *(number("memory_gb", largest(run, "memory_gb")) for run in runs)])
    return rows


def _answers(runs: Sequence[Run], names: Sequence[str]) -> str:
    """What every run says in the end to the same prompts."""
    said = [
        {s.get("prompt", ""): s.get("answer", "") for s in run.samples if (s.get("when"), s.get("mode")) == AFTER}
        for run in runs
    ]
    shared = [prompt for prompt in said[0] if all(prompt in answers for answers in said)]
    blocks = []
    for prompt in shared[:ANSWERED]:
        answers = "".join(
            f'<div><h3 style="color:var(--{_color(i)})">{text(name)}</h3>'
            f'<div class="said">{text(str(said[i][prompt]).strip())}</div></div>'
            for i, name in enumerate(names)
        )
        blocks.append(
            f'<article class="sample"><div class="prompt"><h3>prompt</h3><div class="said">{text(prompt.strip())}</div>'
            f'</div><div class="pair">{answers}</div></article>'
        )
    return "".join(blocks)


def _curves(runs: Sequence[Run], names: Sequence[str]) -> str:
    figures = "".join(
        _figure(runs, names, plot, name) for plot in (*main_plots(runs), *OTHER_PLOTS) for name in plot.names
    )
    return f'<div class="charts compared">{figures}</div>' if figures else ""


def _figure(runs: Sequence[Run], names: Sequence[str], plot: Plot, name: str) -> str:
    series = []
    for i, run in enumerate(runs):
        label: str | None = names[i]
        held_out = held_out_series(run, name, names[i], _color(i))
        if plot.split == "train" and held_out.points:
            series.append(held_out)
            label = None  # one entry of the legend for each run
        series.append(training_series(run, plot, name, label, _color(i)))
    return chart(metric_label(name), series, guide=plot.guide, from_zero=plot.from_zero)

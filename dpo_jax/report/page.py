"""What a run's page shows: the values of `report/templates/run.html`."""

from collections.abc import Sequence
from typing import Any

from dpo_jax.records.records import before_after
from dpo_jax.report import sections
from dpo_jax.report.charts import Chart, line_chart
from dpo_jax.report.rounds import rounds_of
from dpo_jax.report.runs import OTHER_PLOTS, Plot, RunFiles, grouped_plots, main_plots, metric_label, metric_series

NOT_CHARTED = {"step", "pairs", "tokens", "answers", "kl_error", "win_rate_error", "reward_error"}  # errors: whiskers
HEADLINE = {
    "loss": ("Held-out loss", "Where both are equal it is ln 2 = 0.6931."),
    "dpo_loss": ("Held-out loss", "A policy equal to its reference has ln 2 = 0.6931."),
    "reward": ("Reward", "Of answers to held-out prompts: what is trained for."),
    "accuracy": ("Held-out accuracy", "Pairs whose chosen answer has the higher reward."),
    "margin": ("Held-out margin", "Chosen reward minus rejected reward."),
    "win_rate": ("Win rate", "Answers to held-out prompts against the baseline's, under the judge."),
    "kl": ("KL from the reference", "Nats an answer, on the policy's own answers."),
}


def run_page(run: RunFiles) -> dict[str, Any]:
    """The values of the page's template."""
    model, dataset = run.saved.title
    kind = run.saved.kind
    held_out = [(name, metric_label(name), *values) for name, *values in before_after(run.records) if "/" not in name]
    return {
        "title": f"{model}: {kind} on {dataset}" if model and dataset else f"{kind} run {run.name}",
        "run": run,
        "progress": _progress(run),
        "warnings": _warnings(run),
        "headline": _headline(run),
        "facts": _facts(run),
        "curves": _curves(run),
        "held_out": held_out,
        "groups": sections.group_tables(run),
        "rounds": rounds_of(run),
        "scores": sections.score_figures(run.scores),
        "samples": sections.samples_by_prompt(run),
        "lengths": sections.data_lengths(run.data),
        "checkpoints": sections.checkpoint_words(run),
    }


def _progress(run: RunFiles) -> str:
    steps, total = run.last_step, run.total_steps
    pairs, seconds = run.held_out_pairs, run.training_seconds
    words = [
        run.name,
        f"step {steps:,}" + (f" of {total:,}" if total else ""),
        f"{pairs:,} held-out pairs" if pairs else "",
        f"{duration(seconds)} of updates" if seconds else "",
        run.hardware,
    ]
    return " · ".join(filter(None, words))


def _warnings(run: RunFiles) -> list[str]:
    steps, total = run.last_step, run.total_steps
    warnings = []
    if total and steps < total:
        warnings.append(f"The run has not reached its end: its last record is of step {steps} of {total}.")
    bad = [r for r in run.records if any(v is None for v in r.values())]
    if bad:
        warnings.append(
            f"Records with numbers that are not finite: {len(bad)}, the first at {bad[0].get('split')} step "
            f"{bad[0].get('step')}; the curves leave them out."
        )
    return warnings


def _headline(run: RunFiles) -> list[dict[str, Any]]:
    """The largest numbers of the page; `compared`: before is shown too."""
    rows = {name: (before, after) for name, before, after in before_after(run.records)}
    blocks = []
    for name, (title, note) in HEADLINE.items():
        if name not in rows:
            continue
        before, after = rows[name]
        # Before training all pairs tie and the KL is 0: neither is a number to start from.
        compared = before is not None if name == "accuracy" else bool(before) if name == "kl" else True
        if name == "accuracy" and not compared:
            note += " Chance is 0.5; before training all pairs tie."
        if name == "dpo_loss" and not run.saved.is_dpo:
            note = f"That of {run.saved.loss}."
        if name == "loss" and run.saved.is_policy:
            note = "Nats a token of the held-out answers."
        if name == "win_rate":
            note = f"Answers to held-out prompts against the baseline's, under {run.saved.judge}."
        values = {"before": before if compared else None, "after": after, "error": run.standard_error(name, after)}
        blocks.append({"name": name, "title": title, "note": note, "compared": compared} | values)
    return blocks


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    """What a reader asks first: (name, text); settings that are off, or not known, are left out."""
    about, words = run.about, run.saved.words

    def typical(form: str, name: str) -> str:
        value = run.median(name)
        return "" if value is None else form.format(value)

    computed = [f"{about['compute_dtype']} compute"] if "compute_dtype" in about else words["Compute"]
    shapes = [f"{s['rows']} × [{' | '.join(map(str, s['widths']))}] tokens" for s in about.get("rows", [])[:1]]
    facts: dict[str, Sequence[str | None]] = {
        "Model": [run.saved.model, f"{about['parameters']:,} parameters" if "parameters" in about else ""],
        "Reward": words["Reward"],
        "Reference": words["Reference"],
        "Dataset": [run.saved.dataset],
        "Mixture": sections.mixture_parts(run.data),
        "Prompt format": [run.data.get("prompt_format")],
        "Held out": [run.data.get("held_out")],
        "Loss": words["Loss"],
        "Learning rate": words["Learning rate"],
        "Optimizer": words["Optimizer"],
        "Batch": words["Batch"],
        "Row shapes": shapes,
        "SFT first": words["SFT first"],
        "Trained": [
            *words["Trained"],
            f"{about['trained_parameters']:,} parameters" if run.saved.lora and "trained_parameters" in about else "",
        ],
        "Precision": words["Precision"] + computed,
        "Longest, in tokens": words["Longest, in tokens"],
        "Devices": [run.hardware, f"{about['processes']} processes" if about.get("processes", 1) > 1 else ""],
        "Mesh": [f"{axis} {size}" for axis, size in about.get("mesh", {}).items()] or words["Mesh"],
        "Speed (median)": [typical("{:.1f} pairs/s", "pairs_per_second"), typical("{:.3g} s a step", "step_seconds")],
        "Computed tokens that are real": [typical("{:.1%}", "useful_token_fraction")],
        "Peak memory": [f"{peak:.2f} GB" if (peak := max(run.training_values("memory_gb"), default=0)) else ""],
    }
    return [(name, ", ".join(filter(None, parts))) for name, parts in facts.items() if any(parts)]


def duration(seconds: float) -> str:
    """Time for a person.

    >>> duration(42.4), duration(194), duration(7322)
    ('42 s', '3 min 14 s', '2 h 2 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600:,} h {whole // 60 % 60} min"


def _curves(run: RunFiles) -> dict[str, list[Chart]]:
    charted = {name for plot in (*main_plots([run]), *OTHER_PLOTS) for name in plot.names} | NOT_CHARTED
    numeric = dict.fromkeys(name for r in run.records for name, value in r.items() if isinstance(value, int | float))
    others = [Plot(metric_label(name), (name,)) for name in numeric if name not in charted and "/" not in name]
    return {
        "main": run_figures(run, main_plots([run]), small=False),
        "small": run_figures(run, (*grouped_plots(run), *OTHER_PLOTS), small=True),
        "further": run_figures(run, others, small=True),
    }


def run_figures(run: RunFiles, plots: Sequence[Plot], *, small: bool) -> list[Chart]:
    """The charts of those plots that the run has numbers for."""
    found = []
    for plot in plots:
        lines = zip(plot.names, plot.lines or (("", "accent"),), strict=True)
        series = [s for name, (label, color) in lines for s in metric_series(run, plot, name, label, color)]
        figure = line_chart(plot.title, series, note=plot.note, guide=plot.guide, from_zero=plot.from_zero, small=small)
        if figure:
            found.append(figure)
    return found

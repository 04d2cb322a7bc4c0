"""A run's page, `report.html`, and the command line for it.

`python -m dpo_jax.report DIR` writes DIR/report.html again; with several directories it writes compare.html. Both read
only what a run leaves in its directory, and do with what is there.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.records.records import before_after
from dpo_jax.report import sections
from dpo_jax.report.charts import chart
from dpo_jax.report.compare import compare_page
from dpo_jax.report.html import fold, number, save, section, setting, text
from dpo_jax.report.runs import (
    MAIN_PLOTS,
    OTHER_PLOTS,
    Plot,
    Run,
    accuracy_error,
    held_out_pairs,
    held_out_series,
    is_dpo,
    largest,
    last_step,
    length_plot,
    load,
    main_plots,
    median,
    metric_label,
    source_plot,
    sources,
    total_steps,
    training_seconds,
    training_series,
)

NOT_CHARTED = {"step", "pairs", "tokens", "kl_error"}  # the last one is the KL's whiskers
HEADLINE = {
    "dpo_loss": ("Held-out loss", "A policy equal to its reference has ln 2 = 0.6931."),
    "accuracy": ("Held-out accuracy", "Pairs whose chosen answer has the higher reward."),
    "margin": ("Held-out margin", "Chosen reward minus rejected reward."),
    "kl": ("KL from the reference", "Nats an answer, on the policy's own answers."),
}


def write(workdir: Path) -> Path:
    """Write the run's page, WORKDIR/report.html, and return its path."""
    return save(workdir / "report.html", *run_page(load(workdir)), option="--out")


def compare(workdirs: Sequence[Path], out: Path) -> Path:
    """Write one page for several runs: differences of their configs, final numbers, curves over one another."""
    return save(out, *compare_page([load(workdir) for workdir in workdirs]), option="--out")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 2 for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m dpo_jax.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("workdirs", nargs="+", type=Path, metavar="DIR", help="a run's --workdir; several are compared")
    parser.add_argument("--out", type=Path, help="the page to write (default: DIR/report.html, or ./compare.html)")
    options = parser.parse_args(arguments)
    try:
        if len(options.workdirs) > 1:
            path = compare(options.workdirs, options.out or Path("compare.html"))
        elif options.out:
            path = save(options.out, *run_page(load(options.workdirs[0])), option="--out")
        else:
            path = write(options.workdirs[0])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(path)
    return 0


def run_page(run: Run) -> tuple[str, str]:
    """The title and the HTML body of a run's page."""
    model, dataset = (Path(str(run.config.get(key) or "")).name for key in ("model", "dataset"))
    title = f"{model}: DPO on {dataset}" if model and dataset else f"DPO run {run.name}"
    body = [
        f'<header><h1>{text(title)}</h1><p class="sub">{text(_progress(run))}</p>',
        *(f'<p class="warn">{text(warning)}</p>' for warning in _warnings(run)),
        f"{_headline(run)}</header>",
        section("What was run", _settings(run)),
        section(
            "Curves", _curves(run), "By step. Dots are held-out pairs; thin lines training batches and their mean."
        ),
        section("Held-out pairs, before and after", sections.held_out_table(run)),
        section("Answers, before and after", sections.samples(run)),
        section("Data", sections.data(run)),
        section("Checkpoints and export", sections.files(run)),
    ]
    return title, "".join(body)


def _progress(run: Run) -> str:
    steps, total = last_step(run), total_steps(run)
    pairs, seconds = held_out_pairs(run), training_seconds(run)
    words = [
        run.name,
        f"step {steps:,}" + (f" of {total:,}" if total else ""),
        f"{pairs:,} held-out pairs" if pairs else "",
        f"{duration(seconds)} of updates" if seconds else "",
        _hardware(run),
    ]
    return " · ".join(filter(None, words))


def _hardware(run: Run) -> str:
    device = run.about.get("device", "")
    return f"{run.about['devices']} × {device}" if device else ""


def _warnings(run: Run) -> list[str]:
    steps, total = last_step(run), total_steps(run)
    found = []
    if total and steps < total:
        found.append(f"The run has not reached its end: its last record is of step {steps} of {total}.")
    bad = [r for r in run.records if any(v is None for v in r.values())]
    if bad:
        found.append(
            f"Records with numbers that are not finite: {len(bad)}, the first at {bad[0].get('split')} step "
            f"{bad[0].get('step')}; the curves leave them out."
        )
    return found


def _headline(run: Run) -> str:
    rows = {name: (before, after) for name, before, after in before_after(run.records)}
    blocks = []
    for name, (title, note) in HEADLINE.items():
        if name not in rows:
            continue
        before, after = rows[name]
        error = accuracy_error(run, after) if name == "accuracy" else None
        if name == "dpo_loss" and not is_dpo(run):
            note = f"That of {text(str(run.config['loss']))}."
        was = f'<span class="was">{number(name, before)} →</span> '
        if name == "accuracy" and before is None:
            was, note = "", note + " Chance is 0.5; before training all pairs tie."
        if name == "kl" and not before:
            was = ""
        blocks.append(
            f'<div><h2>{title}</h2><p class="big">{was}{number(name, after)}'
            + (f" <small>± {number(name, error)}</small>" if error is not None else "")
            + f"</p><p>{note}</p></div>"
        )
    return f'<div class="headline">{"".join(blocks)}</div>' if blocks else ""


def _settings(run: Run) -> str:
    facts = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in _facts(run))
    keys = "".join(
        f"<div><code>{text(key)}</code><code>{setting(value)}</code></div>" for key, value in run.config.items()
    )
    versions = "".join(
        f"<div><code>{text(name)}</code><code>{text(version)}</code></div>"
        for name, version in run.about.get("versions", {}).items()
    )
    return (
        (f"<dl>{facts}</dl>" if facts else "")
        + (fold("Full configuration", f'<div class="config">{keys}</div>') if keys else "")
        + (fold("Versions", f'<div class="config">{versions}</div>') if versions else "")
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    """What a reader asks first: (name, text); settings that are off, or not known, are left out."""
    get, about = run.config.get, run.about

    def say(form: str, key: str) -> str:
        return form.format(get(key)) if get(key) else ""

    def typical(form: str, name: str) -> str:
        value = median(run, name)
        return "" if value is None else form.format(value)

    facts: dict[str, list[Any]] = {
        "Model": [say("{}", "model"), f"{about['parameters']:,} parameters" if "parameters" in about else ""],
        "Reference": [say("{}", "reference") or ("the policy as DPO found it" if "reference" in run.config else "")],
        "Dataset": [say("{}", "dataset")],
        "Mixture": [
            f"{part['name']} {part['weight']:.1%} ({part['epoch']:,} of {part['pairs']:,} pairs an epoch)"
            for part in run.data.get("mixture", [])
        ],
        "Prompt format": [run.data.get("prompt_format")],
        "Held out": [run.data.get("held_out")],
        "Loss": [say("{}", "loss"), say("β {}", "dpo_beta"), say("label smoothing {}", "label_smoothing")],
        "Learning rate": [
            say("{}", "learning_rate"),
            say("{}", "lr_schedule"),
            warm_up(get("warmup_steps")),
        ],
        "Optimizer": [say("{}", "optimizer"), say("decay {}", "weight_decay"), say("clip at {}", "max_grad_norm")],
        "Batch": [
            say("{} pairs", "batch_size"),
            say("{} microbatches", "microbatches") if get("microbatches") != 1 else "",
        ],
        "Row shapes": [_shape(shape) for shape in about.get("rows", [])[:1]],
        "SFT first": [say("{} steps", "sft_steps"), say("{}", "sft_learning_rate")] if get("sft_steps") else [],
        "Trained": [
            say("LoRA of rank {}", "lora_rank") or ("all parameters" if "lora_rank" in run.config else ""),
            f"{about['trained_parameters']:,} parameters" if get("lora_rank") and about else "",
        ],
        "Precision": [
            say("{} parameters", "param_dtype"),
            f"{about['compute_dtype']} compute" if about else say("{} compute", "compute_dtype"),
        ],
        "Longest, in tokens": [say("prompt {}", "max_prompt_length"), say("completion {}", "max_completion_length")],
        "Devices": [_hardware(run), f"{about['processes']} processes" if about.get("processes", 1) > 1 else ""],
        "Mesh": [f"{axis} {number_of}" for axis, number_of in about.get("mesh", {}).items()]
        or [say("data {}", "mesh_data"), say("fsdp {}", "mesh_fsdp"), say("tensor {}", "mesh_tensor")],
        "Speed (median)": [typical("{:.1f} pairs/s", "pairs_per_second"), typical("{:.3g} s a step", "step_seconds")],
        "Computed tokens that are real": [typical("{:.1%}", "useful_token_fraction")],
        "Peak memory": [f"{peak:.2f} GB" if (peak := largest(run, "memory_gb")) else ""],
    }
    return [(name, ", ".join(filter(None, parts))) for name, parts in facts.items() if any(parts)]


def warm_up(steps: float | None) -> str:
    """The warm-up as the config has it: below 1 it is a fraction.

    >>> warm_up(0.1), warm_up(20), warm_up(0)
    ('10% warm-up', '20 warm-up steps', '')
    """
    if not steps:
        return ""
    return f"{steps:.0%} warm-up" if steps < 1 else f"{steps:g} warm-up steps"


def duration(seconds: float) -> str:
    """Time for a person.

    >>> duration(42.4), duration(194), duration(7322)
    ('42 s', '3 min 14 s', '2 h 2 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600:,} h {whole // 60 % 60} min"


def _shape(shape: Mapping[str, Any]) -> str:
    return f"{shape['rows']} × [{' | '.join(map(str, shape['widths']))}] tokens"


def _curves(run: Run) -> str:
    grouped = [source_plot(run)] * bool(sources(run)) + [length_plot(run)]
    charted = {name for plot in (*MAIN_PLOTS, *OTHER_PLOTS) for name in plot.names} | NOT_CHARTED
    numeric = dict.fromkeys(name for r in run.records for name, value in r.items() if isinstance(value, int | float))
    others = [Plot(metric_label(name), (name,)) for name in numeric if name not in charted and "/" not in name]
    main = "".join(_figure(run, plot, small=False) for plot in main_plots([run]))
    small = "".join(_figure(run, plot, small=True) for plot in (*grouped, *OTHER_PLOTS))
    further = "".join(_figure(run, plot, small=True) for plot in others)
    return (
        (f'<div class="charts">{main}</div>' if main else "")
        + (f'<div class="charts three">{small}</div>' if small else "")
        + (fold("Further metrics", f'<div class="charts three">{further}</div>') if further else "")
    )


def _figure(run: Run, plot: Plot, *, small: bool) -> str:
    series = []
    lines = plot.lines or (("", "accent"),)
    for name, (line, color) in zip(plot.names, lines, strict=True):
        held_out = held_out_series(run, name, line or "held-out", color)
        label: str | None = line
        if plot.split == "train" and held_out.points:
            series.append(held_out)
            label = None if line else "train"  # of several metrics each is named once in the legend
        series.append(training_series(run, plot, name, label, color))
    return chart(plot.title, series, note=plot.note, guide=plot.guide, from_zero=plot.from_zero, small=small)

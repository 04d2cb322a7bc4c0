"""A run's page, `report.html`, and the command line for it.

`python -m dpo_jax.report DIR` writes DIR/report.html again; with several directories it writes compare.html. Both read
only what a run leaves in its directory, and do with what is there.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax import metrics
from dpo_jax.charts import chart
from dpo_jax.compare import compare_page
from dpo_jax.errors import UserError
from dpo_jax.page import count, fold, number, save, section, setting, table, text
from dpo_jax.runs import (
    MAIN_PLOTS,
    OTHER_PLOTS,
    Plot,
    Run,
    accuracy_error,
    held_out_pairs,
    held_out_series,
    is_dpo,
    last_step,
    load,
    main_plots,
    median,
    metric_label,
    training_series,
)

NOT_CHARTED = {"step", "pairs", "tokens"}
HEADLINE = {
    "dpo_loss": ("Held-out loss", "A policy equal to its reference has ln 2 = 0.6931."),
    "accuracy": ("Held-out accuracy", "Pairs whose chosen answer has the higher reward."),
    "margin": ("Held-out margin", "Chosen reward minus rejected reward."),
}
OPEN_SAMPLES = 3  # prompts shown at once; the others are folded


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
        section("Held-out pairs, before and after", _before_after(run)),
        section("Answers, before and after", _samples(run)),
        section("Data", _data(run)),
    ]
    return title, "".join(body)


def _progress(run: Run) -> str:
    steps, total = last_step(run), run.config.get("num_steps")
    words = [run.name, f"step {steps}" + (f" of {total}" if total else "")]
    pairs = held_out_pairs(run)
    return " · ".join(words + ([f"{pairs:,} held-out pairs"] if pairs else []))


def _warnings(run: Run) -> list[str]:
    steps, total = last_step(run), run.config.get("num_steps")
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
    rows = {name: (before, after) for name, before, after in metrics.before_after(run.records)}
    blocks = []
    for name, (title, note) in HEADLINE.items():
        if name not in rows:
            continue
        before, after = rows[name]
        error = accuracy_error(run, after) if name == "accuracy" else None
        if name == "dpo_loss" and not is_dpo(run):
            note = f"That of {text(str(run.config['loss']))}."
        if name == "accuracy" and before == 0 and rows.get("margin", (None,))[0] == 0:
            note += " Before training all pairs tie, and a tie counts as lost."
        blocks.append(
            f'<div><h2>{title}</h2><p class="big">'
            f'<span class="was">{number(name, before)} →</span> {number(name, after)}'
            + (f" <small>± {number(name, error)}</small>" if error is not None else "")
            + f"</p><p>{note}</p></div>"
        )
    return f'<div class="headline">{"".join(blocks)}</div>' if blocks else ""


def _settings(run: Run) -> str:
    facts = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in _facts(run))
    keys = "".join(
        f"<div><code>{text(key)}</code><code>{setting(value)}</code></div>" for key, value in run.config.items()
    )
    return (f"<dl>{facts}</dl>" if facts else "") + (
        fold("Full configuration", f'<div class="config">{keys}</div>') if keys else ""
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    """What a reader asks first: (name, text); settings that are off, or not known, are left out."""
    get = run.config.get

    def say(form: str, key: str) -> str:
        return form.format(get(key)) if get(key) else ""

    def typical(form: str, name: str) -> str:
        value = median(run, name)
        return "" if value is None else form.format(value)

    facts: dict[str, list[Any]] = {
        "Model": [say("{}", "model")],
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
            say("{} warm-up steps", "warmup_steps"),
        ],
        "Optimizer": [say("{}", "optimizer"), say("decay {}", "weight_decay"), say("clip at {}", "max_grad_norm")],
        "Batch": [say("{} pairs", "batch_size"), say("{} microbatches", "microbatches")],
        "SFT first": [say("{} steps", "sft_steps"), say("{}", "sft_learning_rate")] if get("sft_steps") else [],
        "Trained": [say("LoRA of rank {}", "lora_rank") or ("all parameters" if "lora_rank" in run.config else "")],
        "Precision": [say("{} parameters", "param_dtype"), say("{} compute", "compute_dtype")],
        "Longest, in tokens": [say("prompt {}", "max_prompt_length"), say("completion {}", "max_completion_length")],
        "Mesh": [say("data {}", "mesh_data"), say("fsdp {}", "mesh_fsdp"), say("tensor {}", "mesh_tensor")],
        "Speed (median)": [typical("{:.1f} pairs/s", "pairs_per_second"), typical("{:.3g} s a step", "step_seconds")],
        "Computed tokens that are real": [typical("{:.1%}", "useful_token_fraction")],
    }
    return [(name, ", ".join(filter(None, parts))) for name, parts in facts.items() if any(parts)]


def _curves(run: Run) -> str:
    charted = {name for plot in (*MAIN_PLOTS, *OTHER_PLOTS) for name in plot.names} | NOT_CHARTED
    numeric = dict.fromkeys(name for r in run.records for name, value in r.items() if isinstance(value, int | float))
    others = [Plot(name.replace("_", " "), (name,)) for name in numeric if name not in charted]
    main = "".join(_figure(run, plot, small=False) for plot in main_plots([run]))
    small = "".join(_figure(run, plot, small=True) for plot in OTHER_PLOTS)
    further = "".join(_figure(run, plot, small=True) for plot in others)
    return (
        (f'<div class="charts">{main}</div>' if main else "")
        + (f'<div class="charts three">{small}</div>' if small else "")
        + (fold("Further metrics", f'<div class="charts three">{further}</div>') if further else "")
    )


def _figure(run: Run, plot: Plot, *, small: bool) -> str:
    series = []
    for name in plot.names:
        # Of several metrics, chosen_reward is drawn in the colour "chosen", and named so once in the legend.
        color = name.split("_")[0] if len(plot.names) > 1 else "accent"
        label: str | None = color if len(plot.names) > 1 else ""
        held_out = held_out_series(run, name, label or "held-out", color)
        if plot.split == "train" and held_out.points:
            series.append(held_out)
            label = None if label else "train"
        series.append(training_series(run, plot, name, label, color))
    return chart(plot.title, series, note=plot.note, guide=plot.guide, from_zero=plot.from_zero, small=small)


def _before_after(run: Run) -> str:
    rows = [
        (text(metric_label(name)), number(name, before), number(name, after), _change(name, before, after))
        for name, before, after in metrics.before_after(run.records)
    ]
    return table(("", "before", "after", "change"), rows, narrow=True) if rows else ""


def _change(name: str, before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return ""
    return ("+" if after > before else "") + number(name, after - before)


def _samples(run: Run) -> str:
    prompts: dict[str, dict[tuple[str, str], metrics.Record]] = {}
    for sample in run.samples:
        prompts.setdefault(sample.get("prompt", ""), {})[sample.get("when", ""), sample.get("mode", "")] = sample
    blocks = [_sample(prompt, answers) for prompt, answers in prompts.items()]
    rest = blocks[OPEN_SAMPLES:]
    return "".join(blocks[:OPEN_SAMPLES]) + (fold(f"{len(rest)} more prompts", "".join(rest)) if rest else "")


def _sample(prompt: str, answers: Mapping[tuple[str, str], metrics.Record]) -> str:
    def said(sample: Mapping[str, Any], key: str = "answer") -> str:
        words = str(sample.get(key, "")).strip()
        return f'<div class="said">{text(words)}</div>' if words else '<div class="said none">empty</div>'

    def side(when: str, mode: str) -> str:
        sample = answers.get((when, mode))
        if sample is None:
            return f'<div><h3>{text(when)}, {text(mode)}</h3><div class="said none">not sampled</div></div>'
        return f"<div><h3>{text(when)}, {text(mode)}</h3>{said(sample)}</div>"

    modes = dict.fromkeys(mode for _, mode in answers)
    pairs = "".join(side(when, mode) for mode in modes for when in ("before", "after"))
    any_sample = next(iter(answers.values()))
    truth = "".join(f'<div><h3 class="{key}">{key}</h3>{said(any_sample, key)}</div>' for key in ("chosen", "rejected"))
    return (
        f'<article class="sample"><div class="prompt"><h3>prompt</h3>{said({"answer": prompt})}</div>'
        f'<div class="pair">{pairs}</div>'
        + fold("The data set's answers", f'<div class="pair">{truth}</div>')
        + "</article>"
    )


def _data(run: Run) -> str:
    def reasons(found: Mapping[str, int]) -> str:
        parts = [f"<i>{text(reason.replace('_', ' '))} {count(n)}</i>" for reason, n in found.items() if n]
        return " · ".join(parts) or '<span class="none">–</span>'

    sources = [
        (
            text(source.get("name", "")),
            text(source.get("split", "")),
            count(source.get("read")),
            count(source.get("kept")),
            reasons(source.get("dropped", {})),
            reasons(source.get("truncated", {})),
        )
        for source in run.data.get("sources", [])
    ]
    lengths = [
        (
            text(split),
            count(entry.get("pairs")),
            text(part),
            *(count(stats.get(key)) for key in ("mean", "p50", "p90", "max")),
        )
        for split, entry in run.data.get("splits", {}).items()
        for part, stats in entry.get("tokens", {}).items()
    ]
    files = "".join(
        f"<div><code>{text(file)}</code></div>" for s in run.data.get("sources", []) for file in s.get("files", [])
    )
    return (
        (
            table(("source", "split", "read", "kept", "dropped", "truncated"), sources, words=(0, 1, 4, 5))
            if sources
            else ""
        )
        + (
            table(("split", "pairs", "tokens of", "mean", "median", "p90", "max"), lengths, words=(0, 2))
            if lengths
            else ""
        )
        + (fold("Files", f"<div>{files}</div>") if files else "")
    )


if __name__ == "__main__":
    sys.exit(main())

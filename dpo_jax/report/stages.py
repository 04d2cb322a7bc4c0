"""The page of `python -m dpo_jax.rlhf`: what each stage did, and whether the reward that was trained for helped.

It reads the stages' directories alone. No JAX.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.config.stages import STAGES
from dpo_jax.records.records import before_after, best_evaluation
from dpo_jax.report import sections
from dpo_jax.report.charts import Chart, Series, line_chart
from dpo_jax.report.html import write_page
from dpo_jax.report.page import duration, run_figures
from dpo_jax.report.runs import OTHER_PLOTS, Plot, RunFiles, load_run, main_plots, metric_label

TITLES = {"sft": "SFT", "reward": "Reward model", "rl": "RL"}
_MAIN = {"sft": ("loss",), "reward": ("accuracy", "loss"), "rl": ("win_rate", "reward", "kl", "mean_length")}
_SMALL = {"rl": ("kl", "win_rate")}  # of `OTHER_PLOTS`


def write_stages_report(workdir: Path, result: Mapping[str, Any]) -> Path:
    """Write WORKDIR/report.html from the stages that are there; `result` is what came of them."""
    runs = {name: load_run(workdir / name) for name in STAGES if (workdir / name / "config.json").is_file()}
    rl = runs.get("rl")
    values: dict[str, Any] = {
        "title": f"RLHF: {workdir.resolve().name}",
        "headline": _headline(result),
        "stages": [row for name, run in runs.items() for row in _rows(name, run)],
        "parts": [(TITLES[name], _figures(name, run)) for name, run in runs.items()],
        "proxy": [] if rl is None else proxy_figures(rl),
        "words": "" if rl is None else _words(rl),
        "samples": [] if rl is None else sections.samples_by_prompt(rl),
    }
    return write_page(workdir / "report.html", "report/templates/stages.html", option="--workdir", **values)


def _headline(result: Mapping[str, Any]) -> list[tuple[str, str, Any, Any, str]]:
    """The largest numbers: title, metric, value, standard error, note; those that are known."""
    rows = (
        ("Win rate over SFT", "win_rate", "The policy that is exported against the one that RL began with."),
        ("KL from SFT", "kl", "Nats an answer."),
        ("Reward model's accuracy", "reward_model_accuracy", "On held-out pairs; chance is 0.5."),
    )
    return [
        (title, name, result[name], result.get(f"{name}_error"), note) for title, name, note in rows if name in result
    ]


def _rows(name: str, run: RunFiles) -> list[dict[str, Any]]:
    """A stage's held-out numbers before and after, a row each; the first also says how many updates in what time."""
    known = {metric: (before, after) for metric, before, after in before_after(run.records)}
    seconds = run.training_seconds
    first = {
        "stage": name,
        "title": TITLES[name],
        "updates": run.last_step,
        "time": duration(seconds) if seconds else "",
    }
    numbers = [metric for metric in _MAIN[name] if metric in known] or [""]
    return [
        {"metric": metric, "words": metric and metric_label(metric), "numbers": known.get(metric, (None, None))}
        | (first if i == 0 else {"stage": ""})
        for i, metric in enumerate(numbers)
    ]


def _figures(name: str, run: RunFiles) -> list[Chart]:
    more = tuple(plot for plot in OTHER_PLOTS if plot.names[0] in _SMALL.get(name, ()))
    plots: Sequence[Plot] = (*main_plots([run]), *more)
    return run_figures(run, plots, small=True)


def proxy_figures(rl: RunFiles) -> list[Chart]:
    """The reward that is trained for, and the win rate under the judge that is not, by √KL of the evaluations.

    Gao et al. 2022, arXiv 2210.10760: the first goes on rising where the second turns.
    """
    rows = [r for r in rl.records if r["split"] == "eval" and r.get("kl") is not None]
    rows.sort(key=lambda r: r["kl"])
    at = lambda r: math.sqrt(max(r["kl"], 0.0))
    found = []
    for name, title, guide in (("reward", "Reward", None), ("win_rate", "Win rate", (0.5, "equal"))):
        points = [(at(r), r.get(name)) for r in rows]
        errors = {at(r): r[f"{name}_error"] for r in rows if r.get(f"{name}_error")}
        line = Series("held-out prompts", "accent", points, held_out=True, errors=errors)
        chart = line_chart(f"{title} by √KL", [line], guide=guide, small=True)
        if chart:
            found.append(dataclasses.replace(chart, unit="√KL"))
    return found


def _words(rl: RunFiles) -> str:
    """Where the win rate was highest, and where the reward was."""
    best = best_evaluation(rl.records)
    rewards = [r for r in rl.records if r["split"] == "eval" and r["step"] and r.get("reward") is not None]
    if best is None:
        return ""
    words = f"The win rate is highest after update {best['step']:,}, whose policy is exported"
    if not rewards:
        return f"{words}."
    most = max(rewards, key=lambda r: r["reward"])
    if most["step"] == best["step"]:
        return f"{words}; so is the reward."
    return f"{words}; the reward is highest after update {most['step']:,}."

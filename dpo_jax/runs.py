"""What a run left in its directory, and what its pages draw and count from it."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_jax import metrics
from dpo_jax.charts import Series
from dpo_jax.errors import UserError

LABELS = {
    "dpo_loss": "DPO loss",
    "accuracy": "Accuracy",
    "margin": "Margin",
    "chosen_reward": "Chosen reward",
    "rejected_reward": "Rejected reward",
    "chosen_logp": "Chosen log-probability",
    "rejected_logp": "Rejected log-probability",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "pairs_per_second": "Pairs per second",
    "loss": "SFT loss",
}


def metric_label(name: str) -> str:
    """A metric's name for a person; `accuracy/SOURCE` is the accuracy of that source."""
    metric, slash, source = name.partition("/")
    return f"{LABELS[metric]} · {source}" if slash else LABELS[metric]


@dataclass(frozen=True)
class Plot:
    """A chart of the pages: which metrics of which training split, and how `charts.chart` draws them."""

    title: str
    names: tuple[str, ...]
    note: str = ""
    split: str = "train"
    guide: tuple[float, str] | None = None
    from_zero: bool = False
    exact: bool = False


MAIN_PLOTS = (
    Plot("DPO loss", ("dpo_loss",), guide=(math.log(2), "ln 2")),
    Plot("Accuracy", ("accuracy",), "Whiskers: one standard error.", guide=(0.5, "chance")),
    Plot("Margin", ("margin",), guide=(0.0, "")),
    Plot("Rewards", ("chosen_reward", "rejected_reward"), "β · (policy − reference log-probability).", guide=(0.0, "")),
)
OTHER_PLOTS = (
    Plot("Log-probability", ("chosen_logp", "rejected_logp")),
    Plot("Gradient norm", ("grad_norm",), from_zero=True),
    Plot("Learning rate", ("learning_rate",), from_zero=True, exact=True),
    Plot("Pairs per second", ("pairs_per_second",), from_zero=True),
    Plot("SFT loss", ("loss",), split="sft"),
)


@dataclass(frozen=True)
class Run:
    """A run's directory, read; parts that are not there are empty."""

    name: str
    config: Mapping[str, Any]
    records: Sequence[metrics.Record]
    samples: Sequence[metrics.Record]
    data: Mapping[str, Any]


def is_dpo(run: Run) -> bool:
    """Whether the run minimised DPO's own loss: what is said of ln 2 and of rewards holds for it."""
    return bool(run.config.get("loss", "sigmoid") == "sigmoid")


def main_plots(runs: Sequence[Run]) -> tuple[Plot, ...]:
    """`MAIN_PLOTS`, without their words on DPO where a run minimised another loss."""
    if all(is_dpo(run) for run in runs):
        return MAIN_PLOTS
    told = ("dpo_loss", "chosen_reward")
    return tuple(replace(p, note="", guide=None) if p.names[0] in told else p for p in MAIN_PLOTS)


def load(workdir: Path) -> Run:
    """Read a run's directory.

    Raises:
      UserError: the directory is missing or holds no run, or a file in it is damaged.
    """
    if not workdir.is_dir():
        raise UserError(f"{workdir} is not a directory; give the --workdir of a run")
    run = Run(
        name=workdir.resolve().name,
        config=_read_json(workdir / "config.json"),
        records=metrics.read(workdir / "metrics.jsonl"),
        samples=metrics.read(workdir / "samples.jsonl"),
        data=_read_json(workdir / "data.json"),
    )
    if not (run.config or run.records):
        raise UserError(f"{workdir} holds no run: no config.json, no metrics.jsonl; give the --workdir of a run")
    return run


def last_step(run: Run) -> int:
    """The last DPO step on record; the final evaluation may be of a step that `log_every` skipped."""
    return max((r["step"] for r in run.records if r["split"] in ("train", "eval")), default=0)


def held_out_pairs(run: Run) -> int:
    """How many pairs an evaluation covers; 0 if the files do not say."""
    counts = [r["pairs"] for r in run.records if r["split"] == "eval" and r.get("pairs")]
    return int(counts[-1] if counts else run.data.get("splits", {}).get("eval", {}).get("pairs", 0))


def accuracy_error(run: Run, accuracy: float | None) -> float | None:
    """The standard error of a held-out accuracy, sqrt(p(1 − p) / n)."""
    pairs = held_out_pairs(run)
    return math.sqrt(accuracy * (1 - accuracy) / pairs) if pairs and accuracy is not None else None


def median(run: Run, name: str) -> float | None:
    """The median of a metric over the training records."""
    values = [r[name] for r in run.records if r["split"] == "train" and r.get(name) is not None]
    return statistics.median(values) if values else None


def training_series(run: Run, plot: Plot, name: str, label: str | None, color: str) -> Series:
    """A metric over the plot's training split."""
    return Series(label, color, _points(run, plot.split, name), exact=plot.exact)


def held_out_series(run: Run, name: str, label: str, color: str) -> Series:
    """A metric over the evaluations; accuracy has its standard errors."""
    points = _points(run, "eval", name)
    errors = {}
    if name == "accuracy":
        errors = {step: error for step, value in points if (error := accuracy_error(run, value))}
    return Series(label, color, points, held_out=True, errors=errors)


def _points(run: Run, split: str, name: str) -> list[tuple[float, float | None]]:
    records = [r for r in run.records if r["split"] == split and name in r]
    if name == "accuracy":
        # Where policy and reference are equal every pair ties, and the contract counts that as 0: not an accuracy.
        records = [r for r in records if r.get("margin") != 0]
    return sorted({r["step"]: r[name] for r in records}.items())


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); restore or remove it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; restore or remove it")
    return value

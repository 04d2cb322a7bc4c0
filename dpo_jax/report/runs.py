"""What a run left in its directory, and what its pages draw and count from it."""

import contextlib
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dpo_jax.bucket.path import BucketPath
from dpo_jax.config.saved import SavedConfig, saved_config
from dpo_jax.disk import read_json
from dpo_jax.errors import UserError
from dpo_jax.records.directory import checkpoint_directories
from dpo_jax.records.length_bias import GROUPS, RATIO
from dpo_jax.records.records import Record, metric_of, read_metrics, read_records
from dpo_jax.records.shapes import DataReport, PairScores, RunAbout, Sample, SavedKeys
from dpo_jax.report.charts import Series
from dpo_jax.report.html import run_color

EXPORTS = ("export", "export-adapter")

LENGTH_WORDS = dict(zip(GROUPS, ("chosen shorter", "similar length", "chosen longer"), strict=True))


def metric_label(name: str) -> str:
    """A metric's name for a person; `accuracy/SOURCE` is the accuracy of that source, or of pairs by length."""
    _, slash, group = name.partition("/")
    return metric_of(name).label + (f" · {LENGTH_WORDS.get(group, group)}" if slash else "")


@dataclass(frozen=True)
class Plot:
    """A chart of the pages: which metrics of which training split, and how `charts.line_chart` draws them.

    lines: (name in the legend, colour) of each metric where there are several; empty for one.
    """

    title: str
    names: tuple[str, ...]
    note: str = ""
    split: str = "train"
    guide: tuple[float, str] | None = None
    from_zero: bool = False
    exact: bool = False
    lines: tuple[tuple[str, str], ...] = ()


TWO = (("chosen", "chosen"), ("rejected", "rejected"))
MAIN_PLOTS = (
    Plot("DPO loss", ("dpo_loss",), guide=(math.log(2), "ln 2")),
    Plot("Accuracy", ("accuracy",), "Whiskers: one standard error.", guide=(0.5, "chance")),
    Plot("Margin", ("margin",), "Chosen minus rejected reward.", guide=(0.0, "")),
    Plot(
        "Rewards",
        ("chosen_reward", "rejected_reward"),
        "β · (policy − reference log-probability).",
        guide=(0.0, ""),
        lines=TWO,
    ),
)
OTHER_PLOTS = (
    Plot(
        "KL from the reference",
        ("kl",),
        "Nats an answer, on answers that the policy draws at temperature 1 to held-out prompts; whiskers: one standard "
        "error. Not of the data set's answers: rewards are of those.",
        from_zero=True,
    ),
    Plot(
        "Win rate",
        ("win_rate",),
        "Answers to held-out prompts against the baseline's, under the judge; whiskers: one standard error.",
        guide=(0.5, "equal"),
    ),
    Plot(
        "Completion log-probabilities",
        ("chosen_logp", "rejected_logp"),
        "Summed over a completion. Both may fall: DPO asks for a difference.",
        lines=TWO,
    ),
    Plot("Gradient norm", ("grad_norm",), "Before clipping.", from_zero=True),
    Plot("Learning rate", ("learning_rate",), from_zero=True, exact=True),
    Plot("Pairs per second", ("pairs_per_second",), "Without evaluations and checkpoints.", from_zero=True),
    Plot("Peak memory, GB", ("memory_gb",), from_zero=True, exact=True),
    Plot("SFT loss", ("loss",), "Per token of the completions, before DPO.", split="sft"),
)
REWARD_PLOTS = (
    Plot("Loss", ("loss",), "Bradley and Terry's; ln 2 where both scores are equal.", guide=(math.log(2), "ln 2")),
    Plot("Accuracy", ("accuracy",), "Chosen scores higher. Whiskers: one standard error.", guide=(0.5, "chance")),
    Plot("Margin", ("margin",), "Chosen minus rejected score.", guide=(0.0, "")),
    Plot("Scores", ("chosen_reward", "rejected_reward"), "Means over pairs.", guide=(0.0, ""), lines=TWO),
)


RL_PLOTS = (
    Plot("Reward", ("reward",), "Of answers; dots: to held-out prompts. Whiskers: one standard error."),
    Plot("Length of an answer, tokens", ("completions/mean_length",), from_zero=True),
    Plot("Entropy", ("entropy",), "Nats a token, of the policy on its answers.", from_zero=True),
    Plot(
        "Spread of rewards",
        ("reward_std", "frac_reward_zero_std"),
        "Within groups; and the share of groups that teach nothing, as all of their answers are worth the same.",
        from_zero=True,
        lines=(("standard deviation", "accent"), ("groups without", "rejected")),
    ),
)
SFT_PLOTS = (Plot("Loss", ("loss",), "Nats a token of the answers."),)


@dataclass(frozen=True)
class RunFiles:
    """A run's directory, read; parts that are not there are empty.

    saved: config.json.
    about: run.json: versions, devices, shapes.
    scores: scores.json: of a reward model's last evaluation.
    checkpoints: bytes of each by its number, the updates of SFT and DPO together.
    exports: bytes of the files of `export` and `export-adapter`, by name.
    """

    name: str
    saved: SavedConfig
    records: Sequence[Record]
    samples: Sequence[Record]
    data: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)
    checkpoints: Mapping[int, int] = field(default_factory=dict)
    exports: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def total_steps(self) -> int:
        """Updates of DPO that the run was to make; 0 if no file has them."""
        return int(self.about.get("steps") or self.saved.steps)

    @property
    def last_step(self) -> int:
        """The last DPO step on record; the final evaluation may be of a step that `log_every` skipped."""
        return max((r["step"] for r in self.records if r["split"] in ("train", "eval")), default=0)

    @property
    def hardware(self) -> str:
        """Devices that the run used: "8 × TPU v5 lite"; empty if no file has them."""
        return f"{self.about.get('devices', '?')} × {self.about['device']}" if self.about.get("device") else ""

    @property
    def training_seconds(self) -> float | None:
        """Time spent in DPO's updates alone, without evaluations: each record has the mean of the steps up to it."""
        seconds = {
            r["step"]: r["step_seconds"] for r in self.records if r["split"] == "train" and r.get("step_seconds")
        }
        steps = sorted(seconds)
        return sum(seconds[n] * (n - before) for before, n in zip([0, *steps], steps, strict=False)) if steps else None

    @property
    def sources(self) -> list[str]:
        """Prompt sources that evaluations tell apart, in the order of their first record."""
        named = dict.fromkeys(n.partition("/")[2] for r in self.records for n in r if n.startswith("accuracy/"))
        return [name for name in named if name not in GROUPS]

    @property
    def held_out_pairs(self) -> int:
        """How many pairs an evaluation covers; 0 if no file has it."""
        counts = [r["pairs"] for r in self.records if r["split"] == "eval" and r.get("pairs")]
        return int(counts[-1] if counts else self.data.get("splits", {}).get("eval", {}).get("pairs", 0))

    def standard_error(self, name: str, value: float | None, pairs: int | None = None) -> float | None:
        """The standard error of the last held-out value of a metric; None where it is not known.

        Of an accuracy over `pairs` (all of them) sqrt(p(1 − p) / n); of others what the record says, as `NAME_error`.
        """
        last = next((r for r in reversed(self.records) if r["split"] == "eval"), {})
        if name != "accuracy" and value is not None and last.get(name) == value:
            return last.get(f"{name}_error") or None
        pairs = pairs or self.held_out_pairs
        if name != "accuracy" or not pairs or value is None or not 0 <= value <= 1:
            return None
        return math.sqrt(value * (1 - value) / pairs)

    def training_values(self, name: str) -> list[float]:
        """A metric's values in the training records."""
        return [r[name] for r in self.records if r["split"] == "train" and r.get(name) is not None]

    def median(self, name: str) -> float | None:
        """The median of `training_values`."""
        values = self.training_values(name)
        return statistics.median(values) if values else None


_PLOTS = {"rl": RL_PLOTS, "sft": SFT_PLOTS}


def main_plots(runs: Sequence[RunFiles]) -> tuple[Plot, ...]:
    """`MAIN_PLOTS`, without notes that hold for DPO alone where a run minimised another loss; or those of its task."""
    if len(tasks := {run.saved.task for run in runs}) == 1 and (own := _PLOTS.get(tasks.pop())):
        return own
    if not any(run.saved.is_policy for run in runs):
        return REWARD_PLOTS
    if all(run.saved.is_dpo for run in runs):
        return MAIN_PLOTS
    of_dpo = ("dpo_loss", "chosen_reward")
    return tuple(replace(p, note="", guide=None) if p.names[0] in of_dpo else p for p in MAIN_PLOTS)


def load_run(workdir: Path) -> RunFiles:
    """Read a run's directory.

    Raises:
      UserError: the directory is missing or holds no run, or a file in it is damaged.
    """
    if not workdir.is_dir():
        raise UserError(f"{workdir} is not a directory; give the --workdir of a run")
    shapes = {"config.json": SavedKeys, "data.json": DataReport, "run.json": RunAbout, "scores.json": PairScores}
    config, data, about, scores = (
        read_json(path, shape=shape) if (path := workdir / name).exists() else {} for name, shape in shapes.items()
    )
    run = RunFiles(
        name=workdir.resolve().name,
        saved=saved_config(config),
        records=read_metrics(workdir / "metrics.jsonl"),
        samples=read_records(workdir / "samples.jsonl", Sample),
        data=data,
        about=about,
        scores=scores,
        checkpoints={number: held for number, at in checkpoint_directories(workdir).items() if (held := _size(at))},
        exports={name: files for name in EXPORTS if (files := {p.name: _size(p) for p in _children(workdir / name)})},
    )
    if not (run.saved.table or run.records):
        raise UserError(f"{workdir} holds no run: no config.json, no metrics.jsonl; give the --workdir of a run")
    return run


def _children(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _size(path: Path) -> int:
    """Bytes of a file, or of all below a directory. What a run that goes on removes meanwhile has none."""
    if isinstance(path, BucketPath):
        return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")))
    inside = (os.path.join(directory, name) for directory, _, names in os.walk(path) for name in names)
    held = 0
    for file in [path] if path.is_file() else inside:
        with contextlib.suppress(FileNotFoundError):
            held += os.lstat(file).st_size
    return held


def grouped_plots(run: RunFiles) -> list[Plot]:
    """Held-out accuracy by source, and by whether the chosen answer is the shorter, the longer, or neither."""
    longer = (
        f"Longer: by over {RATIO - 1:.0%} of tokens. A policy that has learned length loses where chosen is shorter."
    )
    by_source = ("Accuracy by source", {name: name for name in run.sources}, "")
    plots = []
    for title, groups, note in (by_source, ("Accuracy by length", LENGTH_WORDS, longer)):
        if groups:
            lines = tuple((words, run_color(i)) for i, words in enumerate(groups.values()))
            names = tuple(f"accuracy/{name}" for name in groups)
            plots.append(Plot(title, names, note, guide=(0.5, "chance"), lines=lines))
    return plots


def metric_series(run: RunFiles, plot: Plot, name: str, label: str, color: str) -> list[Series]:
    """A metric over the plot's training split and, below DPO's, over the evaluations; named once in the legend."""
    held_out = held_out_series(run, name, label or "held-out", color)
    beside = plot.split == "train" and bool(held_out.points)
    of_training = (None if label else "train") if beside else label
    training = Series(of_training, color, _points(run, plot.split, name), exact=plot.exact)
    return [held_out, training] if beside else [training]


def held_out_series(run: RunFiles, name: str, label: str, color: str) -> Series:
    """A metric over the evaluations; accuracy has its standard errors."""
    points, pairs = _points(run, "eval", name), run.held_out_pairs
    errors = {step: error for step, value in points if (error := run.standard_error(name, value, pairs))}
    if name in ("kl", "win_rate", "reward"):
        whiskers = f"{name}_error"
        errors = {r["step"]: r[whiskers] for r in run.records if r["split"] == "eval" and r.get(whiskers)}
    return Series(label, color, points, held_out=True, errors=errors)


def _points(run: RunFiles, split: str, name: str) -> list[tuple[float, float | None]]:
    records = [r for r in run.records if r["split"] == split and not isinstance(r.get(name, ""), str)]
    if name.startswith("accuracy"):
        # Where policy and reference are equal every pair ties, and the contract counts that as 0: not an accuracy.
        records = [r for r in records if r.get("margin") != 0 and (split == "train" or r.get("accuracy") != 0)]
    return sorted({r["step"]: r[name] for r in records}.items())

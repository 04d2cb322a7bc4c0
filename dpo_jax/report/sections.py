"""The parts of a run's page below its curves: held-out pairs, answers, data, and checkpoints."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dpo_jax.data.lengths import PARTS, bin_points
from dpo_jax.records.length_bias import RATIO
from dpo_jax.records.records import Record, show_metric
from dpo_jax.records.scores import SCORES, calibration, expected_calibration_error, score_histograms
from dpo_jax.report.charts import Chart, Series, histogram_chart, line_chart
from dpo_jax.report.runs import LENGTH_WORDS, RunFiles


def group_tables(run: RunFiles) -> list[tuple[str, list[tuple[Any, ...]], str]]:
    """The last evaluation's wins by source and by length: (title, rows of `_group_rows`, note), those with rows."""
    last = max((r for r in run.records if r["split"] == "eval" and r["step"]), key=lambda r: r["step"], default=None)
    if last is None:
        return []
    note = f"Longer: by more than {RATIO - 1:.0%} in tokens."
    if (bias := last.get("length_correlation")) is not None:
        shown = show_metric("length_correlation", bias)
        who = "policy" if run.saved.is_policy else "model"
        note += (
            f" Correlation of (chosen − rejected tokens) with the margin: {shown}. "
            f"Near 0 margins do not depend on length; near 1 the {who} prefers what is longer, near -1 what is shorter."
        )
    tables = [
        ("by source", _group_rows(run, last, {name: name for name in run.sources}), ""),
        ("by length", _group_rows(run, last, LENGTH_WORDS), note.replace(" -", " −")),
    ]
    return [table for table in tables if table[1]]


def _group_rows(run: RunFiles, last: Record, names: Mapping[str, str]) -> list[tuple[Any, ...]]:
    """By group: its words, pairs, accuracy, the accuracy's standard error, margin."""
    rows = []
    for name, words in names.items():
        accuracy, pairs = last.get(f"accuracy/{name}"), last.get(f"pairs/{name}")
        if accuracy is not None:
            error = run.standard_error("accuracy", accuracy, pairs) or None
            rows.append((words, pairs, accuracy, error, last.get(f"margin/{name}")))
    return rows


def score_figures(held: Mapping[str, Any]) -> dict[str, Any]:
    """A reward model's scores of held-out pairs: histograms, how sure it is and how often it is right, and words."""
    both = zip(held.get("chosen", ()), held.get("rejected", ()), strict=False)
    there = [pair for pair in both if None not in pair]  # a score that is not finite is null
    if not there:
        return {}
    chosen, rejected = map(list, zip(*there, strict=True))
    found, width = score_histograms({"chosen": chosen, "rejected": rejected})
    sides = [Series(name, name, found[name]) for name in SCORES]
    margins = [c - r for c, r in there]
    bins = calibration(margins)
    right = Series("right", "accent", [(100 * sure, share) for sure, share, _ in bins], held_out=True)
    ideal = Series("as sure as right", "soft", [(50.0, 0.5), (100.0, 1.0)], exact=True)
    note = f"{width:.2g} a bin, over {len(margins):,} held-out pairs."
    sure = line_chart("Calibration", [right, ideal], note="Share that is right, by how sure the margin says it is.")
    charts = [
        histogram_chart("Scores", sides, width, unit="score", note=note),
        None if sure is None else replace(sure, unit="percent sure"),
    ]
    error = expected_calibration_error(margins)
    words = (
        "A margin m says that its side wins with probability 1 / (1 + exp(−|m|)). Over bins of it, that differs from "
        f"the share that is right by {error:.3f} on average (expected calibration error)."
    )
    return {"charts": [chart for chart in charts if chart], "words": words}


def samples_by_prompt(run: RunFiles) -> list[dict[str, Any]]:
    """Answers before and after, prompt by prompt: `pairs` are (when, mode, the sample or None)."""
    prompts: dict[str, dict[tuple[str, str], Record]] = {}
    for sample in run.samples:
        prompts.setdefault(sample.get("prompt", ""), {})[sample.get("when", ""), sample.get("mode", "")] = sample
    blocks = []
    for prompt, answers in prompts.items():
        modes = dict.fromkeys(mode for _, mode in answers)
        pairs = [(when, mode, answers.get((when, mode))) for mode in modes for when in ("before", "after")]
        blocks.append({"prompt": prompt, "pairs": pairs, "truth": next(iter(answers.values()))})
    return blocks


def mixture_parts(report: Mapping[str, Any]) -> list[str]:
    """What each part of a mixture gives to an epoch; nothing where nothing is mixed."""
    return [
        f"{part['name']} {part['weight']:.1%} ({part['epoch']:,} of {part['pairs']:,} pairs an epoch)"
        for part in report.get("mixture", [])
    ]


def data_lengths(report: Mapping[str, Any]) -> dict[str, Any]:
    """How often the chosen answer is the longer one, and histograms, of the training pairs of a data.json."""
    train = report.get("splits", {}).get("train", {})
    words = length_words(train["longer"]) if "longer" in train else ""
    return {"words": words, "charts": _length_charts(train["histograms"]) if "histograms" in train else []}


def length_words(longer: Mapping[str, float]) -> str:
    """A sentence: how often the chosen answer is the longer one. What prefers length is learned as length.

    >>> length_words({"chosen": 0.25, "rejected": 0.7, "mean_difference": -3.0})
    'The chosen answer is longer in 25.0% of the training pairs, as long in 5.0%; by -3.0 tokens on average.'
    """
    equal = max(0.0, 1 - longer["chosen"] - longer["rejected"])
    return (
        f"The chosen answer is longer in {longer['chosen']:.1%} of the training pairs, as long in {equal:.1%}; "
        f"by {longer['mean_difference']:+.1f} tokens on average."
    )


def _length_charts(histograms: Mapping[str, Mapping[str, Any]]) -> list[Chart]:
    """Figures of the parts' lengths and of chosen − rejected, from `data.lengths.length_report`."""
    charts = []
    for part in PARTS:
        points, width = bin_points(histograms[part])
        note = f"Training pairs in bins of {width} tokens." if width > 1 else "Training pairs by tokens."
        line = Series("pairs", "accent" if part == "prompt" else part, points)
        charts.append(histogram_chart(part.capitalize(), [line], width, unit="tokens", note=note))
    points, width = bin_points(histograms["difference"])
    sides = [
        Series("rejected longer", "rejected", [p for p in points if p[0] < 0]),
        Series("chosen longer or as long", "chosen", [p for p in points if p[0] >= 0]),
    ]
    charts.append(histogram_chart("Chosen minus rejected", sides, width, unit="tokens", note="In tokens, by pair."))
    return [chart for chart in charts if chart]


def checkpoint_words(run: RunFiles) -> list[tuple[int, str, int]]:
    """Checkpoints: (number, what each holds, bytes)."""
    rows, sft = [], run.saved.sft_steps
    for number, held in run.checkpoints.items():
        dpo = max(0, number - sft)
        of = "of DPO" if run.saved.is_policy else "updates"
        parts = [f"{min(number, sft)} updates of SFT"] * bool(sft) + [f"{dpo} {of}"] * bool(dpo or not sft)
        rows.append((number, ", ".join(parts), held))
    return rows

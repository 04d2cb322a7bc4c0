"""Histograms of pairs' lengths, as the pages of a run and of an inspection show them."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.data.lengths import PARTS, bin_points
from dpo_jax.report.charts import Chart, Series, histogram_chart


def length_words(longer: Mapping[str, float], pairs: str) -> str:
    """A sentence: how often the chosen answer is the longer one. What prefers length is learned as length.

    >>> length_words({"chosen": 0.25, "rejected": 0.7, "mean_difference": -3.0}, "training pairs")
    'The chosen answer is longer in 25.0% of the training pairs, as long in 5.0%; by -3.0 tokens on average.'
    """
    equal = max(0.0, 1 - longer["chosen"] - longer["rejected"])
    return (
        f"The chosen answer is longer in {longer['chosen']:.1%} of the {pairs}, as long in {equal:.1%}; "
        f"by {longer['mean_difference']:+.1f} tokens on average."
    )


def length_charts(histograms: Mapping[str, Mapping[str, Any]]) -> list[Chart]:
    """Figures of the parts' lengths and of chosen − rejected, from `data.lengths.length_report`."""
    charts = []
    for part in PARTS if histograms else ():
        points, width = bin_points(histograms[part])
        note = f"Training pairs in bins of {width} tokens." if width > 1 else "Training pairs by tokens."
        line = Series("pairs", "accent" if part == "prompt" else part, points)
        charts.append(histogram_chart(part.capitalize(), [line], width, unit="tokens", note=note))
    if histograms:
        points, width = bin_points(histograms["difference"])
        sides = [
            Series("rejected longer", "rejected", [p for p in points if p[0] < 0]),
            Series("chosen longer or as long", "chosen", [p for p in points if p[0] >= 0]),
        ]
        charts.append(histogram_chart("Chosen minus rejected", sides, width, unit="tokens", note="In tokens, by pair."))
    return [chart for chart in charts if chart]

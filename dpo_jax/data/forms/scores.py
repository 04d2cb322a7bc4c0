"""Scores of chosen and rejected that a row has beside them, and the margin that a reward model should keep."""

import math
from collections.abc import Mapping
from typing import Any

from dpo_jax.data.comparison import Skip

SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_reward", "rejected_reward"),
)


def score_tie(row: Mapping[str, Any]) -> bool:
    """True if the row's own scores call its answers equal; in any published spelling, or inside `metadata`.

    >>> score_tie({"score_chosen": 7.0, "score_rejected": 7.0}), score_tie({"chosen-rating": 5, "rejected-rating": 4})
    (True, False)
    """
    both = _scores(row)
    return both is not None and bool(both[0] == both[1])


OF_SCORES = "scores"  # the margin that is the difference of a row's scores
PREFERENCE = "overall_preference"  # HelpSteer3's, from -3 to 3


def margin_of(row: Mapping[str, Any], asked: str) -> float | Skip:
    """By how much the chosen answer should win, by the row itself.

    Args:
      row: with its columns as the forms know them.
      asked: a column, whose number it is; or `scores`: how far apart the row's scores are, or its overall_preference.

    >>> margin_of({"score_chosen": 8.5, "score_rejected": 6}, "scores"), margin_of({"margin": 2}, "margin")
    (2.5, 2.0)
    >>> margin_of({"margin": "wide"}, "margin").reason
    'bad_margin'
    """
    both = _scores(row) if asked == OF_SCORES else None
    single = row.get(PREFERENCE if asked == OF_SCORES else asked)
    values = both if both is not None else (single,)
    try:
        numbers = [float(value) for value in values if value is not None and not isinstance(value, bool)]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if len(numbers) != len(values) or not all(map(math.isfinite, numbers)):
        where = "two scores, or overall_preference," if asked == OF_SCORES else f"a number in column {asked!r}"
        return Skip("bad_margin", f"reward_margin={asked} needs {where}, found {values[0]!r:.40}")
    return abs(numbers[0] - numbers[1]) if both is not None else abs(numbers[0]) if asked == OF_SCORES else numbers[0]


def _scores(row: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """The scores of chosen and rejected, in any published spelling; None if the row has none."""
    metadata = row.get("metadata")
    for place in (row, metadata) if isinstance(metadata, Mapping) else (row,):
        for chosen, rejected in SCORES:
            if place.get(chosen) is not None and place.get(rejected) is not None:
                return place[chosen], place[rejected]
    return None

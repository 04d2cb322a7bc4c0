"""Scores of chosen and rejected that a row has beside them."""

from collections.abc import Mapping
from typing import Any

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
    metadata = row.get("metadata")
    for place in (row, metadata) if isinstance(metadata, Mapping) else (row,):
        for chosen, rejected in SCORES:
            if place.get(chosen) is not None and place.get(rejected) is not None:
                return bool(place[chosen] == place[rejected])
    return False

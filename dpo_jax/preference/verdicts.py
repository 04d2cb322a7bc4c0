"""Asking a preference model about comparisons, in both orders and block by block. No JAX of its own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_jax.data.comparison import Comparison
from dpo_jax.errors import UserError
from dpo_jax.preference.models import (
    Ensemble,
    Function,
    InBothOrders,
    Pointwise,
    PreferenceModel,
    disagreement,
    mean_verdict,
    swapped,
)
from dpo_jax.preference.statistics import both_orders_verdict

BLOCK = 128  # comparisons asked at once: enough to fill a model's batches and a server's connections


@dataclass(frozen=True)
class Said:
    """What was said of n comparisons.

    Attributes:
      orders: verdicts on (A, B) and on (B, A), `[2, n]`, see `InBothOrders`.
      spread: standard deviation over an ensemble's members `[n]`; None of any other judge.
    """

    orders: np.ndarray
    spread: np.ndarray | None


def ask(judge: PreferenceModel, comparisons: Sequence[Comparison]) -> Said:
    """The verdicts in both orders, with the nine digits that are written.

    The second order is asked for unless the kind is known to negate: what is believed of a judge is what it says.

    Raises:
      UserError: the judge does not say numbers from -1 to 1, one for each comparison.
    """
    if not isinstance(judge, Ensemble):
        return Said(_nine_digits(_orders(judge, comparisons)), None)
    each = np.stack([_orders(member, comparisons) for member in judge.members])  # [members, 2, n]
    each[np.isnan(each).any(1, keepdims=True).repeat(2, 1)] = np.nan  # half an answer is none
    orders = np.stack([mean_verdict(each[:, 0]), mean_verdict(each[:, 1])])
    return Said(_nine_digits(orders), _nine_digits(disagreement(both_orders_verdict(each[:, 0], each[:, 1]))))


def _orders(judge: PreferenceModel, comparisons: Sequence[Comparison]) -> np.ndarray:
    n = len(comparisons)
    if isinstance(judge, InBothOrders):
        said = np.asarray(judge.orders(comparisons), np.float64)
    elif isinstance(judge, Pointwise):  # which negates exactly, and is not to be asked twice
        once = np.asarray(judge(comparisons), np.float64)
        said = np.stack([once, -once])
    else:  # in one call, so that what a kind does once for both orders it does once
        said = np.asarray(judge([*comparisons, *map(swapped, comparisons)]), np.float64)
        said = said.reshape(2, n) if said.shape == (2 * n,) else said
    if said.shape != (2, n):
        raise UserError(f"judge {judge.name}: it gave verdicts of shape {said.shape}; needed is one each")
    if (wrong := said[~(np.isnan(said) | (np.abs(said) <= 1))]).size:
        raise UserError(f"judge {judge.name}: it said {wrong[0]:g}; needed is a number from -1 to 1, or NaN for none")
    return said


def _nine_digits(values: np.ndarray) -> np.ndarray:
    """What is written is what is counted, so that a resumed file gives the same figures."""
    return np.array([float(f"{value:.9g}") for value in values.ravel()], np.float64).reshape(values.shape)


def comparisons_at_once(judge: PreferenceModel) -> int:
    """How many comparisons are asked, and kept, at once: of a function one, as it gains nothing from more."""
    return 1 if isinstance(judge, Function) else BLOCK


def blocks(count: int, done: int, size: int) -> Iterator[slice]:
    """What is left behind the first `done` of `count`, in the blocks of a run that was never stopped."""
    while done < count:
        end = min(count, (done // size + 1) * size)
        yield slice(done, end)
        done = end

"""The arrays of a batch, spelled in one place: NumPy as they are built, jax.Array where they are computed with.

Shapes: M microbatches, B rows of a microbatch, K groups in a row, n completions of a group, T tokens of a row, N
completion tokens of a row.
"""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from dpo_jax.rows.shape import RowShape

A = TypeVar("A")
X = TypeVar("X")


class Batch(NamedTuple, Generic[A]):
    """A whole batch has a leading axis of microbatches, `[M, B, ...]`; one microbatch has not.

    Attributes:
      tokens: int32 `[B, T]`.
      segments: int32 `[B, T]`, the group's number in the row from 1; 0 is padding.
      positions: int32 `[B, T]`; all completions of a group continue from their prompt's length.
      source: int32 `[B, N]`: the column whose hidden state predicts completion token n (the prompt's last token for a
        first token, else the token before).
      is_group: bool `[B, K]`: whether the row has a group k.
      completion_tokens: int32 `[B, K, n]`, the completions' lengths.
      slots: int32 `[B, K, n]`, the slot of each completion; None: completion j is in slot j.
      ref_logps: float32 `[B, K, n]`, the reference's log-probabilities where they were computed before.
      ref_whole: as `ref_logps` with every token counted whole, for LD-DPO.
      margin: float32 `[B, K]`, by how much the first completion of a group should win; None: 0 each.
      owner: int32 `[B, N]`, whose a completion token is: group · n + completion in the group's own order, -1 for
        padding; of RL, as what follows.
      rewards: float32 `[B, K, n]`, what completions are worth, NaN where that is not known.
      drawn_logps: float32 `[B, N]`, the log-probability with which the sampler drew each token.
      old_logps: float32 `[B, N]`, that of the policy as it was when its answers were drawn; None: the policy is that.
      drawn_tokens: float32 `[B, K]`, mean completion tokens of a group over all that were drawn together; None: this
        batch is all of them.
    """

    tokens: A
    segments: A
    positions: A
    source: A
    is_group: A
    completion_tokens: A
    slots: A | None = None
    ref_logps: A | None = None
    ref_whole: A | None = None
    margin: A | None = None
    owner: A | None = None
    rewards: A | None = None
    drawn_logps: A | None = None
    old_logps: A | None = None
    drawn_tokens: A | None = None

    def map(self, fn: Callable[[A], "X"]) -> "Batch[X]":
        """The same of every array that is there."""
        return Batch(*(None if x is None else fn(x) for x in self))  # type: ignore[arg-type]


# What a reference is kept by; of LD-DPO both, else the first.
REFERENCE_FIELDS = ("ref_logps", "ref_whole")


class ArraySpec(NamedTuple):
    """Shape and dtype of an array."""

    shape: tuple[int, ...]
    dtype: type


def batch_spec(shape: RowShape, lead: tuple[int, ...], given: int = 0, *, rewarded: bool = False) -> Batch[ArraySpec]:
    """The arrays of `[*lead]` rows of this shape, with `given` of `REFERENCE_FIELDS`, or `rewarded` as RL has them."""
    groups = (*lead, shape.places)
    of_tokens, of_completions = ArraySpec((*lead, shape.length), np.int32), ArraySpec((*groups, shape.n), np.int32)
    more = dict.fromkeys(REFERENCE_FIELDS[:given], ArraySpec(of_completions.shape, np.float32))
    if rewarded:
        targets = (*lead, shape.targets)
        more |= {"owner": ArraySpec(targets, np.int32), "drawn_logps": ArraySpec(targets, np.float32)}
        more |= {"rewards": ArraySpec(of_completions.shape, np.float32), "drawn_tokens": ArraySpec(groups, np.float32)}
    return Batch(
        tokens=of_tokens,
        segments=of_tokens,
        positions=of_tokens,
        source=ArraySpec((*lead, shape.targets), np.int32),
        is_group=ArraySpec(groups, np.bool_),
        completion_tokens=of_completions,
        slots=of_completions if shape.n > 2 else None,
        **more,
    )

"""The evaluation of pairs that are held out: means over all of them, and of every group of them apart."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.records.length_bias import length_correlation, length_groups
from dpo_jax.rows.pipeline import StepSource
from dpo_jax.training.batches import passed

# What an evaluation tells of every group of pairs (by source, by length) apart.
BY_GROUP = ("accuracy", "margin")


def evaluate(
    eval_step: Callable[[Any, Any], Mapping[str, jax.Array]],
    source: StepSource,
    mesh: Mesh,
    groups: Mapping[str, np.ndarray] | None = None,
) -> dict[str, float]:
    """Means over all pairs of `source`, how many there are (`pairs`), and how their margins depend on length.

    Args:
      eval_step: (batch, shape) → values `[M, B, K]` by name, see `step.make_eval_step`.
      source: the rows of one pass.
      mesh: where they are computed.
      groups: bool `[pairs of source]` by name: for these, `accuracy/NAME`, `margin/NAME` and `pairs/NAME` too; those
        of `length_groups` are always there. `length_correlation` is left out while no pair is won: margins are then
        what rounding leaves between a policy and its equal.
    """
    placed, results = zip(*passed(eval_step, source, mesh, "evaluation"), strict=True)
    pair = np.concatenate([x[x >= 0] for x in placed])
    values = {
        name: np.concatenate([r[name][x >= 0] for r, x in zip(results, placed, strict=True)]).astype(np.float64)
        for name in results[0]
    }
    out = {name: float(x.mean()) for name, x in values.items()} | {"pairs": len(pair)}
    lengths = source.schedule.lengths
    correlation = length_correlation(lengths[pair], values["margin"]) if out["accuracy"] else None
    if correlation is not None:
        out["length_correlation"] = correlation
    for group, members in {**(groups or {}), **length_groups(lengths)}.items():
        mine = members[pair]
        if mine.any():
            out |= {f"{name}/{group}": float(values[name][mine].mean()) for name in BY_GROUP if name in values}
            out[f"pairs/{group}"] = int(mine.sum())
    return out

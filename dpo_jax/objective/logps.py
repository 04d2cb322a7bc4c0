"""Hidden states → log-probabilities of completions, without ever holding `[rows, tokens, vocabulary]` logits.

Shapes: B rows, N completion tokens of a row (chosen slot, then rejected slot), K pairs in a row, D model, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from dpo_jax.model.attention.dense import Slots
from dpo_jax.objective.token_logps import LogpOptions, token_logps

DEFAULTS = LogpOptions()


@flax.struct.dataclass
class Logps:
    """A model's log-probabilities of the completions of pairs, float32 `[B, K, 2]` (chosen, rejected).

    Attributes:
      logps: summed over a completion; LD-DPO weighs the tokens beyond the shorter completion's length.
      log_sum_sq: log Σ_v p(v)² of every token's distribution, summed over a completion and constant to the gradient;
        None unless asked for. (WPO's weights are made of it.)
      whole: `logps` with every token counted whole; None where `logps` is that already.
      balance: how evenly a mixture of experts was used (`experts.balance_sums` of the rows), scalars and `[experts]`;
        None unless asked for.
    """

    logps: jax.Array
    log_sum_sq: jax.Array | None = None
    whole: jax.Array | None = None
    balance: dict[str, jax.Array] | None = None


# (params, one microbatch, widths) -> sums by pair [B, K, 2]
LogpsFn = Callable[[Any, dict[str, jax.Array], Slots], Logps]


def pair_logps(
    hidden_BTD: jax.Array,
    batch: dict[str, jax.Array],
    table_VD: jax.Array,
    *,
    slots: Slots,
    pairs_per_row: int,
    options: LogpOptions = DEFAULTS,
    ld_alpha: float = 1.0,
) -> Logps:
    """Summed log-probabilities of both completions of every pair in a row.

    Args:
      hidden_BTD: final hidden states of the rows.
      batch: `tokens`, `segments` `[B, T]` and `source` `[B, N]`: the row index whose hidden state predicts completion
        token n (the prompt's last token for a first token, else the token before); `completion_tokens` `[B, K, 2]`.
      table_VD: the vocabulary projection.
      slots: the row's widths.
      pairs_per_row: K.
      options: how the vocabulary is gone through.
      ld_alpha: weight of a completion's tokens beyond the length of the pair's shorter completion.

    Returns:
      Sums `[B, K, 2]`: (chosen, rejected) of pair k; 0 where a row has no pair k.
    """
    hidden_BND = jnp.take_along_axis(hidden_BTD, batch["source"][:, :, None], axis=1)
    targets_BN = batch["tokens"][:, slots.prompt :]
    values = token_logps(hidden_BND, targets_BN, table_VD, options)
    segments_BN = batch["segments"][:, slots.prompt :]
    owner_BNK = (segments_BN[:, :, None] == jnp.arange(1, pairs_per_row + 1)[None, None, :]).astype(jnp.float32)
    return sum_pairs(*values, owner_BNK, batch, chosen=slots.chosen, ld_alpha=ld_alpha)


def sum_pairs(
    logps_BN: jax.Array,
    log_sum_sq_BN: jax.Array | None,
    owner_BNK: jax.Array,
    batch: dict[str, jax.Array],
    *,
    chosen: int,
    ld_alpha: float,
) -> Logps:
    """Token values → sums by pair.

    LD-DPO (Liu et al. 2024, arXiv 2409.06411): of a pair whose shorter completion has l tokens, a completion's first l
    tokens count whole and the rest by α, for the policy and for the reference.

    Args:
      logps_BN, log_sum_sq_BN: of completion tokens, those of chosen ones first.
      owner_BNK: 1 where token n is of pair k, else 0.
      batch: `completion_tokens` `[B, K, 2]` (only LD-DPO reads it).
      chosen: how many places chosen completions have.
      ld_alpha: α; 1 is off.
    """

    def sums(values_BN: jax.Array, weights_BNK: jax.Array) -> jax.Array:
        parts = ((values_BN[:, s], weights_BNK[:, s]) for s in (slice(None, chosen), slice(chosen, None)))
        # No matrix product: a TPU's would round float32 values to bfloat16.
        return jnp.stack([jnp.sum(v[:, :, None] * w, axis=1) for v, w in parts], axis=-1)

    squares = None if log_sum_sq_BN is None else sums(log_sum_sq_BN, owner_BNK)
    if ld_alpha == 1:
        return Logps(sums(logps_BN, owner_BNK), squares)
    # A token's number in its completion, from 1.
    number = jnp.concatenate(
        [jnp.cumsum(owner_BNK[:, s], axis=1) for s in (slice(None, chosen), slice(chosen, None))], 1
    )
    shared = number <= batch["completion_tokens"].min(-1)[:, None, :]
    weights_BNK = owner_BNK * jnp.where(shared, 1.0, ld_alpha)
    return Logps(sums(logps_BN, weights_BNK), squares, whole=sums(logps_BN, owner_BNK))

"""Hidden states → log-probabilities of completions, without ever holding `[rows, tokens, vocabulary]` logits.

Shapes: B rows, N completion tokens of a row (slot by slot), K groups in a row, n completions of a group, D model, V
vocabulary.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from dpo_jax.model.config import Params
from dpo_jax.objective.token_logps import LogpOptions, TokenValues, token_logps
from dpo_jax.rows.batch import Batch
from dpo_jax.rows.shape import RowShape

DEFAULTS = LogpOptions()


@flax.struct.dataclass
class Logps:
    """A model's log-probabilities of the completions of groups, float32 `[B, K, n]`; of pairs (chosen, rejected).

    Of a reward model its scores are in their place (`scores.py`).

    Attributes:
      logps: summed over a completion, where asked for weighted token by token.
      log_sum_sq: log Σ_v p(v)² of every token's distribution, summed over a completion and constant to the gradient;
        None unless asked for. (WPO's weights are made of it.)
      whole: `logps` with every token counted whole; None where `logps` is that already.
      balance: how evenly a mixture of experts was used (`experts.balance_sums` of the rows), scalars and `[experts]`;
        None unless asked for.
      of_tokens: of every completion token of the rows, `[B, N]`; None unless asked for.
      entropy: of its distribution, `[B, N]`, constant to the gradient; None unless asked for.
    """

    logps: jax.Array
    log_sum_sq: jax.Array | None = None
    whole: jax.Array | None = None
    balance: dict[str, jax.Array] | None = None
    of_tokens: jax.Array | None = None
    entropy: jax.Array | None = None

    @property
    def all_whole(self) -> jax.Array:
        """Log-probabilities with every token counted whole."""
        return self.logps if self.whole is None else self.whole


# (params, one microbatch, its row shape) -> sums by group
LogpsFn = Callable[[Params, Batch[jax.Array], RowShape], Logps]
# (numbers `[B, N, K]` of tokens in their completion, from 1; one microbatch) -> their weights, `[B, N, K]`
TokenWeights = Callable[[jax.Array, Batch[jax.Array]], jax.Array]


def group_logps(
    hidden_BTD: jax.Array,
    batch: Batch[jax.Array],
    table_VD: jax.Array,
    shape: RowShape,
    *,
    options: LogpOptions = DEFAULTS,
    weights: TokenWeights | None = None,
    per_token: bool = False,
) -> Logps:
    """Summed log-probabilities of the completions of every group in a row.

    Args:
      hidden_BTD, table_VD: final hidden states of the rows of one microbatch, and the vocabulary projection.
      weights: of completion tokens; None: 1 each.
      per_token: whether the log-probabilities of the tokens themselves are wanted too.

    Returns:
      Sums `[B, K, n]`: of the completions of group k, in its own order; 0 where a row has no group k.
    """
    hidden_BND = jnp.take_along_axis(hidden_BTD, batch.source[:, :, None], axis=1)
    values = token_logps(hidden_BND, batch.tokens[:, shape.prompt :], table_VD, options)
    sums = sum_groups(values, batch, shape, weights)
    if not per_token:
        return sums
    return dataclasses.replace(sums, of_tokens=values.logps, entropy=values.entropy)


def in_group_order(by_slot_BKn: jax.Array, batch: Batch[jax.Array]) -> jax.Array:
    """What was computed slot by slot, in the order of each group's own completions."""
    return by_slot_BKn if batch.slots is None else jnp.take_along_axis(by_slot_BKn, batch.slots, axis=-1)


def sum_groups(
    tokens: TokenValues, batch: Batch[jax.Array], shape: RowShape, weights: TokenWeights | None = None
) -> Logps:
    """Token values `[B, N]` → sums by group; see `group_logps`."""
    logps_BN, log_sum_sq_BN = tokens.logps, tokens.log_sum_sq
    segments_BN, K = batch.segments[:, shape.prompt :], batch.is_group.shape[-1]
    owner_BNK = (segments_BN[:, :, None] == jnp.arange(1, K + 1)[None, None, :]).astype(jnp.float32)
    slots = [slice(start - shape.prompt, start - shape.prompt + width)
             for start, width in zip(shape.starts[1:], shape.completions, strict=True)]  # fmt: skip

    def sums(values_BN: jax.Array, weights_BNK: jax.Array) -> jax.Array:
        # No matrix product: a TPU's would round float32 values to bfloat16.
        parts = (jnp.sum(values_BN[:, s, None] * weights_BNK[:, s], axis=1) for s in slots)
        return in_group_order(jnp.stack(list(parts), axis=-1), batch)

    squares = None if log_sum_sq_BN is None else sums(log_sum_sq_BN, owner_BNK)
    if weights is None:
        return Logps(sums(logps_BN, owner_BNK), squares)
    number_BNK = jnp.concatenate([jnp.cumsum(owner_BNK[:, s], axis=1) for s in slots], axis=1)
    weights_BNK = owner_BNK * weights(number_BNK, batch)
    return Logps(sums(logps_BN, weights_BNK), squares, whole=sums(logps_BN, owner_BNK))

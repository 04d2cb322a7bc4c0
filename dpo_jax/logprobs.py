"""Hidden states → log-probabilities of completions, without ever holding `[rows, tokens, vocabulary]` logits.

Shapes: B rows, N completion tokens of a row (chosen slot, then rejected slot), K pairs in a row, D model, V vocabulary.
"""

import flax.struct
import jax
import jax.numpy as jnp

from dpo_jax.attention import Slots

# Completion tokens (rows x tokens) whose logits exist at one time on a device.
CHUNK_TOKENS = 1024


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


def _chunk_logps(
    hidden_BnD: jax.Array, targets_Bn: jax.Array, table_VD: jax.Array, softcap: float | None, log_sum_sq: bool
) -> tuple[jax.Array, jax.Array | None]:
    """log p(target) `[B, n]` in float32, and log Σ p² if asked for."""
    logits_BnV = jnp.einsum("BnD,VD->BnV", hidden_BnD, table_VD, preferred_element_type=jnp.float32)
    if softcap:
        logits_BnV = softcap * jnp.tanh(logits_BnV / softcap)
    # A masked sum, not a gather: it stays local where the vocabulary is sharded, and fuses with the reduction.
    is_target = jnp.arange(table_VD.shape[0])[None, None, :] == targets_Bn[:, :, None]
    target_logit = jnp.sum(jnp.where(is_target, logits_BnV, 0.0), axis=-1)
    log_sum = jax.nn.logsumexp(logits_BnV, axis=-1)
    squares = jax.nn.logsumexp(2 * logits_BnV, axis=-1) - 2 * log_sum if log_sum_sq else None
    return target_logit - log_sum, jax.lax.stop_gradient(squares)


def token_logps(
    hidden_BND: jax.Array,
    targets_BN: jax.Array,
    table_VD: jax.Array,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    softcap: float | None = None,
    log_sum_sq: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """log p(target | hidden) for every completion token, computed in chunks that the backward pass makes again.

    Args:
      hidden_BND: the hidden states that predict the targets.
      targets_BN: int32 token ids.
      table_VD: the vocabulary projection.
      chunk_tokens: about how many tokens' logits are held at once (rows x tokens).
      softcap: logits become softcap·tanh(logits/softcap) (Gemma 2, arXiv 2408.00118); None leaves them.
      log_sum_sq: whether to compute log Σ_v p(v)² of every distribution in the same pass, without a gradient.

    Returns:
      float32 `[B, N]`, and the same of log Σ p² or None.
    """
    B, N, D = hidden_BND.shape
    if N == 0:
        return jnp.zeros((B, 0), jnp.float32), jnp.zeros((B, 0), jnp.float32) if log_sum_sq else None
    chunks = max(1, -(-B * N // chunk_tokens))
    n = -(-N // chunks)
    chunks = -(-N // n)
    pad = chunks * n - N
    hidden = jnp.pad(hidden_BND, ((0, 0), (0, pad), (0, 0))).reshape(B, chunks, n, D).swapaxes(0, 1)
    targets = jnp.pad(targets_BN, ((0, 0), (0, pad))).reshape(B, chunks, n).swapaxes(0, 1)

    @jax.checkpoint
    def body(_, chunk):
        hidden_BnD, targets_Bn = chunk
        return None, _chunk_logps(hidden_BnD, targets_Bn, table_VD, softcap, log_sum_sq)

    _, values = jax.lax.scan(body, None, (hidden, targets))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, chunks * n)[:, :N], values)


def pair_logps(
    hidden_BTD: jax.Array,
    batch: dict[str, jax.Array],
    table_VD: jax.Array,
    *,
    slots: Slots,
    pairs_per_row: int,
    chunk_tokens: int = CHUNK_TOKENS,
    softcap: float | None = None,
    ld_alpha: float = 1.0,
    log_sum_sq: bool = False,
) -> Logps:
    """Summed log-probabilities of both completions of every pair in a row.

    Args:
      hidden_BTD: final hidden states of the rows.
      batch: `tokens`, `segments` `[B, T]` and `source` `[B, N]`: the row index whose hidden state predicts completion
        token n (the prompt's last token for a first token, else the token before); `completion_tokens` `[B, K, 2]`.
      table_VD: the vocabulary projection.
      slots: the row's widths.
      pairs_per_row: K.
      chunk_tokens, softcap, log_sum_sq: as in `token_logps`.
      ld_alpha: weight of a completion's tokens beyond the length of the pair's shorter completion.

    Returns:
      Sums `[B, K, 2]`: (chosen, rejected) of pair k; 0 where a row has no pair k.
    """
    hidden_BND = jnp.take_along_axis(hidden_BTD, batch["source"][:, :, None], axis=1)
    targets_BN = batch["tokens"][:, slots.prompt :]
    values = token_logps(
        hidden_BND, targets_BN, table_VD, chunk_tokens=chunk_tokens, softcap=softcap, log_sum_sq=log_sum_sq
    )
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
        return jnp.stack([jnp.einsum("BN,BNK->BK", v, w) for v, w in parts], axis=-1)

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

"""Hidden states → log-probabilities of completions, without ever holding `[rows, tokens, vocabulary]` logits.

Shapes: B rows, N completion tokens of a row (chosen slot, then rejected slot), K pairs in a row, D model, V vocabulary.
"""

import jax
import jax.numpy as jnp

from dpo_jax.attention import Slots

# Completion tokens (rows x tokens) whose logits exist at one time on a device.
CHUNK_TOKENS = 1024


def _chunk_logps(
    hidden_BnD: jax.Array, targets_Bn: jax.Array, table_VD: jax.Array, softcap: float | None = None
) -> jax.Array:
    """log p(target) `[B, n]` in float32."""
    logits_BnV = jnp.einsum("BnD,VD->BnV", hidden_BnD, table_VD, preferred_element_type=jnp.float32)
    if softcap:
        logits_BnV = softcap * jnp.tanh(logits_BnV / softcap)
    # A masked sum, not a gather: it stays local where the vocabulary is sharded, and fuses with the reduction.
    is_target = jnp.arange(table_VD.shape[0])[None, None, :] == targets_Bn[:, :, None]
    target_logit = jnp.sum(jnp.where(is_target, logits_BnV, 0.0), axis=-1)
    return target_logit - jax.nn.logsumexp(logits_BnV, axis=-1)


def token_logps(
    hidden_BND: jax.Array,
    targets_BN: jax.Array,
    table_VD: jax.Array,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    softcap: float | None = None,
) -> jax.Array:
    """log p(target | hidden) for every completion token, computed in chunks that the backward pass makes again.

    Args:
      hidden_BND: the hidden states that predict the targets.
      targets_BN: int32 token ids.
      table_VD: the vocabulary projection.
      chunk_tokens: about how many tokens' logits are held at once (rows x tokens).
      softcap: logits become softcap·tanh(logits/softcap) (Gemma 2, arXiv 2408.00118); None leaves them.

    Returns:
      float32 `[B, N]`.
    """
    B, N, D = hidden_BND.shape
    if N == 0:
        return jnp.zeros((B, 0), jnp.float32)
    chunks = max(1, -(-B * N // chunk_tokens))
    n = -(-N // chunks)
    chunks = -(-N // n)
    pad = chunks * n - N
    hidden = jnp.pad(hidden_BND, ((0, 0), (0, pad), (0, 0))).reshape(B, chunks, n, D).swapaxes(0, 1)
    targets = jnp.pad(targets_BN, ((0, 0), (0, pad))).reshape(B, chunks, n).swapaxes(0, 1)

    @jax.checkpoint
    def body(_, chunk):
        hidden_BnD, targets_Bn = chunk
        return None, _chunk_logps(hidden_BnD, targets_Bn, table_VD, softcap)

    _, logps = jax.lax.scan(body, None, (hidden, targets))
    return logps.swapaxes(0, 1).reshape(B, chunks * n)[:, :N]


def pair_logps(
    hidden_BTD: jax.Array,
    batch: dict[str, jax.Array],
    table_VD: jax.Array,
    *,
    slots: Slots,
    pairs_per_row: int,
    chunk_tokens: int = CHUNK_TOKENS,
    softcap: float | None = None,
) -> jax.Array:
    """Summed log-probabilities of both completions of every pair in a row.

    Args:
      hidden_BTD: final hidden states of the rows.
      batch: `tokens`, `segments` `[B, T]` and `source` `[B, N]`: the row index whose hidden state predicts completion
        token n (the prompt's last token for a first token, else the token before).
      table_VD: the vocabulary projection.
      slots: the row's widths.
      pairs_per_row: K.
      chunk_tokens, softcap: as in `token_logps`.

    Returns:
      float32 `[B, K, 2]`: (chosen, rejected) of pair k; 0 where a row has no pair k.
    """
    hidden_BND = jnp.take_along_axis(hidden_BTD, batch["source"][:, :, None], axis=1)
    targets_BN = batch["tokens"][:, slots.prompt :]
    logps_BN = token_logps(hidden_BND, targets_BN, table_VD, chunk_tokens=chunk_tokens, softcap=softcap)
    segments_BN = batch["segments"][:, slots.prompt :]
    owner_BNK = (segments_BN[:, :, None] == jnp.arange(1, pairs_per_row + 1)[None, None, :]).astype(jnp.float32)
    C = slots.chosen
    chosen_BK = jnp.einsum("BN,BNK->BK", logps_BN[:, :C], owner_BNK[:, :C])
    rejected_BK = jnp.einsum("BN,BNK->BK", logps_BN[:, C:], owner_BNK[:, C:])
    return jnp.stack([chosen_BK, rejected_BK], axis=-1)

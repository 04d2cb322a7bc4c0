"""Causal attention over a key/value cache, for sampling.

Shapes: B rows, Q new tokens of a row, S columns of the cache, H query heads, G kv-heads, E head width, L layers.
"""

import jax
import jax.numpy as jnp

from dpo_jax.model.attention.dense import PLAIN, Scores, attend
from dpo_jax.model.config import ModelConfig


def empty_cache(config: ModelConfig, rows: int, length: int, dtype=jnp.float32) -> tuple[jax.Array, jax.Array]:
    """Keys and values `[L, B, S, G, E]` of zeros."""
    shape = (config.num_hidden_layers, rows, length, config.num_key_value_heads, config.head_dim)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)


def cached_attention(
    q_BQHE: jax.Array,
    k_BQGE: jax.Array,
    v_BQGE: jax.Array,
    cache: tuple[jax.Array, jax.Array],
    where: jax.Array,
    real_BS: jax.Array,
    *,
    window: jax.Array | None = None,
    scores: Scores = PLAIN,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Attention of new tokens to all before them: `[B, Q, H, E]`, and the new cache.

    Args:
      q_BQHE, k_BQGE, v_BQGE: the new tokens' queries, keys and values.
      cache: keys and values `[B, S, G, E]` each; the new ones are written at columns `where .. where+Q`.
      where: int32 scalar, the column of the first new token (the same for all rows: prompts are padded on the left).
      real_BS: bool `[B, S]`, False at padding columns.
      window: how many positions a token sees, int32 scalar; padding is on the left, so columns differ as positions do.
    """
    k_BSGE = jax.lax.dynamic_update_slice_in_dim(cache[0], k_BQGE.astype(cache[0].dtype), where, axis=1)
    v_BSGE = jax.lax.dynamic_update_slice_in_dim(cache[1], v_BQGE.astype(cache[1].dtype), where, axis=1)
    Q, S = q_BQHE.shape[1], k_BSGE.shape[1]
    distance_QS = (where + jnp.arange(Q))[:, None] - jnp.arange(S)[None, :]
    seen_QS = distance_QS >= 0
    if window is not None:
        seen_QS &= distance_QS < window
    out = attend(q_BQHE, k_BSGE, v_BSGE, seen_QS[None] & real_BS[:, None, :], scores)
    return out, (k_BSGE, v_BSGE)

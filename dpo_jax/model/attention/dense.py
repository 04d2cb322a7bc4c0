"""Attention inside a pair row, and attention with a cache for sampling.

A row is `[ prompt | chosen | rejected ]`. Token q may look at token k iff both belong to the same pair
(segment ids equal and not 0), k is not after q in the row, and k lies in the prompt slot or in q's own slot. That is
exactly the attention of the two unpacked sequences prompt+chosen and prompt+rejected, with the prompt computed once.

Shapes: B rows, T tokens of a row, S keys, H query heads, G kv-heads (H = G * M), E head width.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

# Finite, so that a padding token that may look at nothing gets a harmless average instead of NaN.
MASKED = -1e30
# Query rows attended at once: a block sees no key after its own end, which halves the work of causal slots.
QUERY_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Slots:
    """Widths in tokens of the three slots of a row; a width may be 0 (SFT rows have no rejected slot)."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def total(self) -> int:
        return self.prompt + self.chosen + self.rejected

    @property
    def completions(self) -> int:
        return self.chosen + self.rejected

    def reach(self, longest: int | None = None) -> int:
        """No sequence of the row has more tokens, nor more than `longest` where that is known."""
        room = self.prompt + max(self.chosen, self.rejected)
        return room if longest is None else min(room, longest)


def _heads_first(x_BTHE: jax.Array, groups: int) -> jax.Array:
    """`[B, T, G*M, E]` → `[B, G, M*T, E]`: batch dimensions lead, so that each product is one plain matrix product.

    The barrier keeps XLA from folding the transpose into the product, which on CPU makes the product 2.5 times slower.
    """
    B, T, H, E = x_BTHE.shape
    x = x_BTHE.reshape(B, T, groups, H // groups, E).transpose(0, 2, 3, 1, 4)
    return jax.lax.optimization_barrier(x.reshape(B, groups, H // groups * T, E))


def _attend(
    q_BQHE: jax.Array,
    k_BSGE: jax.Array,
    v_BSGE: jax.Array,
    mask_BQS: jax.Array,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Softmax attention of grouped queries; scores and softmax in float32. Returns [B, Q, H, E]."""
    B, Q, H, E = q_BQHE.shape
    S, G = k_BSGE.shape[1:3]
    M = H // G
    q, k, v = (_heads_first(x, G) for x in (q_BQHE, k_BSGE, v_BSGE))
    scores = jnp.einsum("BGRE,BGSE->BGRS", q, k, preferred_element_type=jnp.float32) * (scale or E**-0.5)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask_BQS[:, None, None], scores.reshape(B, G, M, Q, S), MASKED)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B, G, M * Q, S)
    out = jax.lax.optimization_barrier(jnp.einsum("BGRS,BGSE->BGRE", probs, v))
    return out.reshape(B, G, M, Q, E).transpose(0, 3, 1, 2, 4).reshape(B, Q, H, E)


# The probabilities are the largest thing a layer makes and cheap to make again: never kept for the backward pass.
_attend_recomputed = jax.checkpoint(
    _attend, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False, static_argnums=(4, 5)
)


def _pieces(x_BT: jax.Array, pieces: list[tuple[int, int]]) -> jax.Array:
    """The tokens of some stretches of a row, behind each other."""
    return jnp.concatenate([x_BT[:, a:b] for a, b in pieces], axis=1) if len(pieces) > 1 else x_BT[:, slice(*pieces[0])]


def pair_row_attention(
    q_BTHE: jax.Array,
    k_BTGE: jax.Array,
    v_BTGE: jax.Array,
    segments_BT: jax.Array,
    *,
    slots: Slots,
    window: tuple[jax.Array, jax.Array] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Attention of pair rows as dense blocks per slot: prompt→prompt, chosen→prompt+chosen, rejected→prompt+rejected.

    Args:
      q_BTHE: queries `[B, T, H, E]`, rotary positions applied. `T = slots.total`.
      k_BTGE, v_BTGE: keys and values `[B, T, G, E]`, `H` a multiple of `G`.
      segments_BT: int32 `[B, T]`, pair number in the row from 1; 0 is padding.
      slots: the widths of the row.
      window: positions int32 `[B, T]` and how many of them a token sees, itself included (int32 scalar). Positions,
        not columns: between a prompt and its rejected completion lie other tokens. None sees all.
      scale: what scores are multiplied by; None is 1/√E.
      softcap: scores become softcap·tanh(scores/softcap) (Gemma 2, arXiv 2408.00118); None leaves them.

    Returns:
      `[B, T, H, E]`. Values at padding tokens are finite and mean nothing.
    """
    P = slots.prompt
    outs = []
    for start, width in ((0, P), (P, slots.chosen), (P + slots.chosen, slots.rejected)):
        for begin in range(start, start + width, QUERY_BLOCK):
            end = min(begin + QUERY_BLOCK, start + width)
            pieces = [(0, end)] if start == 0 else [(0, P), (start, end)]
            k_BSGE, v_BSGE, segments_BS = (_pieces(x, pieces) for x in (k_BTGE, v_BTGE, segments_BT))
            row_S = jnp.concatenate([jnp.arange(a, b) for a, b in pieces])
            causal_QS = row_S[None, :] <= jnp.arange(begin, end)[:, None]
            segments_BQ = segments_BT[:, begin:end]
            same_BQS = (segments_BQ[:, :, None] == segments_BS[:, None, :]) & (segments_BQ != 0)[:, :, None]
            mask_BQS = same_BQS & causal_QS[None]
            if window is not None:
                positions_BT, size = window
                mask_BQS &= positions_BT[:, begin:end, None] - _pieces(positions_BT, pieces)[:, None, :] < size
            outs.append(_attend_recomputed(q_BTHE[:, begin:end], k_BSGE, v_BSGE, mask_BQS, scale, softcap))
    return jnp.concatenate(outs, axis=1)


def cached_attention(
    q_BQHE: jax.Array,
    k_BQGE: jax.Array,
    v_BQGE: jax.Array,
    cache: tuple[jax.Array, jax.Array],
    where: jax.Array,
    real_BS: jax.Array,
    *,
    window: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Causal attention over a key/value cache, for sampling.

    Args:
      q_BQHE, k_BQGE, v_BQGE: the new tokens' queries, keys and values.
      cache: keys and values `[B, S, G, E]` each; the new ones are written at columns `where .. where+Q`.
      where: int32 scalar, the column of the first new token (the same for all rows: prompts are padded on the left).
      real_BS: bool `[B, S]`, False at padding columns.
      window: how many positions a token sees, int32 scalar; padding is on the left, so columns differ as positions do.
      scale, softcap: as in `pair_row_attention`.

    Returns:
      `[B, Q, H, E]` and the new cache.
    """
    k_BSGE = jax.lax.dynamic_update_slice_in_dim(cache[0], k_BQGE.astype(cache[0].dtype), where, axis=1)
    v_BSGE = jax.lax.dynamic_update_slice_in_dim(cache[1], v_BQGE.astype(cache[1].dtype), where, axis=1)
    Q, S = q_BQHE.shape[1], k_BSGE.shape[1]
    distance_QS = (where + jnp.arange(Q))[:, None] - jnp.arange(S)[None, :]
    seen_QS = distance_QS >= 0
    if window is not None:
        seen_QS &= distance_QS < window
    out = _attend(q_BQHE, k_BSGE, v_BSGE, seen_QS[None] & real_BS[:, None, :], scale, softcap)
    return out, (k_BSGE, v_BSGE)


@functools.cache
def _inverse_frequencies(head_dim: int, theta: float, scaling: tuple[tuple[str, Any], ...]) -> tuple[float, ...]:
    """Rotary inverse frequencies with the checkpoint's rope scaling (`linear`, `llama3` or none), in float64."""
    freqs = [theta ** (-2.0 * i / head_dim) for i in range(head_dim // 2)]
    options = dict(scaling)
    kind = options.get("rope_type", "default")
    if kind == "linear":
        return tuple(f / float(options["factor"]) for f in freqs)
    if kind == "llama3":
        factor, low, high = (float(options[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
        old_context = float(options["original_max_position_embeddings"])
        scaled = []
        for f in freqs:
            wavelength = 2 * math.pi / f
            smooth = (old_context / wavelength - low) / (high - low)
            smooth = min(max(smooth, 0.0), 1.0)
            scaled.append((1 - smooth) * f / factor + smooth * f)
        return tuple(scaled)
    return tuple(freqs)


def rotary_angles(
    positions_BT: jax.Array,
    *,
    head_dim: int,
    theta: float,
    scaling: tuple[tuple[str, Any], ...] = (),
    last_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine `[B, T, E/2]` in float32 of rotary position embedding (Su et al. 2021, arXiv 2104.09864).

    LongRoPE (Ding et al. 2024, arXiv 2402.13753) has two sets of frequencies. The long ones count in a sequence whose
    last position, `last_BT` at each of its tokens, is outside of the original context; None: there is no such one.
    """
    options = dict(scaling)
    freqs = jnp.asarray(_inverse_frequencies(head_dim, theta, scaling), jnp.float32)[None, None, :]
    size = 1.0
    if options.get("rope_type") == "longrope":
        short, long = (jnp.asarray(options[k], jnp.float32)[None, None, :] for k in ("short_factor", "long_factor"))
        if last_BT is not None:
            short = jnp.where(last_BT[..., None] >= options["original_max_position_embeddings"], long, short)
        freqs = freqs / short
        size = float(options["attention_factor"])
    angles_BTe = positions_BT[..., None].astype(jnp.float32) * freqs
    cos, sin = jnp.cos(angles_BTe), jnp.sin(angles_BTe)
    return (cos, sin) if size == 1.0 else (cos * size, sin * size)


def apply_rotary(x_BTHE: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the two halves of each head (Hugging Face's layout); what is wider than the angles stays as it is."""
    cos, sin = (a[:, :, None, :] for a in angles)
    width = 2 * cos.shape[-1]
    x, rest = x_BTHE[..., :width].astype(jnp.float32), x_BTHE[..., width:]
    first, second = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTHE.dtype)
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated

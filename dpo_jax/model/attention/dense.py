"""Attention inside a pair row, as dense blocks.

A row is `[ prompt | chosen | rejected ]`. Token q may look at token k iff both belong to the same pair
(segment ids equal and not 0), k is not after q in the row, and k lies in the prompt slot or in q's own slot. That is
exactly the attention of the two unpacked sequences prompt+chosen and prompt+rejected, with the prompt computed once.

Shapes: B rows, T tokens of a row, S keys, H query heads, G kv-heads (H = G * M), E head width.
"""

import dataclasses

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


def attend(
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
    attend, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False, static_argnums=(4, 5)
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

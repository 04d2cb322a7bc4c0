"""Pair-row attention by the splash-attention kernel of JAX (Pallas, TPU): in tiles both ways, no scores kept.

The kernel takes a static mask, which tiles it may skip, and segment ids, which tell the pairs of a row apart: the two
halves of the rule in `attention.py`. On other machines it runs interpreted, slowly, for tests.

Shapes: B rows, T tokens of a row, H query heads, G kv-heads, E head width.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

from dpo_jax.model.attention.dense import Slots
from dpo_jax.model.attention.on_mesh import on_own_heads

LANES = 128  # tiles are multiples of it
# What a tile costs beside its scores, in scores: starting it, fetching its keys. A guess; only the order matters.
TILE_COST = 256**2


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel runs.

    Attributes:
      largest: the most tokens along a side of a tile, a multiple of 128: what fits the fast memory of a generation.
      interpret: run it as plain operations, on any machine.
    """

    largest: int
    interpret: bool = False


def visible(q: Any, k: Any, slots: Slots) -> Any:
    """Whether the token in column q may look at column k, pairs apart: the static half of the rule.

    What pads a row to whole tiles counts as the rejected slot.
    """
    rejected = slots.prompt + slots.chosen
    return (k <= q) & ((k < slots.prompt) | (q < rejected) | (k >= rejected))


class PairRowMask(masks._ComputableMask):
    """`visible` as a mask that the kernel computes where it needs it; there is no public base class for one."""

    def __init__(self, length: int, slots: Slots):
        self.slots = slots
        super().__init__((length, length), lambda q, k: visible(q, k, slots))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PairRowMask) and (self.shape, self.slots) == (other.shape, other.slots)

    def __hash__(self) -> int:
        return hash((self.shape, self.slots))


@functools.cache
def tile(slots: Slots, largest: int) -> tuple[int, int]:
    """The side of a tile for rows of these widths, and the length to which rows are padded for it.

    The side for which the tiles that are not skipped have the fewest scores, a tile's own cost included.
    """
    sides = range(LANES, max(LANES, largest) + 1, LANES)
    lengths = {side: -(-slots.total // side) * side for side in sides}
    cost = {side: tiles_run(slots, side) * (side**2 + TILE_COST) for side in sides}
    side = min(sides, key=lambda s: (cost[s], s))
    return side, lengths[side]


def tiles_run(slots: Slots, side: int) -> int:
    """How many tiles of the padded row are not skipped."""
    n = -(-slots.total // side)
    first = np.arange(n) * side
    last = first + side - 1
    # In columns, visibility changes only at the slots' borders: a tile is seen if any of these corners is.
    corners_q = np.unique(np.concatenate([first, last, [slots.prompt, slots.prompt + slots.chosen - 1]]))
    corners_k = np.unique(np.concatenate([first, [0, slots.prompt, slots.prompt + slots.chosen]]))
    seen = visible(corners_q[:, None], corners_k[None, :], slots)
    tiles = np.zeros((n, n), bool)
    np.logical_or.at(tiles, (np.minimum(corners_q // side, n - 1)[:, None], np.minimum(corners_k // side, n - 1)), seen)
    return int(tiles.sum())


@functools.cache
def _kernel(slots: Slots, heads: int, tiling: Tiling, softcap: float | None) -> Any:
    """The kernel for one device's heads. Its tables stay NumPy arrays: constants, whatever is traced on whichever mesh.

    (The library's own constructor makes them arrays of the default device, and so runs something.)
    """
    side, length = tile(slots, tiling.largest)
    mask = masks.MultiHeadMask([PairRowMask(length, slots)] * heads)
    forward, mask_function = mask_info.process_mask(mask, (side, side), head_shards=1, q_seq_shards=1)
    backward, _ = mask_info.process_mask_dkv(mask, (side, side), head_shards=1, q_seq_shards=1, shrink_grid=False)
    return kernels.SplashAttentionKernel(
        forward,
        None,  # the backward kernel is one
        backward,
        block_sizes=kernels.BlockSizes(
            block_q=side, block_kv=side, block_q_dkv=side, block_kv_dkv=side, use_fused_bwd_kernel=True
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=kernels.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name="attention_out",
        mask_function=mask_function,
        interpret=tiling.interpret,
    )


def _local(
    q_BTHE: jax.Array,
    k_BTGE: jax.Array,
    v_BTGE: jax.Array,
    segments_BT: jax.Array,
    *,
    slots: Slots,
    tiling: Tiling,
    softcap: float | None,
) -> jax.Array:
    """The rows and heads of one device."""
    pad = tile(slots, tiling.largest)[1] - slots.total
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).transpose(0, 2, 1, 3) for x in (q_BTHE, k_BTGE, v_BTGE))
    segments = jnp.pad(segments_BT, ((0, 0), (0, pad)))
    kernel = _kernel(slots, q_BTHE.shape[2], tiling, softcap)
    out = jax.vmap(kernel)(q, k, v, kernels.SegmentIds(segments, segments))
    return out.transpose(0, 2, 1, 3)[:, : slots.total]


def splash_attention(
    q_BTHE: jax.Array,
    k_BTGE: jax.Array,
    v_BTGE: jax.Array,
    segments_BT: jax.Array,
    *,
    slots: Slots,
    tiling: Tiling,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Attention of pair rows by the kernel; arguments and result as in `attention.pair_row_attention`.

    It has no window: one counts positions, the kernel's mask counts columns. On a mesh every device runs its own rows
    and heads. What the backward pass needs of it carries the checkpoint name `attention_out`.
    """
    q_BTHE = q_BTHE * jnp.asarray(scale or q_BTHE.shape[-1] ** -0.5, q_BTHE.dtype)
    local = functools.partial(_local, slots=slots, tiling=tiling, softcap=softcap)
    return on_own_heads(local, q_BTHE, k_BTGE, v_BTGE, segments_BT)

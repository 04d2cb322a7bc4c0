"""Attention of rows by the splash-attention kernel of JAX (Pallas, TPU): in tiles both ways, no scores kept.

The kernel takes a static mask, which tiles it may skip, and segment ids, which tell the groups of a row apart: the two
halves of the rule in `dense.py`. On other machines it runs interpreted, slowly, for tests.

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

from dpo_jax.model.attention.dense import PLAIN, Scores
from dpo_jax.model.attention.on_mesh import on_own_heads
from dpo_jax.rows.shape import RowShape

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


def visible(q: Any, k: Any, shape: RowShape) -> Any:
    """Whether the token in column q may look at column k, groups apart: the static half of the rule.

    What pads a row to whole tiles counts as the last slot.
    """
    seen: Any = True
    for border in shape.borders:  # no completion looks at one before it
        seen &= (q < border) | (k >= border)
    return (k <= q) & ((k < shape.prompt) | seen)


class RowMask(masks._ComputableMask):
    """`visible` as a mask that the kernel computes where it needs it; there is no public base class for one."""

    def __init__(self, length: int, row: RowShape):
        self.row = row
        super().__init__((length, length), lambda q, k: visible(q, k, row))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowMask) and (self.shape, self.row) == (other.shape, other.row)

    def __hash__(self) -> int:
        return hash((self.shape, self.row))


@functools.cache
def tile(shape: RowShape, largest: int) -> tuple[int, int]:
    """The side of a tile for rows of these widths, and the length to which rows are padded for it.

    The side for which the tiles that are not skipped have the fewest scores, a tile's own cost included.
    """
    sides = range(LANES, max(LANES, largest) + 1, LANES)
    side = min(sides, key=lambda side: (tiles_run(shape, side) * (side**2 + TILE_COST), side))
    return side, -(-shape.length // side) * side


def tiles_run(shape: RowShape, side: int) -> int:
    """How many tiles of the padded row are not skipped."""
    n = -(-shape.length // side)
    first = np.arange(n) * side
    last = first + side - 1
    # In columns, visibility changes only at the slots' borders: a tile is seen if any of these corners is.
    corners_q = np.unique(np.concatenate([first, last, np.asarray(shape.borders, int) - 1]))
    corners_k = np.unique(np.concatenate([first, shape.starts]))
    seen = visible(corners_q[:, None], corners_k[None, :], shape)
    tiles = np.zeros((n, n), bool)
    np.logical_or.at(tiles, (np.minimum(corners_q // side, n - 1)[:, None], np.minimum(corners_k // side, n - 1)), seen)
    return int(tiles.sum())


@functools.cache
def _kernel(shape: RowShape, heads: int, tiling: Tiling, softcap: float | None) -> Any:
    """The kernel for one device's heads. Its tables stay NumPy arrays: constants, whatever is traced on whichever mesh.

    (The library's own constructor makes them arrays of the default device, and so runs something.)
    """
    side, length = tile(shape, tiling.largest)
    mask = masks.MultiHeadMask([RowMask(length, shape)] * heads)
    forward, mask_function = mask_info.process_mask(mask, (side, side), head_shards=1, q_seq_shards=1)
    backward, _ = mask_info.process_mask_dkv(mask, (side, side), head_shards=1, q_seq_shards=1, shrink_grid=False)
    sides: dict[str, Any] = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv"), side)
    return kernels.SplashAttentionKernel(
        forward,
        None,  # the backward kernel is one
        backward,
        block_sizes=kernels.BlockSizes(**sides, use_fused_bwd_kernel=True),
        is_mqa=False,
        save_residuals=False,
        mask_value=kernels.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name="attention_out",
        mask_function=mask_function,
        interpret=tiling.interpret,
    )


def splash_attention(
    q_BTHE: jax.Array,
    k_BTGE: jax.Array,
    v_BTGE: jax.Array,
    segments_BT: jax.Array,
    shape: RowShape,
    *,
    tiling: Tiling,
    scores: Scores = PLAIN,
) -> jax.Array:
    """Attention of rows by the kernel; arguments and result as in `dense.dense_attention`.

    It has no window: one counts positions, the kernel's mask counts columns. On a mesh every device runs its own rows
    and heads. What the backward pass needs of it carries the checkpoint name `attention_out`.
    """
    pad = (0, tile(shape, tiling.largest)[1] - shape.length)

    def local(q_BTHE: jax.Array, k_BTGE: jax.Array, v_BTGE: jax.Array, segments_BT: jax.Array) -> jax.Array:
        inputs = (jnp.pad(x, ((0, 0), pad, (0, 0), (0, 0))).transpose(0, 2, 1, 3) for x in (q_BTHE, k_BTGE, v_BTGE))
        segments = jnp.pad(segments_BT, ((0, 0), pad))
        kernel = _kernel(shape, q_BTHE.shape[2], tiling, scores.softcap)
        out = jax.vmap(kernel)(*inputs, kernels.SegmentIds(segments, segments))
        return out.transpose(0, 2, 1, 3)[:, : shape.length]

    q_BTHE = q_BTHE * jnp.asarray(scores.scale or q_BTHE.shape[-1] ** -0.5, q_BTHE.dtype)
    return on_own_heads(local, q_BTHE, k_BTGE, v_BTGE, segments_BT)

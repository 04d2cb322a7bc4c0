"""Attention on a mesh by functions that know one device: each runs its own rows and heads.

Shapes: B rows, T tokens of a row, H query heads, G kv-heads, E head width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dpo_jax.parallel.spread import mesh_axes, per_device


def on_own_heads(
    attend: Callable[..., jax.Array], q_BTHE: jax.Array, k_BTGE: jax.Array, v_BTGE: jax.Array, *others: jax.Array
) -> jax.Array:
    """`attend(q, k, v, *others)` `[B, T, H, E]` on every device's own rows and heads.

    Args:
      attend: for the rows and heads of one device; query heads are a multiple of the kv-heads that it gets.
      q_BTHE, k_BTGE, v_BTGE: of all devices. Fewer kv-heads than devices in the `tensor` axis are all on each of them.
      others: arrays `[B, ...]`, by row, or scalars.
    """
    # P takes an empty tuple for no axis at all.
    rows, by_head, by_kv_head = (mesh_axes(name) for name in ("rows", "heads", "kv_heads"))
    heads = q_BTHE.shape[2]

    def local(q_BTHE: jax.Array, k_BTGE: jax.Array, v_BTGE: jax.Array, *others: jax.Array) -> jax.Array:
        H, G = q_BTHE.shape[2], k_BTGE.shape[2]
        if not by_kv_head and heads != H:  # those of this device's query heads
            group = heads // G
            mine = (jax.lax.axis_index(by_head) * H + jnp.arange(H)) // group
            mine = mine[:1] if group % H == 0 else mine
            k_BTGE, v_BTGE = (jnp.take(x, mine, axis=2) for x in (k_BTGE, v_BTGE))
        return attend(q_BTHE, k_BTGE, v_BTGE, *others)

    by_row = tuple(P(rows) if x.ndim else P() for x in others)
    in_specs = (P(rows, None, by_head), P(rows, None, by_kv_head), P(rows, None, by_kv_head), *by_row)
    return per_device(local, in_specs, P(rows, None, by_head))(q_BTHE, k_BTGE, v_BTGE, *others)

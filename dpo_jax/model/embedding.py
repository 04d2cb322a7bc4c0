"""The embedding: rows of a table that is sharded by tokens of the vocabulary (see `vocabulary.py`).

Shapes: B rows, T tokens of a row, n of them in a chunk, D model, V vocabulary (v: a device's part of it).
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dpo_jax.model.vocabulary import CHUNK_TOKENS, chunks_of, division, joined, table_parts
from dpo_jax.parallel.spread import Spread


def embed(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """The rows of `table_VD` for `tokens_BT` int32: `[B, T, D]`."""
    spread = Spread.of(tokens_BT.shape[0])
    table_VD = table_parts(table_VD, spread)
    return _embed(table_VD, tokens_BT, spread, jax.ShapeDtypeStruct(table_VD.shape, table_VD.dtype))


def _mine(tokens: jax.Array, part: int, spread: Spread) -> tuple[jax.Array, jax.Array]:
    """Row numbers in this device's part of the table, and whether they are in it."""
    local = tokens - spread.offset(part)
    return jnp.clip(local, 0, part - 1), (local >= 0) & (local < part)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _embed(table_VD: jax.Array, tokens_BT: jax.Array, spread: Spread, like_VD: jax.ShapeDtypeStruct) -> jax.Array:
    def local(table_vD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        if not spread.vocab:
            return jnp.take(table_vD, tokens_BT, axis=0)
        T = tokens_BT.shape[1]

        def body(_, tokens_Bn):
            rows, inside = _mine(spread.gather(tokens_Bn), table_vD.shape[0], spread)
            rows_BnD = jnp.where(inside[..., None], jnp.take(table_vD, rows, axis=0), 0)
            return None, spread.scatter_sum(rows_BnD)

        chunks, n = division(tokens_BT.shape[0], T, 2 * CHUNK_TOKENS, 1)
        return joined(jax.lax.scan(body, None, chunks_of(tokens_BT, chunks, n))[1], T)

    rows = P(spread.rows or None)
    return spread.on_mesh(local, (P(spread.vocab or None), rows), rows)(table_VD, tokens_BT)


def _embed_forward(
    table_VD: jax.Array, tokens_BT: jax.Array, spread: Spread, like_VD: jax.ShapeDtypeStruct
) -> tuple[jax.Array, jax.Array]:
    return _embed(table_VD, tokens_BT, spread, like_VD), tokens_BT


def _embed_backward(
    spread: Spread, like_VD: jax.ShapeDtypeStruct, tokens_BT: jax.Array, grad_BTD: jax.Array
) -> tuple[jax.Array, None]:
    part = like_VD.shape[0] // spread.size(spread.vocab)

    def local(grad_BTD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        T = tokens_BT.shape[1]

        def body(total_vD, chunk):
            grad_BnD, tokens_Bn = (spread.gather(x) for x in chunk)
            rows, inside = _mine(tokens_Bn, part, spread)
            grad_BnD = jnp.where(inside[..., None], grad_BnD, 0).astype(jnp.float32)
            return total_vD.at[rows].add(grad_BnD), None

        chunks, n = division(tokens_BT.shape[0], T, 2 * CHUNK_TOKENS, 1) if spread.vocab else (1, T)
        start = jnp.zeros((part, grad_BTD.shape[-1]), jnp.float32)
        total, _ = jax.lax.scan(body, start, (chunks_of(grad_BTD, chunks, n), chunks_of(tokens_BT, chunks, n)))
        return spread.copies_sum(total.astype(like_VD.dtype))

    rows = P(spread.rows or None)
    return spread.on_mesh(local, (rows, rows), P(spread.vocab or None))(grad_BTD, tokens_BT), None


_embed.defvjp(_embed_forward, _embed_backward)

"""The ends of a model that are as wide as its vocabulary: parts of a table, chunks of tokens, and the embedding.

Both tables are sharded into parts of whole rows (tokens of the vocabulary) over the mesh's fsdp and tensor axes, and
stay there: not the table travels but the hidden states, which are far fewer than the vocabulary has tokens. Each device
looks up, or computes the logits of, its own part of the vocabulary for the rows of all devices that hold another part;
sums over devices make the rest. So no device ever has the whole table, its whole gradient, or the logits of all
completions. A vocabulary that does not divide is sharded by width (`sharding.py`); its parts, the last ones padded, are
exchanged when they are needed.

Shapes: B rows, N (or T) tokens of a row, n of them in a chunk, D model, V vocabulary (v: a device's part of it).
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dpo_jax.parallel.spread import Spread

# Tokens (rows x tokens, for each device that shares rows) that are looked up, or have logits, at one time.
CHUNK_TOKENS = 1024


def table_parts(table_VD: jax.Array, spread: Spread) -> jax.Array:
    """The table in equal parts over the vocabulary's axes: with rows of padding where its own do not divide."""
    return _exchanged(table_VD, spread, len(table_VD)) if len(table_VD) % spread.size(spread.vocab) else table_VD


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _exchanged(table_VD: jax.Array, spread: Spread, vocab: int) -> jax.Array:
    padding = -vocab % spread.size(spread.vocab)
    local = lambda x_VD: spread.parts(jnp.pad(x_VD, ((0, padding), (0, 0))))
    return spread.on_mesh(local, P(None, spread.width or None), P(spread.vocab))(table_VD)


def _exchanged_backward(spread: Spread, vocab: int, _: None, grad_VD: jax.Array) -> tuple[jax.Array]:
    local = lambda grad_vD: spread.widths(grad_vD)[:vocab]
    return (spread.on_mesh(local, P(spread.vocab), P(None, spread.width or None))(grad_VD),)


_exchanged.defvjp(lambda table_VD, spread, vocab: (_exchanged(table_VD, spread, vocab), None), _exchanged_backward)


def chunks_of(x_BN: jax.Array, chunks: int, n: int) -> jax.Array:
    """`[B, N, ...]` → `[chunks, B, n, ...]`, padded with zeros."""
    x = jnp.pad(x_BN, ((0, 0), (0, chunks * n - x_BN.shape[1]), *((0, 0),) * (x_BN.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], chunks, n, *x.shape[2:]), 1, 0)


def joined(x: jax.Array, N: int) -> jax.Array:
    """`[chunks, B, n, ...]` → `[B, N, ...]`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :N]


def division(rows: int, N: int, chunk_tokens: int, least: int) -> tuple[int, int]:
    """How many chunks of how many tokens of a row, for `rows` rows of a device."""
    chunks = min(N, max(least, -(-rows * N // chunk_tokens)))
    n = -(-N // chunks)
    return -(-N // n), n


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


_embed.defvjp(
    lambda table_VD, tokens_BT, spread, like_VD: (_embed(table_VD, tokens_BT, spread, like_VD), tokens_BT),
    _embed_backward,
)

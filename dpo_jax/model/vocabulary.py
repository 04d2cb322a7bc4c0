"""What both ends of a model share that are as wide as its vocabulary: parts of a table, and chunks of tokens.

Both tables are sharded into parts of whole rows (tokens of the vocabulary) over the mesh's fsdp and tensor axes, and
stay there: not the table travels but the hidden states, which are far fewer than the vocabulary has tokens. Each device
looks up, or computes the logits of, its own part of the vocabulary for the rows of all devices that hold another part;
sums over devices make the rest. So no device ever has the whole table, its whole gradient, or the logits of all
completions. A vocabulary that does not divide is sharded by width (`sharding.py`); its parts, the last ones padded, are
exchanged when they are needed.

Shapes: B rows, N tokens of a row, n of them in a chunk, D model, V vocabulary (v: a device's part of it).
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
    pad = ((0, 0), (0, chunks * n - x_BN.shape[1]), *((0, 0),) * (x_BN.ndim - 2))
    x = jnp.pad(x_BN, pad)
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

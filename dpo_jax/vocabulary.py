"""The two ends of a model that are as wide as its vocabulary: the embedding, and log-probabilities of given tokens.

Both tables lie in parts of whole rows (tokens of the vocabulary) over every mesh axis that can hold them, and stay
there: not the table travels but the hidden states, which are far fewer than the vocabulary has tokens. Each device
looks up, or computes the logits of, its own part of the vocabulary for the rows of all devices that hold another part;
sums over devices make the rest. So no device ever has the whole table, its whole gradient, or the logits of all
completions.

Shapes: B rows, T tokens of a row, N completion tokens of a row, n of them in a chunk, D model, V vocabulary (v: a
part of it).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

# Tokens (rows x tokens, for each device that shares rows) that are looked up, or have logits, at one time.
CHUNK_TOKENS = 1024

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Spread:
    """Over which mesh axes rows and vocabulary lie; axes of one device are left out.

    Attributes:
      rows, vocab: mesh axes.
      devices: how many devices each axis has.
    """

    rows: Axes
    vocab: Axes
    devices: tuple[tuple[str, int], ...]

    @property
    def gathered(self) -> Axes:
        """Axes over which devices have other rows and other parts of the vocabulary: rows must meet all parts."""
        return tuple(a for a in self.vocab if a in self.rows)

    @property
    def shared(self) -> Axes:
        """Axes over which devices have the same rows and other parts of the vocabulary."""
        return tuple(a for a in self.vocab if a not in self.rows)

    @property
    def copies(self) -> Axes:
        """Axes over which devices have other rows and the same part of the vocabulary."""
        return tuple(a for a in self.rows if a not in self.vocab)

    def size(self, axes: Axes) -> int:
        return math.prod(dict(self.devices)[a] for a in axes)


def mesh_axes(name: str) -> Axes:
    """The mesh axes of a logical axis by itself: together with others, each mesh axis would be given out only once."""
    (axes,) = nn.logical_to_mesh_axes((name,)) or (None,)
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def spread_of(rows: int) -> Spread:
    """How the current mesh and the logical-axis rules spread `rows` rows and the vocabulary."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return Spread((), (), ())
    row_axes, vocab_axes = (tuple(a for a in mesh_axes(name) if mesh.shape[a] > 1) for name in ("rows", "vocab"))
    devices = tuple((a, mesh.shape[a]) for a in dict.fromkeys(row_axes + vocab_axes))
    spread = Spread(row_axes, vocab_axes, devices)
    # A few prompts to answer need not divide over the devices: then all devices have them all.
    return spread if rows % spread.size(row_axes) == 0 else dataclasses.replace(spread, rows=())


def _on_mesh(fn: Callable, spread: Spread, in_specs: Any, out_specs: Any) -> Callable:
    if not spread.devices:
        return fn
    # Unchecked: sums over devices are written out below, forward and backward.
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _gather(x: jax.Array, spread: Spread) -> jax.Array:
    """The rows of all devices whose part of the vocabulary is another."""
    return jax.lax.all_gather(x, spread.gathered, axis=0, tiled=True) if spread.gathered else x


def _scatter_sum(x: jax.Array, spread: Spread) -> jax.Array:
    """The sum over all parts of the vocabulary, of this device's own rows."""
    x = jax.lax.psum(x, spread.shared) if spread.shared else x
    return jax.lax.psum_scatter(x, spread.gathered, scatter_dimension=0, tiled=True) if spread.gathered else x


def _copies_sum(x: jax.Array, spread: Spread) -> jax.Array:
    return jax.lax.psum(x, spread.copies) if spread.copies else x


def _offset(spread: Spread, part: int) -> Any:
    """The first token of this device's part of the vocabulary."""
    return jax.lax.axis_index(spread.vocab) * part if spread.vocab else 0


def _chunks(x_BN: jax.Array, chunks: int, n: int) -> jax.Array:
    """`[B, N, ...]` → `[chunks, B, n, ...]`, padded with zeros."""
    pad = ((0, 0), (0, chunks * n - x_BN.shape[1]), *((0, 0),) * (x_BN.ndim - 2))
    x = jnp.pad(x_BN, pad)
    return jnp.moveaxis(x.reshape(x.shape[0], chunks, n, *x.shape[2:]), 1, 0)


def _joined(x: jax.Array, N: int) -> jax.Array:
    """`[chunks, B, n, ...]` → `[B, N, ...]`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :N]


def _division(rows: int, N: int, chunk_tokens: int, least: int) -> tuple[int, int]:
    """How many chunks of how many tokens of a row, for `rows` rows of a device."""
    chunks = min(N, max(least, -(-rows * N // chunk_tokens)))
    n = -(-N // chunks)
    return -(-N // n), n


# ------------------------------------------------------------------------------------------------------- embedding


def embed(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """The rows of `table_VD` for `tokens_BT` int32: `[B, T, D]`."""
    like_VD = jax.ShapeDtypeStruct(table_VD.shape, table_VD.dtype)
    return _embed(table_VD, tokens_BT, spread_of(tokens_BT.shape[0]), like_VD)


def _mine(tokens: jax.Array, part: int, spread: Spread) -> tuple[jax.Array, jax.Array]:
    """Row numbers in this device's part of the table, and whether they are in it."""
    local = tokens - _offset(spread, part)
    return jnp.clip(local, 0, part - 1), (local >= 0) & (local < part)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _embed(table_VD: jax.Array, tokens_BT: jax.Array, spread: Spread, like_VD: jax.ShapeDtypeStruct) -> jax.Array:
    def local(table_vD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        if not spread.vocab:
            return jnp.take(table_vD, tokens_BT, axis=0)
        T = tokens_BT.shape[1]

        def body(_, tokens_Bn):
            rows, inside = _mine(_gather(tokens_Bn, spread), table_vD.shape[0], spread)
            found = jnp.where(inside[..., None], jnp.take(table_vD, rows, axis=0), 0)
            return None, _scatter_sum(found, spread)

        chunks, n = _division(tokens_BT.shape[0], T, 2 * CHUNK_TOKENS, 1)
        return _joined(jax.lax.scan(body, None, _chunks(tokens_BT, chunks, n))[1], T)

    rows = P(spread.rows or None)
    return _on_mesh(local, spread, (P(spread.vocab or None), rows), rows)(table_VD, tokens_BT)


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
            grad_BnD, tokens_Bn = (_gather(x, spread) for x in chunk)
            rows, inside = _mine(tokens_Bn, part, spread)
            grad_BnD = jnp.where(inside[..., None], grad_BnD, 0).astype(jnp.float32)
            return total_vD.at[rows].add(grad_BnD), None

        chunks, n = _division(tokens_BT.shape[0], T, 2 * CHUNK_TOKENS, 1) if spread.vocab else (1, T)
        start = jnp.zeros((part, grad_BTD.shape[-1]), jnp.float32)
        total, _ = jax.lax.scan(body, start, (_chunks(grad_BTD, chunks, n), _chunks(tokens_BT, chunks, n)))
        return _copies_sum(total.astype(like_VD.dtype), spread)

    rows = P(spread.rows or None)
    return _on_mesh(local, spread, (rows, rows), P(spread.vocab or None))(grad_BTD, tokens_BT), None


_embed.defvjp(_embed_forward, _embed_backward)


# ----------------------------------------------------------------------------------------------- log-probabilities


@dataclasses.dataclass(frozen=True)
class LogpOptions:
    """How log-probabilities are computed.

    Attributes:
      chunk_tokens: about how many tokens' logits are held at once, for each device that shares the rows.
      softcap: logits become softcap·tanh(logits/softcap) (Gemma 2, arXiv 2408.00118); None leaves them.
      log_sum_sq: whether to compute log Σ_v p(v)² of every distribution in the same pass, without a gradient.
    """

    chunk_tokens: int = CHUNK_TOKENS
    softcap: float | None = None
    log_sum_sq: bool = False


def token_logps(
    hidden_BND: jax.Array, targets_BN: jax.Array, table_VD: jax.Array, options: LogpOptions
) -> tuple[jax.Array, jax.Array | None]:
    """log p(target | hidden) for every token, computed in chunks whose logits the backward pass makes again.

    Args:
      hidden_BND: the hidden states that predict the targets.
      targets_BN: int32 token ids.
      table_VD: the vocabulary projection.
      options: see there.

    Returns:
      float32 `[B, N]`, and the same of log Σ p² or None.
    """
    if hidden_BND.shape[1] == 0:
        empty = jnp.zeros(targets_BN.shape, jnp.float32)
        return empty, empty if options.log_sum_sq else None
    return _token_logps(hidden_BND, targets_BN, table_VD, options, spread_of(targets_BN.shape[0]))


def _logits(hidden_BnD: jax.Array, table_vD: jax.Array, softcap: float | None) -> jax.Array:
    logits_Bnv = jnp.einsum("BnD,vD->Bnv", hidden_BnD, table_vD, preferred_element_type=jnp.float32)
    return softcap * jnp.tanh(logits_Bnv / softcap) if softcap else logits_Bnv


def _is_target(targets_Bn: jax.Array, part: int, spread: Spread) -> jax.Array:
    """Which logit of this device's part is the target's. Compared, not gathered: that fuses with the reductions."""
    return (jnp.arange(part) + _offset(spread, part))[None, None, :] == targets_Bn[:, :, None]


def _log_sum(logits_Bnv: jax.Array, spread: Spread) -> jax.Array:
    """log Σ exp over the whole vocabulary."""
    largest = jax.lax.stop_gradient(jnp.max(logits_Bnv, axis=-1))
    largest = jax.lax.pmax(largest, spread.vocab) if spread.vocab else largest
    total = jnp.sum(jnp.exp(logits_Bnv - largest[..., None]), axis=-1)
    return jnp.log(jax.lax.psum(total, spread.vocab) if spread.vocab else total) + largest


def _own_rows(x: jax.Array, rows: int, spread: Spread) -> jax.Array:
    """Of values that all devices have for the gathered rows, those of this device's own."""
    if not spread.gathered:
        return x
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(spread.gathered) * rows, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _token_logps(
    hidden_BND: jax.Array, targets_BN: jax.Array, table_VD: jax.Array, options: LogpOptions, spread: Spread
) -> tuple[jax.Array, jax.Array | None]:
    return _forward(hidden_BND, targets_BN, table_VD, options, spread)[0]


def _forward(
    hidden_BND: jax.Array, targets_BN: jax.Array, table_VD: jax.Array, options: LogpOptions, spread: Spread
) -> tuple[tuple[jax.Array, jax.Array | None], Any]:
    def local(hidden_BND: jax.Array, targets_BN: jax.Array, table_vD: jax.Array):
        B, N, _ = hidden_BND.shape

        def body(_, chunk):
            hidden_BnD, targets_Bn = (_gather(x, spread) for x in chunk)
            logits_Bnv = _logits(hidden_BnD, table_vD, options.softcap)
            target = jnp.sum(jnp.where(_is_target(targets_Bn, table_vD.shape[0], spread), logits_Bnv, 0.0), axis=-1)
            target = jax.lax.psum(target, spread.vocab) if spread.vocab else target
            log_sum = _log_sum(logits_Bnv, spread)
            found = {"logps": target - log_sum, "log_sum": log_sum}
            if options.log_sum_sq:
                found["squares"] = _log_sum(2 * logits_Bnv, spread) - 2 * log_sum
            return None, {name: _own_rows(x, B, spread) for name, x in found.items()}

        chunks, n = _division(B, N, options.chunk_tokens, 2)
        found = jax.lax.scan(body, None, (_chunks(hidden_BND, chunks, n), _chunks(targets_BN, chunks, n)))[1]
        return {name: _joined(x, N) for name, x in found.items()}

    rows, vocab = P(spread.rows or None), P(spread.vocab or None)
    found = _on_mesh(local, spread, (rows, rows, vocab), rows)(hidden_BND, targets_BN, table_VD)
    return (found["logps"], found.get("squares")), (hidden_BND, targets_BN, table_VD, found["log_sum"])


def _backward(options: LogpOptions, spread: Spread, kept: Any, grads: Any) -> tuple[jax.Array, None, jax.Array]:
    hidden_BND, targets_BN, table_VD, log_sum_BN = kept

    def local(hidden_BND, targets_BN, table_vD, log_sum_BN, grad_BN):
        B, N, _ = hidden_BND.shape
        dtype = table_vD.dtype

        def body(total_vD, chunk):
            hidden_BnD, targets_Bn, log_sum_Bn, grad_Bn = (_gather(x, spread) for x in chunk)
            logits_Bnv = _logits(hidden_BnD, table_vD, options.softcap)
            probs_Bnv = jnp.exp(logits_Bnv - log_sum_Bn[..., None])
            grad_Bnv = (_is_target(targets_Bn, table_vD.shape[0], spread) - probs_Bnv) * grad_Bn[..., None]
            if options.softcap:
                grad_Bnv = grad_Bnv * (1 - (logits_Bnv / options.softcap) ** 2)
            grad_Bnv = grad_Bnv.astype(dtype)
            # Summed over the vocabulary's parts in the dtype of activations, as the products of every layer are.
            back_BnD = jnp.einsum("Bnv,vD->BnD", grad_Bnv, table_vD).astype(hidden_BND.dtype)
            flat = lambda x: x.reshape(-1, x.shape[-1])
            mine_vD = jnp.dot(flat(grad_Bnv).T, flat(hidden_BnD), preferred_element_type=jnp.float32)
            return total_vD + mine_vD, _scatter_sum(back_BnD, spread)

        chunks, n = _division(B, N, options.chunk_tokens, 2)
        parts = tuple(_chunks(x, chunks, n) for x in (hidden_BND, targets_BN, log_sum_BN, grad_BN))
        total_vD, back = jax.lax.scan(body, jnp.zeros(table_vD.shape, jnp.float32), parts)
        return _joined(back, N), _copies_sum(total_vD.astype(dtype), spread)

    rows, vocab = P(spread.rows or None), P(spread.vocab or None)
    # Padding of a chunk has a gradient of zero, whatever its logits are.
    back_BND, table_grad_VD = _on_mesh(local, spread, (rows, rows, vocab, rows, rows), (rows, vocab))(
        hidden_BND, targets_BN, table_VD, log_sum_BN, grads[0]
    )
    return back_BND, None, table_grad_VD


_token_logps.defvjp(_forward, _backward)

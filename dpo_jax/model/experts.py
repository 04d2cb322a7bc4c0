"""Mixture of experts: routing, the experts' feed-forward layers, and the load-balancing loss.

Dropless: every token gets all its experts, whatever their load. Tokens are sorted by expert, so that each expert is one
product over a stretch of rows (`jax.lax.ragged_dot`, a grouped matrix product on TPU).

Shapes: B rows, T tokens of a row, D model, X experts, F ffn of an expert, C experts per token ("choices"), R rows of a
grouped product (one token and choice each), I and O its inputs and outputs.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jax.sharding import PartitionSpec as P

from dpo_jax.parallel.spread import Axes, mesh_axes, per_device

Weights = tuple[jax.Array, jax.Array, jax.Array]  # gate [X, D, F], up [X, D, F], down [X, F, D]


def route(logits_BTX: jax.Array, choices: int, *, normalised: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The experts of every token, `choices` each, by the router's logits.

    Args:
      normalised: the chosen probabilities are divided by their sum.

    Returns:
      All probabilities float32 `[B, T, X]`; the chosen experts int32 `[B, T, C]`; their weights float32 `[B, T, C]`.
    """
    probs_BTX = jax.nn.softmax(logits_BTX.astype(jnp.float32), axis=-1)
    weights_BTC, chosen_BTC = jax.lax.top_k(probs_BTX, choices)
    if normalised:
        weights_BTC = weights_BTC / jnp.sum(weights_BTC, axis=-1, keepdims=True)
    return probs_BTX, chosen_BTC, weights_BTC


def balance_sums(probs_BTX: jax.Array, chosen_BTC: jax.Array, counted_BT: jax.Array) -> dict[str, jax.Array]:
    """What one layer's counted tokens add to `balance_loss`: `assigned` `[X]`, `probability` `[X]`, `tokens` `[]`."""
    X = probs_BTX.shape[-1]
    counted = counted_BT.astype(jnp.float32)
    is_chosen_BTX = jnp.sum(chosen_BTC[..., None] == jnp.arange(X)[None, None, None, :], axis=2).astype(jnp.float32)
    return {
        "assigned": jnp.einsum("BTX,BT->X", is_chosen_BTX, counted),
        "probability": jnp.einsum("BTX,BT->X", probs_BTX, counted),
        "tokens": jnp.sum(counted),
    }


def balance_loss(sums: dict[str, jax.Array]) -> jax.Array:
    """Load-balancing loss X·Σ_x f_x·P_x (Fedus et al. 2021, arXiv 2101.03961, equations 4-6), as transformers has it.

    f_x is the share of (layer, token) that chose expert x, P_x the mean probability of x; only P has a gradient. It is
    1·C where all experts are equally used. The sums of several microbatches may be added before: the value is then
    that of all their tokens, while a gradient taken per microbatch sees that microbatch's own f.

    `sums` are `balance_sums`, summed over layers; the value is a float32 scalar, not yet times the model's
    `router_aux_loss_coef`.
    """
    tokens = jnp.maximum(sums["tokens"], 1.0)
    used_X, probability_X = jax.lax.stop_gradient(sums["assigned"]) / tokens, sums["probability"] / tokens
    return used_X.shape[0] * jnp.sum(used_X * probability_X)


@dataclasses.dataclass(frozen=True)
class Grouped:
    """The gradient of experts' weights by a kernel of JAX (Pallas, TPU): a row is multiplied for its own expert only.

    Without it XLA multiplies every row for every expert on TPU: the transpose of a grouped product has no kernel there.

    Attributes:
      interpret: run it as plain operations, on any machine.
    """

    interpret: bool = False


class Over(NamedTuple):
    """Mesh axes over which experts, the ffn of each, or D are sharded."""

    experts: Axes = ()
    ffn: Axes = ()
    width: Axes = ()


TILE_ROWS, TILE_SIDE = 128, 512  # of the kernel's products: rows of a step, and sides of what they are added to


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x_RI: jax.Array, w_XIO: jax.Array, sizes_X: jax.Array, grouped: Grouped) -> jax.Array:
    """Rows times the weights of their expert, `[R, O]`; of each expert `sizes_X` rows follow each other."""
    return jax.lax.ragged_dot(x_RI, w_XIO, sizes_X)


def _product_backward(grouped: Grouped, kept: Any, grad_RO: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_RI, w_XIO, sizes_X = kept
    back_RI = jax.lax.ragged_dot(grad_RO, w_XIO.swapaxes(1, 2), sizes_X)
    padded = lambda x: jnp.pad(x, ((0, -len(x) % TILE_ROWS), (0, 0)))  # with rows of no expert
    sides = (min(TILE_SIDE, -(-size // 128) * 128) for size in w_XIO.shape[1:])
    transposed, tiling = padded(x_RI).swapaxes(0, 1), (TILE_ROWS, *sides)
    grad_XIO = tgmm(transposed, padded(grad_RO), sizes_X, w_XIO.dtype, tiling, interpret=grouped.interpret)
    return back_RI, grad_XIO, None


_product.defvjp(
    lambda x_RI, w_XIO, sizes_X, grouped: (_product(x_RI, w_XIO, sizes_X, grouped), (x_RI, w_XIO, sizes_X)),
    _product_backward,
)


def _mlp(
    x_BTD: jax.Array,
    chosen_BTC: jax.Array,
    weights_BTC: jax.Array,
    weights: Weights,
    *,
    act: Callable,
    grouped: Grouped | None,
    over: Over,
) -> jax.Array:
    """The weighted sum of the chosen experts, of those that this device has."""
    gate_XDF, up_XDF, down_XFD = weights
    B, T, D = x_BTD.shape
    X, C = gate_XDF.shape[0], chosen_BTC.shape[-1]
    expert_R = chosen_BTC.reshape(B * T * C)  # R: one (token, choice) each
    if over.experts:
        expert_R = expert_R - jax.lax.axis_index(over.experts) * X
    expert_R = jnp.where((expert_R >= 0) & (expert_R < X), expert_R, X)  # those of other devices come last
    order_R = jnp.argsort(expert_R, stable=True)
    sizes_X = jnp.sum(expert_R[:, None] == jnp.arange(X)[None, :], axis=0, dtype=jnp.int32)
    run = jax.lax.ragged_dot if grouped is None else functools.partial(_product, grouped=grouped)
    product = lambda x_RI, w_XIO: run(x_RI, w_XIO, sizes_X)
    # Rows of no group hold anything on some backends, and so would their gradient.
    here_R = (expert_R < X)[order_R][:, None] if over.experts else None
    masked = lambda x: x if here_R is None else jnp.where(here_R, x, 0)
    x_RD = masked(x_BTD.reshape(B * T, D)[order_R // C])
    gate_RF, up_RF = product(x_RD, gate_XDF), product(x_RD, up_XDF)
    if over.width:
        gate_RF, up_RF = jax.lax.psum((gate_RF, up_RF), over.width)
    out_RD = masked(product(act(gate_RF) * up_RF, down_XFD))
    out_BTCD = out_RD[jnp.argsort(order_R)].reshape(B, T, C, D)
    out_BTD = jnp.einsum("BTCD,BTC->BTD", out_BTCD, weights_BTC.astype(x_BTD.dtype))
    axes = (*over.experts, *over.ffn)
    return jax.lax.psum(out_BTD, axes) if axes else out_BTD


def experts_mlp(
    x_BTD: jax.Array,
    chosen_BTC: jax.Array,
    weights_BTC: jax.Array,
    weights: Weights,
    *,
    act: Callable,
    grouped: Grouped | None = None,
) -> jax.Array:
    """Σ over a token's experts of weight · down(act(gate(x)) · up(x)), `[B, T, D]`.

    On a mesh every device sorts its own rows' tokens and computes its own experts (or its own part of every expert's
    ffn) for them; the parts are added up. Left to itself the compiler would sort the tokens of the whole batch. Where
    activations are sharded by width, for decoding, a device has that width of the weights, which stay where they lie.
    """
    local = functools.partial(_mlp, act=act, grouped=grouped, over=Over())
    rows, experts, ffn, width = (mesh_axes(name) for name in ("rows", "experts", "expert_mlp", "activation"))
    mesh = jax.sharding.get_abstract_mesh()
    if not (rows or experts or ffn or width) or x_BTD.shape[0] % math.prod(mesh.shape[axis] for axis in rows):
        if not mesh.empty and mesh.size > 1:  # a kernel is one device's
            local = functools.partial(local, grouped=None)
        return local(x_BTD, chosen_BTC, weights_BTC, weights)
    by_rows, by_width, by_expert = P(rows, None, None), P(rows, None, width), P(experts, width, ffn)
    in_specs = (by_width, by_rows, by_rows, (by_expert, by_expert, P(experts, ffn, width)))
    local = functools.partial(local, over=Over(experts, ffn, width))
    return per_device(local, in_specs, by_width)(x_BTD, chosen_BTC, weights_BTC, weights)

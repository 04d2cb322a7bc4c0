"""The decoder as plain functions of parameters and a batch: hidden states of rows, prompts kept for decoding, decoding.

Shapes: B rows, T tokens of a row, R answers, D model, V vocabulary, L layers, G kv-heads, E head width.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from dpo_jax.model.attention.cpu_tiles import Skipping, tiled_attention
from dpo_jax.model.attention.dense import Scores, dense_attention
from dpo_jax.model.attention.paged import Tables, cached_heads, for_keeping, paged_attention
from dpo_jax.model.attention.tpu_splash import Tiling, splash_attention
from dpo_jax.model.config import ModelConfig, Params
from dpo_jax.model.decoder import Block, Decoder, ModelOptions, embedded, final_norm
from dpo_jax.model.rotary import rotary_angles
from dpo_jax.rows.batch import Batch
from dpo_jax.rows.shape import RowShape

NO_WINDOW = 2**30  # positions, more than any row has


def _context(
    config: ModelConfig, positions_BT: jax.Array, reach: int, last_BT: Callable[[], jax.Array]
) -> dict[str, Any]:
    """What the layers need of positions; under `layers`, what differs between them, `[L]` each.

    Args:
      reach: no sequence is longer. A window as wide needs no mask, an original context as wide no other rope.
      last_BT: gives the last position of every token's sequence.
    """
    c = config
    angles = functools.partial(rotary_angles, positions_BT, head_dim=int(c.head_dim * c.partial_rotary_factor))
    original = dict(c.rope_scaling).get("original_max_position_embeddings", 0)
    is_long = dict(c.rope_scaling).get("rope_type") == "longrope" and reach > original
    last = last_BT() if is_long else None
    context: dict[str, Any] = {"angles": angles(theta=c.rope_theta, scaling=c.rope_scaling, last_BT=last), "layers": {}}
    slides_L = jnp.asarray(c.sliding_layers or (False,) * c.num_hidden_layers)
    if c.slides_within(reach):
        context["layers"]["window"] = jnp.where(slides_L, jnp.int32(c.sliding_window), jnp.int32(NO_WINDOW))
    if c.rope_local_theta is not None:
        context["layers"]["slides"] = slides_L
        context["local_angles"] = angles(theta=c.rope_local_theta)
    return context


def _scores(config: ModelConfig) -> Scores:
    scalar = config.query_pre_attn_scalar
    return Scores(None if scalar is None else scalar**-0.5, config.attn_logit_softcapping)


def _row_attention(model: ModelOptions, shape: RowShape) -> Callable:
    """Attention of rows: by the kernel, or in tiles that skip, where `model.tiling` says so, else as dense blocks.

    With windows that rows can reach beyond, dense blocks are in the kernel's place: it counts columns, they positions.
    """
    tiling, scores = model.tiling, _scores(model.config)

    def attend(q, k, v, context, cache):
        inputs = (q, k, v, context["segments"], shape)
        window = (context["positions"], context["window"]) if "window" in context else None
        if isinstance(tiling, Tiling) and window is None:
            return splash_attention(*inputs, tiling=tiling, scores=scores), cache
        if isinstance(tiling, Skipping):
            out = tiled_attention(*inputs, skipping=tiling, window=window, scores=scores)
        else:
            out = dense_attention(*inputs, window=window, scores=scores)
        return checkpoint_name(out, "attention_out"), cache

    return attend


def _row_context(
    model: ModelOptions,
    batch: Batch[jax.Array],
    shape: RowShape,
    reach: int | None = None,
    last: Callable[[], jax.Array] | None = None,
) -> dict[str, Any]:
    positions_BT, segments_BT = batch.positions, batch.segments
    reach = shape.reach(model.longest) if reach is None else reach

    def last_BT() -> jax.Array:
        """Of a group's longest sequence, as all share the prompt."""
        same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
        return jnp.max(jnp.where(same_BTS, positions_BT[:, None, :], 0), axis=-1)

    context = _context(model.config, positions_BT, reach, last or last_BT) | {"segments": segments_BT}
    return context | ({"positions": positions_BT} if "window" in context["layers"] else {})


def _variables(params: Params) -> dict[str, Params]:
    """The branch `lora` is a collection of its own: a projection has an adapter if its name is in there."""
    params = dict(params)
    adapters = params.pop("lora", None)
    return {"params": params} | ({} if adapters is None else {"lora": adapters})


def hidden_states(
    params: Params, batch: Batch[jax.Array], shape: RowShape, model: ModelOptions, *, balance: bool = False
) -> tuple[jax.Array, dict[str, jax.Array] | None]:
    """Final hidden states of rows, and how evenly a model with experts used them.

    Args:
      params: the decoder's parameters, adapters among them or not.
      batch: one microbatch, of which `tokens`, `positions` and `segments` matter.
      balance: whether the experts' sums are asked for.

    Returns:
      `[B, T, D]` in the model's dtype, and None or sums over all layers and all tokens that are no padding (a prompt
      shared by its completions counts once): add those of several microbatches if need be, give them to
      `experts.balance_loss`, and add the result times `config.router_aux_loss_coef` to the loss.
    """
    context = _row_context(model, batch, shape)
    if balance:
        assert model.config.num_experts, f"{model.config.model_type} has no experts"
        context["counted"] = batch.segments != 0
    decoder = Decoder(model, _row_attention(model, shape))
    hidden, (_, sums) = decoder.apply(_variables(params), batch.tokens, context)
    return hidden, jax.tree.map(lambda x: jnp.sum(x, axis=0), sums) if balance else None


def prefill(
    params: Params, batch: Batch[jax.Array], shape: RowShape, model: ModelOptions, last_BT: jax.Array, reach: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Hidden states `[B, T, D]` of packed prompts, and their keys and values `[L, B, T, G, E]` with positions applied.

    Args:
      last_BT: int32, the last position that the sequence of each token may come to, answer included.
      reach: no sequence is longer. Both decide the rope: were it to change on the way, kept keys would be of another.
    """
    attend = _row_attention(model, shape)

    def keeping(q, k, v, context, cache):
        return attend(q, k, v, context, cache)[0], (k, v)

    context = _row_context(model, batch, shape, reach, lambda: last_BT)
    out: Any = Decoder(model, keeping).apply(_variables(params), batch.tokens, context)
    hidden, (kept, _) = out
    return hidden, kept


def layers_apart(params: Params, layers: int, device: jax.Device) -> Params:
    """Parameters whose layers are a tuple of trees, views of the same memory; of a policy on one CPU device.

    A loop over stacked layers copies each layer's weights out of the stack on CPU, which takes longer than a few rows'
    products with them.
    """

    def views(stacked: jax.Array) -> list[jax.Array]:
        host = np.asarray(stacked)
        return [jax.device_put(host[i], device) for i in range(layers)]  # no copy of what is aligned, as XLA does

    def apart(tree: Params) -> tuple[Params, ...]:
        leaves, structure = jax.tree.flatten(tree)
        return tuple(jax.tree.unflatten(structure, one) for one in zip(*map(views, leaves), strict=True))

    branch = {"lora": {"layers": apart(params["lora"]["layers"])}} if "lora" in params else {}
    return params | branch | {"layers": apart(params["layers"])}


def decode(
    params: Params,
    tokens_R: jax.Array,
    caches: Any,
    tables: Tables,
    steps: jax.Array,
    last_R: jax.Array,
    model: ModelOptions,
    reach: int,
) -> tuple[jax.Array, Any]:
    """Hidden states `[R, D]` of one new token a row, and its keys and values `[R, G, 1, E]` of every layer.

    Args:
      params: layers stacked, or each for itself (`layers_apart`).
      caches: a `LayerCache` whose arrays have a leading axis of layers, or a tuple of them.
      tables, steps: see `paged.paged_attention`; the token's position is the table's, `steps` further.
      last_R: the last position that a row may come to, int32 `[R]`.
      reach: no sequence is longer.
    """
    heads = cached_heads(caches)

    def attend(q, k, v, context, cache):
        k, v = (for_keeping(x, heads) for x in (k, v))
        where = {"window": context.get("window"), "scores": _scores(model.config)}
        out = paged_attention(q, k, v, cache, tables, steps, **where)
        return out, (jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))

    positions_R1 = (tables.position + steps)[:, None]
    context = _context(model.config, positions_R1, reach, lambda: last_R[:, None])
    by_layer = context.pop("layers")
    block = Block(model.config, attend, model.grouped)
    variables = _variables(params)
    stacked = {name: tree["layers"] for name, tree in variables.items()}

    def layer(x_R1D: jax.Array, one: Any) -> tuple[jax.Array, Any]:
        weights, own, cache = one
        x_R1D, (kept, _) = block.apply(weights, x_R1D, cache, own, context)
        return x_R1D, kept

    x = embedded(params, tokens_R[:, None], model)
    if isinstance(params["layers"], tuple):
        kept = []
        for i, cache in enumerate(caches):
            weights = {name: layers[i] for name, layers in stacked.items()}
            x, new = layer(x, (weights, {name: y[i] for name, y in by_layer.items()}, cache))
            kept.append(new)
        out: Any = tuple(kept)
    else:
        x, out = jax.lax.scan(layer, x, (stacked, by_layer, caches))
    return final_norm(params, x, model)[:, 0], out


def unembedding(params: Params) -> jax.Array:
    """The vocabulary projection `[V, D]`: the embedding itself where they are tied."""
    return params["lm_head" if "lm_head" in params else "embedding"]


def fresh_head(key: jax.Array, config: ModelConfig) -> Any:
    """A reward model's head `[1, D]` as transformers draws it, N(0, 0.02²), with its logical axis names."""
    drawn = 0.02 * jax.random.normal(key, (1, config.hidden_size), jnp.float32)
    return nn.LogicallyPartitioned(drawn, ("label", "norm"))


def init_params(key: jax.Array, config: ModelConfig) -> Params:
    """Fresh float32 parameters with their logical axis names (`nn.LogicallyPartitioned` leaves)."""
    model, shape = ModelOptions(config), RowShape(1, (1, 1))
    ids = jnp.zeros((1, shape.length), jnp.int32)
    context = _row_context(model, Batch(ids, ids, ids, ids, ids, ids), shape)
    return Decoder(model, _row_attention(model, shape)).init(key, ids, context)["params"]

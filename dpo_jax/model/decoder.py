"""The decoder: one Flax Linen module for every family of `architecture.py`, each by its `ModelConfig`.

Everything outside sees plain functions of `(params, batch)`: `hidden_states` for training rows, `decode` for sampling,
`unembedding` for the vocabulary projection. Parameters carry logical axis names; `sharding.py` maps them to a mesh.

Shapes: B rows, T tokens of a row, D model, F ffn, H query heads, G kv-heads, E head width, V vocabulary, L layers,
X experts.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dpo_jax.model.attention.cpu_tiles import Skipping, tiled_attention
from dpo_jax.model.attention.dense import Slots, apply_rotary, cached_attention, pair_row_attention, rotary_angles
from dpo_jax.model.attention.tpu_splash import Tiling, splash_attention
from dpo_jax.model.config import ACTIVATIONS, ModelConfig
from dpo_jax.model.experts import Grouped, balance_sums, experts_mlp, route
from dpo_jax.model.params import Params
from dpo_jax.model.remat import REMAT_POLICIES, to_device
from dpo_jax.objective.token_logps import embed

RowTiling = Tiling | Skipping | None  # how attention of pair rows runs; None: as dense blocks

NO_WINDOW = 2**30  # positions, more than any row has


def _kernel(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], dtype) -> jax.Array:
    """A weight with logical axis names, drawn from N(0, 0.02²) as Llama's are, in the compute dtype."""
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)
    return jnp.asarray(module.param(name, init, shape, jnp.float32), dtype)


def _bias(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], dtype) -> jax.Array:
    init = nn.with_logical_partitioning(nn.initializers.zeros, axes)
    return jnp.asarray(module.param(name, init, shape, jnp.float32), dtype)


Adapter = tuple[jax.Array, jax.Array] | None


def _adapter(module: nn.Module, name: str, scale: float, dtype) -> Adapter:
    """A `[inputs..., r]` and scale · B `[r, outputs...]` of a projection, where the parameters have them."""
    pair: Any = module.get_variable("lora", name)
    return None if pair is None else (jnp.asarray(pair["a"], dtype), scale * jnp.asarray(pair["b"], dtype))


def _project(
    x: jax.Array, kernel: jax.Array, adapter: Adapter = None, *, contracted: int = 1, bias: jax.Array | None = None
) -> jax.Array:
    """Contract the last `contracted` axes of `x` with the first ones of `kernel`, as one product of two matrices.

    An adapter adds (x·A)·B (Hu et al. 2021, arXiv 2106.09685): two thin products, W + A·B is never made.

    With tokens as one axis the kernel's gradient contracts one axis too; over two, XLA transposes the activations
    first, which costs the backward pass on CPU a seventh of its time.
    """
    lead, outs = x.shape[: x.ndim - contracted], kernel.shape[contracted:]
    inner = math.prod(kernel.shape[:contracted])
    x = x.reshape(math.prod(lead), inner)
    product = jnp.dot(x, kernel.reshape(inner, math.prod(outs)))
    if adapter is not None:
        a, b = adapter
        product = product + jnp.dot(jnp.dot(x, a.reshape(inner, -1)), b.reshape(-1, math.prod(outs)))
    if bias is not None:
        product = product + bias.reshape(1, -1)
    return product.reshape(*lead, *outs)


class RMSNorm(nn.Module):
    """Root-mean-square layer norm (Zhang & Sennrich 2019, arXiv 1910.07467) of `[rows, tokens, ...]`, in float32.

    Attributes:
      eps: added to the mean square.
      axes: logical names of the last axes, over which the mean is taken.
      unit_offset: multiply by 1 + scale.
    """

    eps: float
    axes: tuple[str, ...] = ("norm",)
    unit_offset: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, dtype = len(self.axes), x.dtype
        init = nn.with_logical_partitioning(
            nn.initializers.zeros if self.unit_offset else nn.initializers.ones, self.axes
        )
        scale = jnp.asarray(self.param("scale", init, x.shape[-n:], jnp.float32), jnp.float32)
        # Rows and tokens as one axis: with two, XLA of jaxlib 0.10 takes 9 ms for the backward pass on CPU, not 0.6.
        y = x.astype(jnp.float32).reshape(-1, *x.shape[2:])
        scale = scale[(None,) * (y.ndim - n)]
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=tuple(range(-n, 0)), keepdims=True) + self.eps)
        return (y * (1 + scale if self.unit_offset else scale)).astype(dtype).reshape(x.shape)


class Attention(nn.Module):
    """Grouped-query self-attention; how keys are reached is the caller's (`attend`)."""

    config: ModelConfig
    attend: Callable

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: dict[str, Any], cache: Any) -> tuple[jax.Array, Any]:
        c, dtype = self.config, x_BTD.dtype
        D, H, G, E = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        wq_DHE = _kernel(self, "q", (D, H, E), ("embed", "heads", "head_dim"), dtype)
        wk_DGE = _kernel(self, "k", (D, G, E), ("embed", "kv_heads", "head_dim"), dtype)
        wv_DGE = _kernel(self, "v", (D, G, E), ("embed", "kv_heads", "head_dim"), dtype)
        wo_HED = _kernel(self, "o", (H, E, D), ("heads", "head_dim", "embed"), dtype)
        bias_HE = bias_GE = bias_vGE = bias_D = None
        if c.attention_bias:
            bias_HE = _bias(self, "q_bias", (H, E), ("heads", "head_dim"), dtype)
            bias_GE = _bias(self, "k_bias", (G, E), ("kv_heads", "head_dim"), dtype)
            bias_vGE = _bias(self, "v_bias", (G, E), ("kv_heads", "head_dim"), dtype)
        if c.output_bias:
            bias_D = _bias(self, "o_bias", (D,), ("norm",), dtype)
        adapters = {name: _adapter(self, name, c.lora_scale, dtype) for name in "qkvo"}
        q_BTHE = _project(x_BTD, wq_DHE, adapters["q"], bias=bias_HE)
        k_BTGE = _project(x_BTD, wk_DGE, adapters["k"], bias=bias_GE)
        v_BTGE = _project(x_BTD, wv_DGE, adapters["v"], bias=bias_vGE)
        if c.qk_norm:
            over = ("head_dim",) if c.qk_norm == "head" else ("heads", "head_dim")
            k_over = tuple("kv_heads" if axis == "heads" else axis for axis in over)
            q_BTHE = RMSNorm(c.rms_norm_eps, over, c.unit_offset, name="q_norm")(q_BTHE)
            k_BTGE = RMSNorm(c.rms_norm_eps, k_over, c.unit_offset, name="k_norm")(k_BTGE)
        q_BTHE, k_BTGE = (apply_rotary(x, context["angles"]) for x in (q_BTHE, k_BTGE))
        q_BTHE = nn.with_logical_constraint(checkpoint_name(q_BTHE, "q"), ("rows", "tokens", "heads", "head_dim"))
        k_BTGE = nn.with_logical_constraint(checkpoint_name(k_BTGE, "k"), ("rows", "tokens", "kv_heads", "head_dim"))
        v_BTGE = nn.with_logical_constraint(checkpoint_name(v_BTGE, "v"), ("rows", "tokens", "kv_heads", "head_dim"))
        out_BTHE, cache = self.attend(q_BTHE, k_BTGE, v_BTGE, context, cache)
        out_BTHE = nn.with_logical_constraint(out_BTHE, ("rows", "tokens", "heads", "head_dim"))
        return _project(out_BTHE, wo_HED, adapters["o"], contracted=2, bias=bias_D), cache


class Mlp(nn.Module):
    """Gated feed-forward layer: down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c, dtype = self.config, x_BTD.dtype
        D, F = c.hidden_size, c.intermediate_size
        gate_DF = _kernel(self, "gate", (D, F), ("embed", "mlp"), dtype)
        up_DF = _kernel(self, "up", (D, F), ("embed", "mlp"), dtype)
        down_FD = _kernel(self, "down", (F, D), ("mlp", "embed"), dtype)
        gate, up, down = (_adapter(self, name, c.lora_scale, dtype) for name in ("gate", "up", "down"))
        x_BTF = ACTIVATIONS[c.hidden_act](_project(x_BTD, gate_DF, gate)) * _project(x_BTD, up_DF, up)
        x_BTF = nn.with_logical_constraint(x_BTF, ("rows", "tokens", "mlp"))
        return _project(x_BTF, down_FD, down)


class Experts(nn.Module):
    """Gated feed-forward layers of which each token uses a few (Jiang et al. 2024, arXiv 2401.04088)."""

    config: ModelConfig
    grouped: Grouped | None = None

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: dict[str, Any]) -> tuple[jax.Array, Any]:
        """The update, and the layer's `balance_sums` if the context says which tokens are `counted`."""
        c, dtype = self.config, x_BTD.dtype
        X, D, F = c.num_experts, c.hidden_size, c.intermediate_size
        router_DX = _kernel(self, "router", (D, X), ("embed", "router"), jnp.float32)
        gate_XDF = _kernel(self, "gate", (X, D, F), ("experts", "embed", "expert_mlp"), dtype)
        up_XDF = _kernel(self, "up", (X, D, F), ("experts", "embed", "expert_mlp"), dtype)
        down_XFD = _kernel(self, "down", (X, F, D), ("experts", "expert_mlp", "embed"), dtype)
        logits_BTX = _project(x_BTD.astype(jnp.float32), router_DX)
        probs_BTX, chosen_BTC, weights_BTC = route(logits_BTX, c.num_experts_per_tok, normalised=c.norm_topk_prob)
        sums = balance_sums(probs_BTX, chosen_BTC, context["counted"]) if "counted" in context else None
        mlp = functools.partial(experts_mlp, act=ACTIVATIONS[c.hidden_act], grouped=self.grouped)
        return mlp(x_BTD, chosen_BTC, weights_BTC, (gate_XDF, up_XDF, down_XFD)), sums


class Block(nn.Module):
    """One decoder layer: attention and feed-forward, each normalised before or after (or both), with a residual."""

    config: ModelConfig
    attend: Callable
    grouped: Grouped | None = None

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, cache: Any, layer: dict[str, jax.Array], context: dict[str, Any]
    ) -> tuple[jax.Array, Any]:
        c = self.config

        def norm(name: str, x: jax.Array, when: str) -> jax.Array:
            return RMSNorm(c.rms_norm_eps, ("norm",), c.unit_offset, name=name)(x) if c.norms in (when, "both") else x

        x_BTD = nn.with_logical_constraint(x_BTD, ("rows", "tokens", "activation"))
        normed = norm("input_norm", x_BTD, "pre")
        update, cache = Attention(c, self.attend, name="attention")(normed, _of_layer(context, layer), cache)
        x_BTD = x_BTD + norm("attention_out_norm", update, "post")
        normed, sums = norm("mlp_norm", x_BTD, "pre"), None
        if c.num_experts:
            update, sums = Experts(c, self.grouped, name="mlp")(normed, context)
        else:
            update = Mlp(c, name="mlp")(normed)
        x_BTD = x_BTD + norm("mlp_out_norm", update, "post")
        return nn.with_logical_constraint(x_BTD, ("rows", "tokens", "activation")), (cache, sums)


class Decoder(nn.Module):
    """Token ids to final hidden states. Layers are scanned, so compile time does not grow with depth."""

    config: ModelConfig
    attend: Callable
    dtype: Any = jnp.float32
    remat: str = "none"
    from_host: bool = False
    grouped: Grouped | None = None

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, context: dict[str, Any], cache: Any = None) -> tuple[jax.Array, Any]:
        """Final hidden states; and of every layer `[L, ...]` its cache and its `balance_sums` (None where unasked)."""
        c, context = self.config, dict(context)
        layer = context.pop("layers")
        table_VD = _kernel(self, "embedding", (c.vocab_size, c.hidden_size), ("vocab", "table"), self.dtype)
        if not c.tie_word_embeddings:
            # Read by `unembedding`, outside this module: the projection runs on completion tokens only.
            _kernel(self, "lm_head", (c.vocab_size, c.hidden_size), ("vocab", "table"), self.dtype)
        x_BTD = nn.with_logical_constraint(embed(table_VD, tokens_BT), ("rows", "tokens", "activation"))
        if c.scale_embeddings:
            x_BTD = x_BTD * jnp.asarray(c.hidden_size**0.5, self.dtype)
        block: Any = Block
        if self.from_host:
            block = nn.map_variables(block, "params", trans_in_fn=to_device)
        if REMAT_POLICIES[self.remat] is not None:
            block = nn.remat(block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast),
            out_axes=0,
            length=c.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x_BTD, outs = layers(c, self.attend, self.grouped, name="layers")(x_BTD, cache, layer, context)
        return RMSNorm(c.rms_norm_eps, ("norm",), c.unit_offset, name="final_norm")(x_BTD), outs


def _context(
    config: ModelConfig, positions_BT: jax.Array, reach: int, last_BT: Callable[[], jax.Array]
) -> dict[str, Any]:
    """What the layers need of positions; under `layers`, what differs between them, `[L]` each.

    Args:
      config: the model's numbers.
      positions_BT: of the tokens.
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


def _of_layer(context: dict[str, Any], layer: dict[str, jax.Array]) -> dict[str, Any]:
    """The context of one layer, with its window and its rope."""
    context = context | layer
    if "local_angles" in context:
        choose = functools.partial(jnp.where, layer["slides"])
        context["angles"] = jax.tree.map(choose, context["local_angles"], context["angles"])
    return context


def _score_options(config: ModelConfig) -> dict[str, float | None]:
    scalar = config.query_pre_attn_scalar
    return {"scale": None if scalar is None else scalar**-0.5, "softcap": config.attn_logit_softcapping}


def _row_attention(config: ModelConfig, slots: Slots, tiling: RowTiling = None) -> Callable:
    """Attention of pair rows: by the kernel, or in tiles that skip, where `tiling` says so, else as dense blocks.

    With windows that rows can reach beyond, dense blocks are in the kernel's place: it counts columns, they positions.
    """

    def attend(q, k, v, context, cache):
        options: dict[str, Any] = _score_options(config) | {"slots": slots}
        window = (context["positions"], context["window"]) if "window" in context else None
        if isinstance(tiling, Tiling) and window is None:
            return splash_attention(q, k, v, context["segments"], tiling=tiling, **options), cache
        if isinstance(tiling, Skipping):
            out = tiled_attention(q, k, v, context["segments"], skipping=tiling, window=window, **options)
        else:
            out = pair_row_attention(q, k, v, context["segments"], window=window, **options)
        return checkpoint_name(out, "attention_out"), cache

    return attend


def _row_context(
    config: ModelConfig, batch: dict[str, jax.Array], slots: Slots, longest: int | None = None
) -> dict[str, Any]:
    positions_BT, segments_BT = batch["positions"], batch["segments"]

    def last_BT() -> jax.Array:
        """Of a pair's longer sequence, as both share the prompt."""
        same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
        return jnp.max(jnp.where(same_BTS, positions_BT[:, None, :], 0), axis=-1)

    context = _context(config, positions_BT, slots.reach(longest), last_BT) | {"segments": segments_BT}
    return context | ({"positions": positions_BT} if "window" in context["layers"] else {})


def _variables(params: Params) -> dict[str, Params]:
    """The branch `lora` is a collection of its own: a projection has an adapter if its name is in there."""
    params = dict(params)
    adapters = params.pop("lora", None)
    return {"params": params} | ({} if adapters is None else {"lora": adapters})


def hidden_states(
    params: Params,
    batch: dict[str, jax.Array],
    *,
    config: ModelConfig,
    slots: Slots,
    dtype=jnp.float32,
    remat: str = "none",
    tiling: RowTiling = None,
    from_host: bool = False,
    longest: int | None = None,
    grouped: Grouped | None = None,
) -> jax.Array:
    """Final hidden states of pair rows.

    Args:
      params: the decoder's parameters, adapters among them or not.
      batch: `tokens`, `positions`, `segments`, int32 `[B, T]` each, laid out as `attention.py` says.
      config, slots: the model's and the row's numbers.
      dtype: dtype of activations and matrix products.
      remat: a name in `REMAT_POLICIES`.
      tiling: of the attention kernel; None is attention as dense blocks.
      from_host: the layers' parameters lie in the host's memory.
      longest: no sequence has more tokens; None: than the slots have room for. Several pairs share a slot, so that rows
        have more room than a sequence; what is as wide as `longest` needs no window and no other rope.
      grouped: how the gradient of experts' weights runs; None is as XLA does it.

    Returns:
      `[B, T, D]` in `dtype`.
    """
    context = _row_context(config, batch, slots, longest)
    decoder = Decoder(config, _row_attention(config, slots, tiling), dtype, remat, from_host, grouped)
    return decoder.apply(_variables(params), batch["tokens"], context)[0]


def hidden_states_and_balance(
    params: Params,
    batch: dict[str, jax.Array],
    *,
    config: ModelConfig,
    slots: Slots,
    dtype=jnp.float32,
    remat: str = "none",
    tiling: RowTiling = None,
    from_host: bool = False,
    longest: int | None = None,
    grouped: Grouped | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`hidden_states` of a model with experts, and how evenly its experts were used.

    The second value is sums over all layers and all tokens that are no padding (a prompt shared by two completions
    counts once): add those of several microbatches if need be, give them to `experts.balance_loss`, and add the result
    times `config.router_aux_loss_coef` to the loss. Arguments are those of `hidden_states`.
    """
    assert config.num_experts, f"{config.model_type} has no experts"
    context = _row_context(config, batch, slots, longest) | {"counted": batch["segments"] != 0}
    decoder = Decoder(config, _row_attention(config, slots, tiling), dtype, remat, from_host, grouped)
    hidden, (_, sums) = decoder.apply(_variables(params), batch["tokens"], context)
    return hidden, jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)


def decode(
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    cache: Any,
    where: jax.Array,
    real_BS: jax.Array,
    *,
    config: ModelConfig,
    dtype=jnp.float32,
) -> tuple[jax.Array, Any]:
    """Hidden states `[B, T, D]` of new tokens given a cache (see `empty_cache`), and the new cache."""

    def attend(q, k, v, context, cache):
        options = _score_options(config) | {"window": context.get("window")}
        return cached_attention(q, k, v, cache, context["where"], context["real"], **options)

    # As far as a row may come: were its rope to change on the way, the cached keys would be of another one.
    last_BT = lambda: jnp.sum(real_BS, axis=1, keepdims=True) - 1
    context = _context(config, positions_BT, real_BS.shape[1], last_BT) | {"where": where, "real": real_BS}
    hidden, (cache, _) = Decoder(config, attend, dtype).apply(_variables(params), tokens_BT, context, cache)
    return hidden, cache


def empty_cache(config: ModelConfig, rows: int, length: int, dtype=jnp.float32) -> tuple[jax.Array, jax.Array]:
    """Keys and values `[L, B, S, G, E]` of zeros."""
    shape = (config.num_hidden_layers, rows, length, config.num_key_value_heads, config.head_dim)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)


def unembedding(params: Params) -> jax.Array:
    """The vocabulary projection `[V, D]`: the embedding itself where they are tied."""
    return params["lm_head" if "lm_head" in params else "embedding"]


@functools.cache
def _init_module(config: ModelConfig) -> tuple[Decoder, Slots]:
    slots = Slots(1, 1, 1)
    return Decoder(config, _row_attention(config, slots)), slots


def init_params(key: jax.Array, config: ModelConfig) -> Params:
    """Fresh float32 parameters with their logical axis names (`nn.LogicallyPartitioned` leaves)."""
    module, slots = _init_module(config)
    ids = jnp.zeros((1, slots.total), jnp.int32)
    batch = {"positions": ids, "segments": ids}
    return module.init(key, ids, _row_context(config, batch, slots))["params"]

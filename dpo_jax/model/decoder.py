"""The decoder: Flax Linen modules for every supported family, each by its `ModelConfig`.

Everything outside sees the plain functions of `forward.py`. Parameters carry logical axis names; `sharding.py`
maps them to a mesh.

Shapes: B rows, T tokens of a row, D model, F ffn, H query heads, G kv-heads, E head width, V vocabulary, L layers,
X experts.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dpo_jax.model.attention.cpu_tiles import Skipping
from dpo_jax.model.attention.tpu_splash import Tiling
from dpo_jax.model.config import ACTIVATIONS, ModelConfig, Params
from dpo_jax.model.experts import Grouped, balance_sums, experts_mlp, route
from dpo_jax.model.remat import REMAT_POLICIES, to_device
from dpo_jax.model.rotary import apply_rotary
from dpo_jax.model.vocabulary import embed

RowTiling = Tiling | Skipping | None  # how attention of rows runs; None: as dense blocks


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """How a model is computed; static where functions are compiled.

    Attributes:
      dtype: of activations and matrix products.
      remat: a name in `REMAT_POLICIES`.
      tiling: how attention of rows runs; None is as dense blocks.
      from_host: the layers' parameters are in the host's memory and come to the device a layer at a time.
      longest: no sequence has more tokens; None: than the row has room for. Several groups share a slot, so rows have
        more room than a sequence; what is as wide as `longest` needs no window and no other rope.
      grouped: how the gradient of experts' weights runs; None is as XLA does it.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    tiling: RowTiling = None
    from_host: bool = False
    longest: int | None = None
    grouped: Grouped | None = None


def _kernel(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], dtype) -> jax.Array:
    """A weight with logical axis names, in the compute dtype: drawn from N(0, initializer_range²), a bias zero."""
    config: ModelConfig = module.model.config if isinstance(module, Decoder) else module.config
    draw = nn.initializers.zeros if name.endswith("bias") else nn.initializers.normal(config.initializer_range)
    return jnp.asarray(module.param(name, nn.with_logical_partitioning(draw, axes), shape, jnp.float32), dtype)


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
        draw = nn.initializers.zeros if self.unit_offset else nn.initializers.ones
        init = nn.with_logical_partitioning(draw, self.axes)
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
        heads = {"q": (H, "heads"), "k": (G, "kv_heads"), "v": (G, "kv_heads")}
        w_DNE = {x: _kernel(self, x, (D, N, E), ("embed", axis, "head_dim"), dtype) for x, (N, axis) in heads.items()}
        wo_HED = _kernel(self, "o", (H, E, D), ("heads", "head_dim", "embed"), dtype)
        bias: dict[str, jax.Array] = {}
        if c.attention_bias:
            bias = {x: _kernel(self, f"{x}_bias", (N, E), (axis, "head_dim"), dtype) for x, (N, axis) in heads.items()}
        if c.output_bias:
            bias["o"] = _kernel(self, "o_bias", (D,), ("norm",), dtype)
        adapters = {name: _adapter(self, name, c.lora_scale, dtype) for name in "qkvo"}
        q_BTHE, k_BTGE, v_BTGE = (_project(x_BTD, w_DNE[x], adapters[x], bias=bias.get(x)) for x in "qkv")
        if c.qk_norm:
            q_over, k_over = (((axis,) if c.qk_norm == "projection" else ()) for axis in ("heads", "kv_heads"))
            q_BTHE = RMSNorm(c.rms_norm_eps, (*q_over, "head_dim"), c.unit_offset, name="q_norm")(q_BTHE)
            k_BTGE = RMSNorm(c.rms_norm_eps, (*k_over, "head_dim"), c.unit_offset, name="k_norm")(k_BTGE)
        q_BTHE, k_BTGE = (apply_rotary(x, context["angles"]) for x in (q_BTHE, k_BTGE))
        on_heads = lambda x, heads: nn.with_logical_constraint(x, ("cache_rows", "tokens", heads, "head_dim"))
        q_BTHE = on_heads(checkpoint_name(q_BTHE, "q"), "heads")
        k_BTGE, v_BTGE = (on_heads(checkpoint_name(x, n), "kv_heads") for x, n in ((k_BTGE, "k"), (v_BTGE, "v")))
        out_BTHE, cache = self.attend(q_BTHE, k_BTGE, v_BTGE, context, cache)
        out_BTHE = on_heads(out_BTHE, "heads")
        return _project(out_BTHE, wo_HED, adapters["o"], contracted=2, bias=bias.get("o")), cache


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
        context = context | layer
        if "local_angles" in context:
            choose = functools.partial(jnp.where, layer["slides"])
            context["angles"] = jax.tree.map(choose, context["local_angles"], context["angles"])
        normed = norm("input_norm", x_BTD, "pre")
        update, cache = Attention(c, self.attend, name="attention")(normed, context, cache)
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

    model: ModelOptions
    attend: Callable

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, context: dict[str, Any], cache: Any = None) -> tuple[jax.Array, Any]:
        """Final hidden states; and of every layer `[L, ...]` its cache and its `balance_sums` (None where unasked)."""
        model, c, context = self.model, self.model.config, dict(context)
        layer = context.pop("layers")
        table_VD = _kernel(self, "embedding", (c.vocab_size, c.hidden_size), ("vocab", "table"), model.dtype)
        if c.scalar_head:
            _kernel(self, "score", (1, c.hidden_size), ("label", "norm"), model.dtype)
        elif not c.tie_word_embeddings:
            # Read by `unembedding`, outside of this module: the projection runs on completion tokens only.
            _kernel(self, "lm_head", (c.vocab_size, c.hidden_size), ("vocab", "table"), model.dtype)
        x_BTD = _embedded(table_VD, tokens_BT, model)
        block: Any = nn.map_variables(Block, "params", trans_in_fn=to_device) if model.from_host else Block
        if REMAT_POLICIES[model.remat] is not None:
            block = nn.remat(block, policy=REMAT_POLICIES[model.remat], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast),
            out_axes=0,
            length=c.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x_BTD, outs = layers(c, self.attend, model.grouped, name="layers")(x_BTD, cache, layer, context)
        return _final_norm(c, "final_norm")(x_BTD), outs


def _embedded(table_VD: jax.Array, tokens_BT: jax.Array, model: ModelOptions) -> jax.Array:
    x_BTD = nn.with_logical_constraint(embed(table_VD, tokens_BT), ("rows", "tokens", "activation"))
    return x_BTD * jnp.asarray(model.config.hidden_size**0.5, model.dtype) if model.config.scale_embeddings else x_BTD


def _final_norm(config: ModelConfig, name: str | None = None) -> RMSNorm:
    return RMSNorm(config.rms_norm_eps, ("norm",), config.unit_offset, name=name)


def embedded(params: Params, tokens_BT: jax.Array, model: ModelOptions) -> jax.Array:
    """What the first layer reads, `[B, T, D]`."""
    return _embedded(params["embedding"].astype(model.dtype), tokens_BT, model)


def final_norm(params: Params, x_BTD: jax.Array, model: ModelOptions) -> jax.Array:
    """The final hidden states of what the last layer wrote."""
    normed: Any = _final_norm(model.config).apply({"params": params["final_norm"]}, x_BTD)
    return normed

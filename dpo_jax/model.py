"""The decoder: one Flax Linen module for the Llama family, every member by its `ModelConfig`.

Everything outside sees plain functions of `(params, batch)`: `hidden_states` for training rows, `decode` for sampling,
`unembedding` for the vocabulary projection. Parameters carry logical axis names; `sharding.py` maps them to a mesh.

Shapes: B rows, T tokens of a row, D model, F ffn, H query heads, G kv-heads, E head width, V vocabulary, L layers.
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

from dpo_jax.attention import Slots, apply_rotary, cached_attention, pair_row_attention, rotary_angles
from dpo_jax.errors import UserError

Params = Any  # a nested dict of arrays

MODEL_TYPES = ("llama", "mistral")
ROPE_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

# What the backward pass keeps of a layer; everything else is computed again.
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    # matrix products and attention are kept, the cheap element-wise work between them is not
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("attention_out"),
    ),
    "attention": jax.checkpoint_policies.save_only_these_names("q", "k", "v", "attention_out"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The numbers of a decoder, as a Hugging Face `config.json` names them."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, float | str], ...] = ()
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048

    def parameter_count(self) -> int:
        """Number of parameters, embeddings included."""
        D, E = self.hidden_size, self.head_dim
        layer = 2 * D * E * (self.num_attention_heads + self.num_key_value_heads) + 3 * D * self.intermediate_size
        tables = self.vocab_size * D * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * (layer + 2 * D) + tables + D


def config_from_hf(hf: dict[str, Any], where: str) -> ModelConfig:
    """Read a Hugging Face `config.json`.

    Args:
      hf: the parsed file.
      where: the file's name, for messages.

    Raises:
      UserError: an unsupported `model_type`, activation, bias or rope type, or a missing key.
    """
    model_type = hf.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(f"{where}: model_type={model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
    for key in ("attention_bias", "mlp_bias"):
        if hf.get(key):
            raise UserError(f"{where}: {key}=true is not supported for model_type={model_type!r}")
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act={hf['hidden_act']!r} is not supported; supported: silu")
    # Absent keys mean transformers' defaults, and Mistral's has a window (as Mistral 7B v0.1) and 8 kv-heads.
    if model_type == "mistral":
        hf = {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 4096 * 32} | hf
    # A window as wide as any sequence changes nothing, a narrower one would.
    if hf.get("sliding_window") and hf["sliding_window"] < hf.get("max_position_embeddings", 0):
        raise UserError(
            f"{where}: sliding_window={hf['sliding_window']} is not supported; set it to null in config.json if every "
            f"prompt + completion is shorter than {hf['sliding_window']} tokens: the results are then the same"
        )
    # transformers 5 writes rope_parameters; older files have rope_theta and rope_scaling beside each other.
    rope = dict(hf.get("rope_parameters") or {})
    scaling = dict(hf.get("rope_scaling") or {k: v for k, v in rope.items() if k != "rope_theta"})
    kind = scaling.get("rope_type", scaling.pop("type", None) or "default")
    scaling["rope_type"] = kind
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"{where}: rope type {kind!r} is not supported; supported: default, linear, llama3")
    missing = [k for k in ROPE_KEYS.get(kind, ()) if k not in scaling]
    if missing:
        raise UserError(f"{where}: rope type {kind!r} needs {', '.join(missing)} beside it")
    try:
        heads = int(hf["num_attention_heads"])
        return ModelConfig(
            model_type=model_type,
            vocab_size=int(hf["vocab_size"]),
            hidden_size=int(hf["hidden_size"]),
            intermediate_size=int(hf["intermediate_size"]),
            num_hidden_layers=int(hf["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(hf.get("num_key_value_heads") or heads),
            head_dim=int(hf.get("head_dim") or hf["hidden_size"] // heads),
            rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10000.0))),
            rope_scaling=() if kind == "default" else tuple(sorted(scaling.items())),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            max_position_embeddings=int(hf.get("max_position_embeddings", 2048)),
        )
    except KeyError as e:
        raise UserError(
            f"{where}: key {e.args[0]!r} is missing; is this a complete Hugging Face config.json?"
        ) from None


def _kernel(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], dtype) -> jax.Array:
    """A weight with logical axis names, drawn from N(0, 0.02²) as Llama's are, in the compute dtype."""
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)
    return jnp.asarray(module.param(name, init, shape, jnp.float32), dtype)


def _project(x: jax.Array, kernel: jax.Array, contracted: int = 1) -> jax.Array:
    """Contract the last `contracted` axes of `x` with the first ones of `kernel`, as one product of two matrices.

    With tokens as one axis the kernel's gradient contracts one axis too; over two, XLA transposes the activations
    first, which costs the backward pass on CPU a seventh of its time.
    """
    lead, outs = x.shape[: x.ndim - contracted], kernel.shape[contracted:]
    inner = math.prod(kernel.shape[:contracted])
    product = jnp.dot(x.reshape(math.prod(lead), inner), kernel.reshape(inner, math.prod(outs)))
    return product.reshape(*lead, *outs)


class RMSNorm(nn.Module):
    """Root-mean-square layer norm (Zhang & Sennrich 2019, arXiv 1910.07467), computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale_D = self.param("scale", init, (x_BTD.shape[-1],), jnp.float32)
        x = x_BTD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * jnp.asarray(scale_D, jnp.float32)[None, None, :]).astype(x_BTD.dtype)


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
        q_BTHE = apply_rotary(_project(x_BTD, wq_DHE), context["angles"])
        k_BTGE = apply_rotary(_project(x_BTD, wk_DGE), context["angles"])
        v_BTGE = _project(x_BTD, wv_DGE)
        q_BTHE = nn.with_logical_constraint(checkpoint_name(q_BTHE, "q"), ("rows", "tokens", "heads", "head_dim"))
        k_BTGE = nn.with_logical_constraint(checkpoint_name(k_BTGE, "k"), ("rows", "tokens", "kv_heads", "head_dim"))
        v_BTGE = nn.with_logical_constraint(checkpoint_name(v_BTGE, "v"), ("rows", "tokens", "kv_heads", "head_dim"))
        out_BTHE, cache = self.attend(q_BTHE, k_BTGE, v_BTGE, context, cache)
        out_BTHE = nn.with_logical_constraint(out_BTHE, ("rows", "tokens", "heads", "head_dim"))
        out_BTHE = checkpoint_name(out_BTHE, "attention_out")
        return _project(out_BTHE, wo_HED, contracted=2), cache


class Mlp(nn.Module):
    """Gated feed-forward layer: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        D, F, dtype = self.config.hidden_size, self.config.intermediate_size, x_BTD.dtype
        gate_DF = _kernel(self, "gate", (D, F), ("embed", "mlp"), dtype)
        up_DF = _kernel(self, "up", (D, F), ("embed", "mlp"), dtype)
        down_FD = _kernel(self, "down", (F, D), ("mlp", "embed"), dtype)
        x_BTF = nn.silu(_project(x_BTD, gate_DF)) * _project(x_BTD, up_DF)
        x_BTF = nn.with_logical_constraint(x_BTF, ("rows", "tokens", "mlp"))
        return _project(x_BTF, down_FD)


class Block(nn.Module):
    """One decoder layer: pre-norm attention and pre-norm feed-forward, each with a residual."""

    config: ModelConfig
    attend: Callable

    @nn.compact
    def __call__(self, x_BTD: jax.Array, cache: Any, context: dict[str, Any]) -> tuple[jax.Array, Any]:
        eps = self.config.rms_norm_eps
        x_BTD = nn.with_logical_constraint(x_BTD, ("rows", "tokens", "activation"))
        normed = RMSNorm(eps, name="input_norm")(x_BTD)
        update, cache = Attention(self.config, self.attend, name="attention")(normed, context, cache)
        x_BTD = x_BTD + update
        x_BTD = x_BTD + Mlp(self.config, name="mlp")(RMSNorm(eps, name="post_attention_norm")(x_BTD))
        return nn.with_logical_constraint(x_BTD, ("rows", "tokens", "activation")), cache


class Decoder(nn.Module):
    """Token ids to final hidden states. Layers are scanned, so compile time does not grow with depth."""

    config: ModelConfig
    attend: Callable
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, context: dict[str, Any], cache: Any = None) -> tuple[jax.Array, Any]:
        c = self.config
        table_VD = _kernel(self, "embedding", (c.vocab_size, c.hidden_size), ("vocab", "embed"), self.dtype)
        if not c.tie_word_embeddings:
            # Read by `unembedding`, outside this module: the projection runs on completion tokens only.
            _kernel(self, "lm_head", (c.vocab_size, c.hidden_size), ("vocab", "embed"), self.dtype)
        # Rows come out spread over the axis over which the table's columns are: gathered whole first, once.
        table_VD = nn.with_logical_constraint(table_VD, ("vocab", "activation"))
        x_BTD = nn.with_logical_constraint(jnp.take(table_VD, tokens_BT, axis=0), ("rows", "tokens", "activation"))
        block: Any = Block
        if REMAT_POLICIES[self.remat] is not None:
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            out_axes=0,
            length=c.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x_BTD, cache = layers(c, self.attend, name="layers")(x_BTD, cache, context)
        return RMSNorm(c.rms_norm_eps, name="final_norm")(x_BTD), cache


def _angles(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    return rotary_angles(positions_BT, head_dim=config.head_dim, theta=config.rope_theta, scaling=config.rope_scaling)


def hidden_states(
    params: Params, batch: dict[str, jax.Array], *, config: ModelConfig, slots: Slots, dtype=jnp.float32, remat="none"
) -> jax.Array:
    """Final hidden states of pair rows.

    Args:
      params: the decoder's parameters.
      batch: `tokens`, `positions`, `segments`, int32 `[B, T]` each, laid out as `attention.py` says.
      config, slots: the model's and the row's numbers.
      dtype: dtype of activations and matrix products.
      remat: a name in `REMAT_POLICIES`.

    Returns:
      `[B, T, D]` in `dtype`.
    """

    def attend(q, k, v, context, cache):
        return pair_row_attention(q, k, v, context["segments"], slots=slots), cache

    context = {"angles": _angles(config, batch["positions"]), "segments": batch["segments"]}
    return Decoder(config, attend, dtype, remat).apply({"params": params}, batch["tokens"], context)[0]


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
        return cached_attention(q, k, v, cache, context["where"], context["real"])

    context = {"angles": _angles(config, positions_BT), "where": where, "real": real_BS}
    return Decoder(config, attend, dtype).apply({"params": params}, tokens_BT, context, cache)


def empty_cache(config: ModelConfig, rows: int, length: int, dtype=jnp.float32) -> tuple[jax.Array, jax.Array]:
    """Keys and values `[L, B, S, G, E]` of zeros."""
    shape = (config.num_hidden_layers, rows, length, config.num_key_value_heads, config.head_dim)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)


def unembedding(params: Params) -> jax.Array:
    """The vocabulary projection `[V, D]`: the embedding itself where they are tied. Gathered once for all chunks."""
    return nn.with_logical_constraint(params.get("lm_head", params["embedding"]), ("vocab", "activation"))


@functools.cache
def _init_module(config: ModelConfig) -> tuple[Decoder, Slots]:
    slots = Slots(1, 1, 1)

    def attend(q, k, v, context, cache):
        return pair_row_attention(q, k, v, context["segments"], slots=slots), cache

    return Decoder(config, attend), slots


def init_params(key: jax.Array, config: ModelConfig) -> Params:
    """Fresh float32 parameters with their logical axis names (`nn.LogicallyPartitioned` leaves)."""
    module, slots = _init_module(config)
    ids = jnp.zeros((1, slots.total), jnp.int32)
    context = {"angles": _angles(config, ids), "segments": ids}
    return module.init(key, ids, context)["params"]

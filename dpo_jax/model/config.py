"""The numbers of a decoder: a Hugging Face `config.json` ↔ `ModelConfig`.

`FAMILIES` says per `model_type` what the family fixes, which keys are read, and what an absent key means (what
transformers means by it). Reading and writing use the same table. What cannot be computed exactly is refused by name.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from dpo_jax.errors import UserError

ACTIVATIONS: dict[str, Callable] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
# Rope types and the keys that they need.
ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings", "attention_factor"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The numbers of a decoder, named as in a `config.json` where it has them. The defaults are Llama's.

    Attributes:
      intermediate_size: of the feed-forward layer, or of one expert.
      attention_bias, output_bias: a bias on q, k and v; on the projection after attention.
      qk_norm: queries and keys are normalised per "head", or over the whole "projection".
      norms: "pre" normalises what a sub-layer reads, "post" what it writes, "both" does both.
      unit_offset: norms multiply by 1 + w.
      query_pre_attn_scalar: scores are divided by its root; None is `head_dim`.
      sliding_window: positions that a token of a sliding layer sees, itself included; 0 is all.
      sliding_layers: which layers slide; empty if none does.
      rope_local_theta: of the sliding layers, where they have a rope of their own (never scaled).
      num_experts: 0 is a dense feed-forward layer.
      lora_scale: what adapters are multiplied by, where the parameters hold some (`lora.py`).
    """

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
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    hidden_act: str = "silu"
    attention_bias: bool = False
    output_bias: bool = False
    qk_norm: str = ""
    norms: str = "pre"
    unit_offset: bool = False
    scale_embeddings: bool = False
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int = 0
    sliding_layers: tuple[bool, ...] = ()
    rope_local_theta: float | None = None
    partial_rotary_factor: float = 1.0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.0
    lora_scale: float = 1.0

    def parameter_count(self) -> int:
        """Number of parameters, embeddings included."""
        return self._parameters(max(1, self.num_experts))

    def active_parameter_count(self) -> int:
        """Number of parameters that one token meets: of the experts those that it is sent to."""
        return self._parameters(self.num_experts_per_tok if self.num_experts else 1)

    def slides_within(self, reach: int) -> bool:
        """Whether sequences of `reach` tokens go beyond the window of some layer."""
        return 0 < self.sliding_window < reach

    def _parameters(self, experts: int) -> int:
        D, E, H, G = self.hidden_size, self.head_dim, self.num_attention_heads, self.num_key_value_heads
        attention = 2 * D * E * (H + G) + self.attention_bias * E * (H + 2 * G) + self.output_bias * D
        attention += {"": 0, "head": 2 * E, "projection": E * (H + G)}[self.qk_norm]
        mlp = 3 * D * self.intermediate_size * experts + D * self.num_experts
        norms = D * (4 if self.norms == "both" else 2)
        tables = self.vocab_size * D * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * (attention + mlp + norms) + tables + D


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
      architecture: the transformers class of a model of this family.
      fixed: fields of `ModelConfig` that the family fixes.
      keys: keys of its config.json and the fields (several: with blanks between) that they set.
      aliases: other names that some versions write for a key.
      defaults: what an absent key means.
      refused: keys that must be absent, null or this value.
      sliding: whether a layer slides, by (the parsed file, layer); None: the family has no window.
      layer_types: the file's own `layer_types`, where there, say which layers slide.
      partial_rotary: only the first part of a head may be rotated.
    """

    architecture: str
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sliding: Callable[[Mapping[str, Any], int], bool] | None = None
    layer_types: bool = False
    partial_rotary: bool = False


_ACT = {"intermediate_size": "intermediate_size", "hidden_act": "hidden_act"}
_BIAS = {"attention_bias": "attention_bias output_bias"}
_EXPERTS = {"num_experts_per_tok": "num_experts_per_tok", "router_aux_loss_coef": "router_aux_loss_coef"}
_GEMMA_KEYS = _BIAS | {
    "intermediate_size": "intermediate_size",
    "hidden_activation": "hidden_act",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GEMMA_FIXED = {"norms": "both", "unit_offset": True, "scale_embeddings": True}
_NO_BIAS = {"attention_bias": False, "mlp_bias": False}
# What an absent key means.
_LLAMA: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "rms_norm_eps": 1e-6}
_QWEN = _LLAMA | {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "head_dim": 256, "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
}  # fmt: skip


def _always(_: Mapping[str, Any], layer: int) -> bool:
    return True


def _upper_layers(hf: Mapping[str, Any], layer: int) -> bool:
    return layer >= hf["max_window_layers"]


def _all_but_every(hf: Mapping[str, Any], layer: int) -> bool:
    return bool((layer + 1) % hf["sliding_window_pattern"])


FAMILIES = {
    "llama": Family("LlamaForCausalLM", keys=_ACT | _BIAS, defaults=_LLAMA, refused={"mlp_bias": False}),
    "mistral": Family(
        "MistralForCausalLM",
        keys=_ACT,
        defaults=_LLAMA | {"sliding_window": 4096, "num_key_value_heads": 8},
        refused=_NO_BIAS,
        sliding=_always,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        fixed={"attention_bias": True},
        keys=_ACT,
        defaults=_QWEN | {"num_key_value_heads": 32},
        sliding=_upper_layers,
        layer_types=True,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        fixed={"qk_norm": "head"},
        keys=_ACT | _BIAS,
        defaults=_QWEN | {"num_key_value_heads": 32, "head_dim": 128},
        sliding=_upper_layers,
        layer_types=True,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        fixed=_GEMMA_FIXED,
        keys=_GEMMA_KEYS | {"attn_logit_softcapping": "attn_logit_softcapping"},
        defaults=_GEMMA
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window_pattern": 2},
        refused={"use_bidirectional_attention": False},
        sliding=_all_but_every,
        layer_types=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        fixed=_GEMMA_FIXED | {"qk_norm": "head"},
        keys=_GEMMA_KEYS | {"rope_local_base_freq": "rope_local_theta"},
        defaults=_GEMMA
        | {"final_logit_softcapping": None, "sliding_window_pattern": 6}
        | {"rope_theta": 1e6, "rope_local_base_freq": 10000.0},
        refused={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
        sliding=_all_but_every,
        layer_types=True,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        fixed={"norms": "post", "qk_norm": "projection"},
        keys=_ACT | _BIAS,
        defaults=_LLAMA | {"rms_norm_eps": 1e-5},
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        keys=_ACT,
        defaults=_LLAMA | {"rms_norm_eps": 1e-5, "sliding_window": None, "original_max_position_embeddings": 4096},
        refused=_NO_BIAS,
        sliding=_always,
        partial_rotary=True,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        keys=_ACT | _EXPERTS | {"num_local_experts": "num_experts"},
        defaults=_LLAMA
        | {"rms_norm_eps": 1e-5, "sliding_window": None, "num_key_value_heads": 8, "rope_theta": 1e6}
        | {"num_experts_per_tok": 2, "num_local_experts": 8, "router_aux_loss_coef": 0.001},
        refused=_NO_BIAS,
        sliding=_always,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        fixed={"qk_norm": "head"},
        keys=_BIAS
        | _EXPERTS
        | {"moe_intermediate_size": "intermediate_size", "hidden_act": "hidden_act"}
        | {"num_experts": "num_experts", "norm_topk_prob": "norm_topk_prob"},
        aliases={"num_local_experts": "num_experts"},  # transformers 5
        defaults=_QWEN
        | {"num_experts_per_tok": 8, "num_experts": 128, "router_aux_loss_coef": 0.001, "norm_topk_prob": False}
        | {"moe_intermediate_size": 768, "num_key_value_heads": 4},
        # Layers of different parameters cannot be scanned as one: all have experts, as in every published checkpoint.
        refused={"decoder_sparse_step": 1, "mlp_only_layers": []},
        sliding=_always,
    ),
}


def config_from_hf(hf: Mapping[str, Any], where: str) -> ModelConfig:
    """Read a Hugging Face `config.json`.

    Args:
      hf: the parsed file.
      where: the file's name, for messages.

    Raises:
      UserError: what is not supported (`model_type`, activation, rope type, ...), or a missing key.
    """
    model_type = hf.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(f"{where}: model_type={model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    hf = {**family.defaults, **{family.aliases.get(key, key): value for key, value in hf.items()}}
    _refuse(hf, family, where)
    try:
        heads = int(hf["num_attention_heads"])
        values = {
            "model_type": model_type,
            "vocab_size": int(hf["vocab_size"]),
            "hidden_size": int(hf["hidden_size"]),
            "num_hidden_layers": int(hf["num_hidden_layers"]),
            "num_attention_heads": heads,
            "num_key_value_heads": int(hf.get("num_key_value_heads") or heads),
            "head_dim": int(hf.get("head_dim") or hf["hidden_size"] // heads),
            "rms_norm_eps": float(hf["rms_norm_eps"]),
            "tie_word_embeddings": bool(hf.get("tie_word_embeddings", False)),
            "max_position_embeddings": int(hf.get("max_position_embeddings", 2048)),
        }
        values |= {field: hf[key] for key, fields in family.keys.items() for field in fields.split()}
        values |= family.fixed
    except KeyError as e:
        raise UserError(
            f"{where}: key {e.args[0]!r} is missing; is this a complete Hugging Face config.json?"
        ) from None
    values |= _windows(hf, family, where) | _rope(hf, family, values, where)
    if values["hidden_act"] not in ACTIVATIONS:
        raise UserError(
            f"{where}: hidden_act={values['hidden_act']!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    return ModelConfig(**values)


def _refuse(hf: Mapping[str, Any], family: Family, where: str) -> None:
    kind = f"for model_type={hf['model_type']!r}"
    for key, accepted in family.refused.items():
        if hf.get(key) is not None and hf[key] != accepted:
            raise UserError(f"{where}: {key}={hf[key]!r} is not supported {kind}; supported: {accepted!r}")
    if hf.get("quantization_config"):
        raise UserError(
            f"{where}: quantization_config: quantized checkpoints are not supported; use the unquantized one"
        )


def _windows(hf: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Which layers slide, and how far they see."""
    if family.sliding is None:
        return {}
    window, count = int(hf.get("sliding_window") or 0), int(hf["num_hidden_layers"])
    if not hf.get("use_sliding_window", True):
        window = 0
    if family.layer_types and hf.get("layer_types"):
        names = hf["layer_types"]
        unknown = set(names) - {"sliding_attention", "full_attention"}
        if unknown or len(names) != count:
            found = repr(sorted(unknown)[0]) if unknown else f"{len(names)} entries for {count} layers"
            raise UserError(f"{where}: layer_types: {found}; needs sliding_attention or full_attention for every layer")
        layers = tuple(name == "sliding_attention" for name in names)
        if any(layers) and not window:
            raise UserError(f"{where}: layer_types names sliding_attention but sliding_window is off; set it")
    else:
        layers = tuple(bool(window) and family.sliding(hf, i) for i in range(count))
    return {"sliding_window": window, "sliding_layers": layers} if any(layers) else {}


def _rope(hf: Mapping[str, Any], family: Family, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Rotary embedding of all layers, and of the sliding ones where they have their own.

    transformers 5 writes rope_parameters, for Gemma 3 one per layer type; older files have rope_theta and rope_scaling
    beside each other.
    """
    rope = dict(hf.get("rope_parameters") or {})
    found: dict[str, Any] = {}
    if "rope_local_base_freq" in family.keys and ("full_attention" in rope or "sliding_attention" in rope):
        local, rope = dict(rope.get("sliding_attention") or {}), dict(rope.get("full_attention") or {})
        if local.get("rope_type", "default") != "default":
            raise UserError(
                f"{where}: rope type {local['rope_type']!r} of sliding_attention is not supported; supported: default"
            )
        found["rope_local_theta"] = float(local.get("rope_theta", hf["rope_local_base_freq"]))
    theta = float(rope.pop("rope_theta", None) or hf.get("rope_theta", 10000.0))
    scaling = dict(hf.get("rope_scaling") or rope)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if hf["model_type"] == "phi3" and kind in ("su", "yarn"):  # what longrope was called in the first files
        kind = "longrope"
    if kind not in ROPE_KEYS:
        raise UserError(f"{where}: rope type {kind!r} is not supported; supported: {', '.join(ROPE_KEYS)}")
    partial = scaling.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    if partial != 1 and not family.partial_rotary:
        able = ", ".join(name for name, one in FAMILIES.items() if one.partial_rotary)
        raise UserError(f"{where}: partial_rotary_factor={partial} is not supported; supported for: {able}")
    if kind == "longrope":
        scaling = _longrope(hf, scaling, int(values["head_dim"] * partial) // 2, where)
    missing = [k for k in ROPE_KEYS[kind] if k not in scaling]
    if missing:
        raise UserError(f"{where}: rope type {kind!r} needs {', '.join(missing)} beside it")
    kept = {key: scaling[key] for key in ROPE_KEYS[kind]} | {"rope_type": kind}
    kept = {key: tuple(value) if isinstance(value, list) else value for key, value in kept.items()}
    rope_scaling = () if kind == "default" else tuple(sorted(kept.items()))
    return found | {"rope_theta": theta, "rope_scaling": rope_scaling, "partial_rotary_factor": float(partial)}


def _longrope(hf: Mapping[str, Any], scaling: dict[str, Any], pairs: int, where: str) -> dict[str, Any]:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753) with its attention factor worked out."""
    original = hf.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
    if original is None:
        return scaling
    for key in ("short_factor", "long_factor"):
        if len(scaling.get(key, [0.0] * pairs)) != pairs:
            raise UserError(f"{where}: {key} has {len(scaling[key])} numbers, the model's heads need {pairs}")
    factor = scaling.get("factor") or hf["max_position_embeddings"] / original
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    attention = scaling.get("attention_factor")
    return scaling | {
        "original_max_position_embeddings": original,
        "attention_factor": default if attention is None else attention,
    }


def hf_config(
    config: ModelConfig, *, bos_token_id: int | None = None, eos_token_id: int | None = None, dtype: str = "float32"
) -> dict[str, Any]:
    """The config.json of a model made from scratch, with the keys that every version of transformers reads.

    Generation ends at `eos_token_id`: give the tokenizer's, also to a `save` of this model.
    """
    c, family = config, FAMILIES[config.model_type]
    hf: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": c.model_type,
        "initializer_range": 0.02,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        "torch_dtype": dtype,
        "rope_theta": c.rope_theta,
        "rope_scaling": {k: list(v) if isinstance(v, tuple) else v for k, v in c.rope_scaling} or None,
    }
    common = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings",
    )  # fmt: skip
    hf |= {key: getattr(c, key) for key in common}
    hf |= {key: getattr(c, fields.split()[0]) for key, fields in family.keys.items()}
    hf |= {key: accepted for key, accepted in family.refused.items() if accepted is not None}
    if family.sliding is not None:
        hf["sliding_window"] = c.sliding_window or None  # left out, some have one
    if "use_sliding_window" in family.defaults:
        hf["use_sliding_window"] = bool(c.sliding_window)
    if family.layer_types:
        slides = c.sliding_layers or (False,) * c.num_hidden_layers
        hf["layer_types"] = ["sliding_attention" if s else "full_attention" for s in slides]
    if family.partial_rotary:
        hf["partial_rotary_factor"] = c.partial_rotary_factor
        original = dict(c.rope_scaling).get("original_max_position_embeddings", c.max_position_embeddings)
        hf["original_max_position_embeddings"] = original
    return hf

"""Model families: a Hugging Face `config.json` ↔ `ModelConfig`.

`FAMILIES` has, per `model_type`, what the family fixes and which keys of its file set which numbers, for reading and
writing alike. What an absent key means, and what older files call it, is left to transformers' config class of the
family. What cannot be computed exactly is refused by name.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from dpo_jax.disk import check_shape
from dpo_jax.errors import UserError
from dpo_jax.model.config import ACTIVATIONS, ModelConfig
from dpo_jax.model.config_file import ConfigFile

_ORIGINAL = "original_max_position_embeddings"
# Rope types and the keys that they need.
ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "longrope": ("short_factor", "long_factor", _ORIGINAL, "attention_factor"),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
      architecture: the transformers class of a model of this family.
      classifier: the class of a reward model of this family; empty: named after `architecture`.
      fixed: fields of `ModelConfig` that the family fixes.
      keys: keys of its config.json and the fields (several: with blanks between) that they set.
      aliases: other names that some versions write for a key.
      refused: keys that must be absent, null or this value.
      windows: which layers have a sliding window where the file switches one on: "all", those that "layer_types" names,
        or "none".
      partial_rotary: only the first part of a head may be rotated.
    """

    architecture: str
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    windows: str = "none"
    partial_rotary: bool = False
    classifier: str = ""


_ACT = {"hidden_act": "hidden_act"}
_BIAS = {"attention_bias": "attention_bias output_bias"}
_EXPERTS = {"num_experts_per_tok": "num_experts_per_tok", "router_aux_loss_coef": "router_aux_loss_coef"}
_GEMMA_KEYS = _BIAS | {
    "hidden_activation": "hidden_act",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GEMMA_FIXED = {"norms": "both", "unit_offset": True, "scale_embeddings": True}
_NO_BIAS = {"attention_bias": False, "mlp_bias": False}

FAMILIES = {
    "llama": Family("LlamaForCausalLM", keys=_ACT | _BIAS, refused={"mlp_bias": False}),
    "mistral": Family("MistralForCausalLM", keys=_ACT, refused=_NO_BIAS, windows="all"),
    "qwen2": Family("Qwen2ForCausalLM", fixed={"attention_bias": True}, keys=_ACT, windows="layer_types"),
    "qwen3": Family("Qwen3ForCausalLM", fixed={"qk_norm": "head"}, keys=_ACT | _BIAS, windows="layer_types"),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        fixed=_GEMMA_FIXED,
        keys=_GEMMA_KEYS | {"attn_logit_softcapping": "attn_logit_softcapping"},
        refused={"use_bidirectional_attention": False},
        windows="layer_types",
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        fixed=_GEMMA_FIXED | {"qk_norm": "head"},
        keys=_GEMMA_KEYS,
        refused={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
        windows="layer_types",
        classifier="Gemma3TextForSequenceClassification",
    ),
    "olmo2": Family("Olmo2ForCausalLM", fixed={"norms": "post", "qk_norm": "projection"}, keys=_ACT | _BIAS),
    "phi3": Family("Phi3ForCausalLM", keys=_ACT, refused=_NO_BIAS, windows="all", partial_rotary=True),
    "mixtral": Family(
        "MixtralForCausalLM",
        keys=_ACT | _EXPERTS | {"num_local_experts": "num_experts"},
        refused=_NO_BIAS,
        windows="all",
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        fixed={"qk_norm": "head"},
        keys=_BIAS
        | _EXPERTS
        | {"moe_intermediate_size": "intermediate_size"}
        | _ACT
        | {"num_experts": "num_experts", "norm_topk_prob": "norm_topk_prob"},
        aliases={"num_local_experts": "num_experts"},  # transformers 5
        # Layers of different parameters cannot be scanned as one: all have experts, as in every published checkpoint.
        refused={"decoder_sparse_step": 1, "mlp_only_layers": []},
        windows="all",
    ),
}

# Keys of every family that are fields of `ModelConfig` too; a file without the first five is not complete.
_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_COMMON = (
    *_NEEDED, "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings",
)  # fmt: skip
_NEVER_NULL = ("rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "hidden_act", "attention_bias")
_WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern", "layer_types")
_ROPES = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")


def config_from_hf(hf: Mapping[str, Any], where: str) -> ModelConfig:
    """Read a parsed Hugging Face `config.json`, which messages call `where`.

    Raises:
      UserError: what is not supported (`model_type`, activation, rope type, ...), a missing key, or a senseless value.
    """
    check_shape(hf, ConfigFile, where, "mend the key, or fetch the model again")
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"{where}: model_type={model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # slow to import

    family = FAMILIES[model_type]
    nulls = [key for key in family.aliases if key in hf and hf[key] is None]
    hf = {family.aliases.get(key, key): value for key, value in hf.items()}
    try:
        if nulls:
            raise _is_null(nulls[0])
        _refuse(hf, family)
        c = _as_transformers(hf, family, CONFIG_MAPPING[model_type])
        kinds = {"rms_norm_eps": float, "tie_word_embeddings": bool}
        values: dict[str, Any] = {key: kinds.get(key, int)(getattr(c, key)) for key in _COMMON}
        values |= {field: getattr(c, key) for key, fields in family.keys.items() for field in fields.split()}
        values |= {"model_type": model_type, **family.fixed, **_windows(hf, c, family), **_rope(hf, c, family)}
        if values["hidden_act"] not in ACTIVATIONS:
            raise UserError(
                f"hidden_act={values['hidden_act']!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
            )
        config = ModelConfig(**values)
        _refuse_heads(config, hf)
        return config
    except Exception as e:  # a value of a wrong type or size, met here or in transformers
        words = str(e) if isinstance(e, UserError) else f"not a {model_type} model's numbers ({type(e).__name__}: {e})"
        raise UserError(f"{where}: {' '.join(words.split())}") from None


def _refuse_heads(config: ModelConfig, hf: Mapping[str, Any]) -> None:
    """What no single key shows: numbers that do not fit each other."""
    c = config
    width, left = divmod(c.hidden_size, c.num_attention_heads)
    if hf.get("head_dim") is None and c.head_dim == width and left:
        raise UserError(f"hidden_size={c.hidden_size} does not divide over num_attention_heads={c.num_attention_heads}")
    if c.num_attention_heads % c.num_key_value_heads:
        raise UserError(
            f"num_attention_heads={c.num_attention_heads} does not divide over "
            f"num_key_value_heads={c.num_key_value_heads}"
        )
    if (rotated := int(c.head_dim * c.partial_rotary_factor)) % 2 or not rotated:
        raise UserError(f"head_dim={c.head_dim}: a rotary embedding needs an even number of channels")
    if c.num_experts and c.num_experts_per_tok > c.num_experts:
        raise UserError(f"num_experts_per_tok={c.num_experts_per_tok} is more than the {c.num_experts} experts")
    scaling = dict(c.rope_scaling)
    if scaling.get("rope_type") == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError(
            f"rope type 'llama3': low_freq_factor={scaling['low_freq_factor']:g} must be below "
            f"high_freq_factor={scaling['high_freq_factor']:g}"
        )


def _refuse(hf: Mapping[str, Any], family: Family) -> None:
    kind = f"for model_type={hf['model_type']!r}"
    for key, accepted in family.refused.items():
        if hf.get(key) is not None and hf[key] != accepted:
            raise UserError(f"{key}={hf[key]!r} is not supported {kind}; supported: {accepted!r}")
    if hf.get("quantization_config"):
        raise UserError("quantization_config: quantized checkpoints are not supported; use the unquantized one")
    for key in _NEEDED:
        if key not in hf and not (key == "intermediate_size" and "moe_intermediate_size" in family.keys):
            raise UserError(f"key {key!r} is missing; is this a complete Hugging Face config.json?")
    for key in (*_NEEDED, *(("partial_rotary_factor",) if family.partial_rotary else ())):
        if key in hf and hf[key] is None:
            raise _is_null(key)
    names = hf.get("layer_types") or [] if family.windows == "layer_types" else []
    unknown = set(names) - {"sliding_attention", "full_attention"}
    if unknown or (names and len(names) != hf["num_hidden_layers"]):
        wrong = repr(sorted(unknown)[0]) if unknown else f"{len(names)} entries for {hf['num_hidden_layers']} layers"
        raise UserError(f"layer_types: {wrong}; needs sliding_attention or full_attention for every layer")


def _as_transformers(hf: Mapping[str, Any], family: Family, make: Any) -> Any:
    """The file as transformers' config class `make` reads it: absent keys filled in, a rope of any version in one form.

    Only keys that are used here reach the class, and no code of the checkpoint's author ever runs.
    """
    hf = copy.deepcopy(dict(hf))  # transformers writes into what it is given
    taken = (*_COMMON, *_WINDOWS, *family.keys, *((_ORIGINAL,) if family.partial_rotary else ()))
    default = functools.partial(getattr, make())
    values = {key: _as_number(hf[key], default(key, None)) for key in taken if key in hf}
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    for key, value in (("num_key_value_heads", heads), ("head_dim", width // heads)):  # not every class derives them
        if values.get(key, default(key, None)) is None:
            values[key] = value
    made = functools.partial(make, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    _refuse_nulls(hf, [*taken, *family.refused], values, made)
    c = made(**values)
    # Afterwards, as the class would refuse ropes that lack a key with words of its own.
    ropes = {"partial_rotary_factor": 1.0} | {key: hf[key] for key in _ROPES if hf.get(key) is not None}
    c.rope_parameters = hf.get("rope_parameters")
    if "rope_scaling" in ropes:
        ropes["rope_scaling"].setdefault("rope_type", ropes["rope_scaling"].get("type", "default"))
    c.convert_rope_params_to_dict(**ropes)
    return c


def _refuse_nulls(hf: Mapping[str, Any], keys: Iterable[str], values: Mapping[str, Any], make: Any) -> None:
    """Refuse, by its name, a key that is null where the class takes no null; elsewhere it knows what null means."""
    nulls = [key for key in dict.fromkeys(keys) if key in hf and hf[key] is None and hasattr(make(), key)]
    there = {key: value for key, value in values.items() if value is not None}
    for key in nulls:
        if values.get(key) is not None:  # derived from others
            there.pop(key, None)
        try:
            kept = getattr(make(**there, **{key: None}), key)
        except Exception:  # transformers' own kinds of errors
            raise _is_null(key) from None
        if kept is None and key in _NEVER_NULL:
            raise _is_null(key)


def _is_null(key: str) -> UserError:
    return UserError(f"key {key!r} is null; give it its value, or leave it out where transformers' default is meant")


def _as_number(value: Any, like: Any) -> Any:
    """A whole number as a float and the other way round, as the class asks for the one or the other."""
    same = {type(value), type(like)} == {int, float} and type(like)(value) == value
    return type(like)(value) if same else value


def _windows(hf: Mapping[str, Any], theirs: Any, family: Family) -> dict[str, Any]:
    """Which layers slide, and how far they see."""
    if family.windows == "none":
        return {}
    window, named = theirs.sliding_window, family.windows == "layer_types"
    kinds = theirs.layer_types if named else ["sliding_attention"] * theirs.num_hidden_layers
    layers = tuple(kind == "sliding_attention" for kind in kinds)
    if any(layers) and not window and named and hf.get("layer_types"):
        raise UserError("layer_types names sliding_attention but sliding_window is off; set it")
    return {"sliding_window": window, "sliding_layers": layers} if any(layers) and window else {}


def _rope(hf: Mapping[str, Any], theirs: Any, family: Family) -> dict[str, Any]:
    """Rotary embedding of all layers, and of the sliding ones where they have their own (Gemma 3)."""
    rope: dict[str, Any] = theirs.rope_parameters
    values: dict[str, Any] = {}
    if theirs.model_type == "gemma3_text":
        local, rope = rope["sliding_attention"], rope["full_attention"]
        if local.get("rope_theta") is None:
            raise _is_null("rope_theta")
        if (kind := local["rope_type"]) != "default":
            raise UserError(f"rope type {kind!r} of sliding_attention is not supported; supported: default")
        values["rope_local_theta"] = float(local["rope_theta"])
    if rope.get("rope_theta") is None:
        raise _is_null("rope_theta")
    kind = rope["rope_type"]
    partial = rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    if kind not in ROPE_KEYS:
        raise UserError(f"rope type {kind!r} is not supported; supported: {', '.join(ROPE_KEYS)}")
    if partial != 1 and not family.partial_rotary:
        able = ", ".join(name for name, one in FAMILIES.items() if one.partial_rotary)
        raise UserError(f"partial_rotary_factor={partial} is not supported; supported for: {able}")
    if kind == "longrope":
        rope = _longrope(theirs, rope, int(theirs.head_dim * partial) // 2)
    missing = [key for key in ROPE_KEYS[kind] if rope.get(key) is None]
    if missing:
        raise UserError(f"rope type {kind!r} needs {', '.join(missing)} beside it")
    kept = {key: tuple(rope[key]) if isinstance(rope[key], list) else rope[key] for key in ROPE_KEYS[kind]}
    values["rope_scaling"] = () if kind == "default" else tuple(sorted({**kept, "rope_type": kind}.items()))
    return values | {"rope_theta": float(rope["rope_theta"]), "partial_rotary_factor": float(partial)}


def _longrope(theirs: Any, rope: Mapping[str, Any], pairs: int) -> dict[str, Any]:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753) with its attention factor worked out."""
    original = getattr(theirs, _ORIGINAL, None) or rope[_ORIGINAL]
    for key in ("short_factor", "long_factor"):
        if len(rope.get(key, [0.0] * pairs)) != pairs:
            raise UserError(f"{key} has {len(rope[key])} numbers, the model's heads need {pairs}")
    factor, attention = rope.get("factor") or theirs.max_position_embeddings / original, rope.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {**rope, _ORIGINAL: original, "attention_factor": attention}


def hf_config(
    config: ModelConfig, *, bos_token_id: int | None = None, eos_token_id: int | None = None, dtype: str = "float32"
) -> dict[str, Any]:
    """The config.json of a model made from scratch, with the keys that every version of transformers reads.

    Generation ends at `eos_token_id`: give the tokenizer's, also to a `save_weights` of this model.
    """
    c, family = config, FAMILIES[config.model_type]
    hf: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": c.model_type,
        "initializer_range": c.initializer_range,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        "torch_dtype": dtype,
        "rope_theta": c.rope_theta,
        "rope_scaling": {k: list(v) if isinstance(v, tuple) else v for k, v in c.rope_scaling} or None,
    }
    hf |= {key: getattr(c, key) for key in _COMMON}
    hf |= {key: getattr(c, fields.split()[0]) for key, fields in family.keys.items()}
    hf |= {key: accepted for key, accepted in family.refused.items() if accepted is not None}
    if family.windows != "none":
        hf["sliding_window"] = c.sliding_window or None  # left out, some have one
    if c.model_type.startswith("qwen"):
        hf["use_sliding_window"] = bool(c.sliding_window)
    if family.windows == "layer_types":
        slides = c.sliding_layers or (False,) * c.num_hidden_layers
        hf["layer_types"] = ["sliding_attention" if s else "full_attention" for s in slides]
    if c.rope_local_theta is not None:
        hf["rope_local_base_freq"] = c.rope_local_theta
    if family.partial_rotary:
        hf["partial_rotary_factor"] = c.partial_rotary_factor
        hf[_ORIGINAL] = dict(c.rope_scaling).get(_ORIGINAL, c.max_position_embeddings)
    return hf


def classifier_config(hf: Mapping[str, Any], pad_token_id: int | None) -> dict[str, Any]:
    """The config.json of a reward model over the model of `hf`: transformers' sequence classifier with one label.

    `pad_token_id`: its score is that of the last token of another id; None: of the last token.
    """
    family = FAMILIES[hf["model_type"]]
    named = family.classifier or family.architecture.replace("ForCausalLM", "ForSequenceClassification")
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return dict(hf) | {"architectures": [named], "pad_token_id": pad_token_id} | labels

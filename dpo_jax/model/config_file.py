"""What a Hugging Face `config.json` may hold: a shape for `disk.check_shape`, of all keys that are read of it.

Bounds are far beyond every published model: they keep a number computable, and what follows from it small.
"""

from typing import Annotated, Any

from annotated_types import Interval, Len
from pydantic import BeforeValidator
from typing_extensions import TypedDict


def _whole(value: Any) -> Any:
    """A whole number that is written as a float."""
    return int(value) if type(value) is float and value.is_integer() else value


def _listed(value: Any) -> Any:
    """One of several as a list of one."""
    return value if value is None or isinstance(value, list) else [value]


Id = Annotated[int, Interval(ge=-1, le=2**31 - 1)]  # of a token; -1: there is none
Ids = Annotated[Annotated[list[Id], Len(0, 4096)] | None, BeforeValidator(_listed)]
_Layers = Annotated[int, BeforeValidator(_whole), Interval(ge=1, le=4096)]
_Width = Annotated[int, BeforeValidator(_whole), Interval(ge=1, le=2**20)]
_Rows = Annotated[int, BeforeValidator(_whole), Interval(ge=1, le=2**24)]
_Heads = Annotated[int, BeforeValidator(_whole), Interval(ge=1, le=2**12)]
_Experts = Annotated[int, BeforeValidator(_whole), Interval(ge=1, le=2**12)]
_Positions = Annotated[int, BeforeValidator(_whole), Interval(ge=1, le=2**40)]
_Window = Annotated[int, BeforeValidator(_whole), Interval(ge=0, le=2**40)]
_Small = Annotated[float, Interval(ge=1e-30, le=1.0)]
_Positive = Annotated[float, Interval(ge=1e-30, le=1e30)]
_NotNegative = Annotated[float, Interval(ge=0.0, le=1e30)]
_Factors = Annotated[list[_Positive], Len(0, 2**12)]


class Rope(TypedDict, total=False):
    """`rope_scaling`, and `rope_parameters` of all layers or of one kind of them."""

    rope_type: str | None
    type: str | None
    rope_theta: _Positive | None
    partial_rotary_factor: _Small | None
    factor: _Positive | None
    attention_factor: _Positive | None
    low_freq_factor: _Positive | None
    high_freq_factor: _Positive | None
    original_max_position_embeddings: Annotated[float, Interval(ge=1, le=2**40)] | None
    short_factor: _Factors | None
    long_factor: _Factors | None


class RopeByKind(Rope, total=False):
    """Ropes of layers that slide and of those that do not, where they differ."""

    full_attention: Rope | None
    sliding_attention: Rope | None


class ConfigFile(TypedDict, total=False):
    """The keys of a `config.json` that any family reads; null where transformers may know what it means."""

    model_type: str | None
    architectures: list[str] | None
    vocab_size: _Rows | None
    hidden_size: _Width | None
    intermediate_size: _Width | None
    moe_intermediate_size: _Width | None
    num_hidden_layers: _Layers | None
    num_attention_heads: _Heads | None
    num_key_value_heads: _Heads | None
    head_dim: _Width | None
    rms_norm_eps: _Small | None
    max_position_embeddings: _Positions | None
    tie_word_embeddings: bool | None
    attention_bias: bool | None
    mlp_bias: bool | None
    hidden_act: str | None
    hidden_activation: str | None
    num_experts: _Experts | None
    num_local_experts: _Experts | None
    num_experts_per_tok: _Experts | None
    norm_topk_prob: bool | None
    router_aux_loss_coef: _NotNegative | None
    decoder_sparse_step: int | None
    mlp_only_layers: list[int] | None
    query_pre_attn_scalar: _Positive | None
    attn_logit_softcapping: _Positive | None
    final_logit_softcapping: _Positive | None
    use_bidirectional_attention: bool | str | None
    sliding_window: _Window | None
    use_sliding_window: bool | None
    max_window_layers: Annotated[int, BeforeValidator(_whole), Interval(ge=0, le=4096)] | None
    sliding_window_pattern: Annotated[int, BeforeValidator(_whole), Interval(ge=1, le=4096)] | None
    layer_types: Annotated[list[str], Len(0, 4096)] | None
    rope_theta: _Positive | None
    rope_local_base_freq: _Positive | None
    rope_scaling: RopeByKind | None
    rope_parameters: RopeByKind | None
    partial_rotary_factor: _Small | None
    original_max_position_embeddings: _Positions | None
    quantization_config: dict[str, Any] | None
    bos_token_id: Id | None
    eos_token_id: Ids
    pad_token_id: Id | None

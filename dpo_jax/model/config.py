"""The numbers of a decoder (`families.py` reads them from a `config.json`), and the type of its parameters."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

Params = dict[str, Any]  # parameters, a nested dict of arrays: {"embedding": ..., "layers": {"attention": {"q": ...}}}
ACTIVATIONS: dict[str, Callable] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
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
      scalar_head: a reward model: one number of a hidden state in place of the vocabulary projection.
      initializer_range: standard deviation of weights that are drawn, for a model from scratch.
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
    scalar_head: bool = False
    initializer_range: float = 0.02

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
        tables = self.vocab_size * D * (1 if self.tie_word_embeddings or self.scalar_head else 2)
        return self.num_hidden_layers * (attention + mlp + norms) + tables + D + D * self.scalar_head

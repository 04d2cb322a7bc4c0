"""Logical axes of the model → axes of the mesh, and the shardings of its parameters that follow."""

import math
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from dpo_jax.errors import UserError
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.forward import init_params
from dpo_jax.model.lora import Lora, init_adapters
from dpo_jax.parallel.mesh import ROW_AXES, VOCAB_AXES


def axis_rules(config: ModelConfig, mesh: Mesh) -> tuple[tuple[str, Any], ...]:
    """Logical axis → mesh axis for one model.

    Raises:
      UserError: a dimension of the model does not divide over its mesh axis.
    """
    tensor = mesh.shape["tensor"]
    spread_experts = config.num_experts > 0 and config.num_experts % tensor == 0
    for name, size, axis in (
        ("hidden_size", config.hidden_size, "fsdp"),
        ("num_attention_heads", config.num_attention_heads, "tensor"),
        # Whole experts are spread over the tensor shards where they divide, else the ffn of every expert.
        ("intermediate_size", 0 if spread_experts else config.intermediate_size, "tensor"),
    ):
        if size % mesh.shape[axis]:
            raise UserError(f"mesh_{axis}={mesh.shape[axis]} does not divide the model's {name}={size}; use a divisor")
    vocab, table = _table_axes(config, mesh)
    return (
        ("rows", ROW_AXES),
        ("tokens", None),
        ("activation", None),
        ("embed", "fsdp"),
        ("vocab", vocab),
        ("table", table),
        ("vocab_parts", VOCAB_AXES),
        ("heads", "tensor"),
        # Fewer kv-heads than tensor shards: each shard keeps them all, as it needs some of each.
        ("kv_heads", "tensor" if config.num_key_value_heads % tensor == 0 else None),
        ("head_dim", None),
        ("mlp", "tensor"),
        ("router", None),
        ("experts", "tensor" if spread_experts else None),
        ("expert_mlp", None if spread_experts else "tensor"),
        ("norm", None),
        ("layers", None),
        ("rank", None),
    )


def _table_axes(config: ModelConfig, mesh: Mesh) -> tuple[Any, Any]:
    """How the vocabulary's tables are sharded: by tokens, as they are computed with, or else by width.

    The latter where the tokens do not divide; they are exchanged for parts of whole rows when those are needed.
    """
    parts = math.prod(mesh.shape[a] for a in VOCAB_AXES)
    if config.vocab_size % parts == 0:
        return VOCAB_AXES, None
    return None, VOCAB_AXES if config.hidden_size % parts == 0 else "fsdp"


def param_shardings(config: ModelConfig, mesh: Mesh) -> Any:
    """A tree of `NamedSharding` shaped like the parameters."""
    return _shardings(jax.eval_shape(lambda: init_params(jax.random.key(0), config)), config, mesh)


def adapter_shardings(config: ModelConfig, lora: Lora, mesh: Mesh) -> Any:
    """As `param_shardings`: A and B are sharded as their kernel is, whole along the rank."""
    return _shardings(jax.eval_shape(lambda: init_adapters(jax.random.key(0), config, lora)), config, mesh)


def _shardings(abstract: Any, config: ModelConfig, mesh: Mesh) -> Any:
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, axis_rules(config, mesh))

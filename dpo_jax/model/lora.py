"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685): which projections have one, and how they begin.

A projection W of the frozen base becomes W + scale · A·B, of which only A and B are trained. They are one more branch
of the parameter tree, `{"lora": {"layers": {"attention": {"q": {"a": ..., "b": ...}}}}}`: the policy is the union
`base | adapters` of two dicts, and the base alone, which has no such branch, is the model before training.

Shapes: A `[L, inputs..., r]`, B `[L, r, outputs...]`, with the kernel's own axes; L layers, r rank.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from dpo_jax.errors import UserError
from dpo_jax.model.config import ModelConfig, Params
from dpo_jax.model.forward import fresh_head, init_params
from dpo_jax.model.options import Lora
from dpo_jax.model.tensors import Leaf, model_leaves, sizes

BRANCH = "lora"  # of the parameter tree, and the variable collection that `model.py` reads
ALL = "all"
ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")


def on_model(config: ModelConfig, asked: Lora) -> Lora:
    """The adapters on this model. `all` is every projection; of a model with experts those of attention, as in PEFT.

    Raises:
      UserError: adapters on experts were asked for by name.
    """
    experts = [name for name in asked.targets if name in MLP] if config.num_experts else []
    if experts:
        raise UserError(
            f"lora_targets: adapters on experts ({', '.join(experts)}) are not supported; a {config.model_type} model "
            f"can have them on {', '.join(ATTENTION)}"
        )
    if asked.rank > config.hidden_size:
        raise UserError(f"lora_rank={asked.rank} is more than the model's width {config.hidden_size}; 8 to 64 is usual")
    everything = ATTENTION if config.num_experts else (*ATTENTION, *MLP)
    return dataclasses.replace(asked, targets=everything) if ALL in asked.targets else asked


def adapted(config: ModelConfig, lora: Lora) -> list[Leaf]:
    """The kernels that have an adapter."""
    return [leaf for leaf in model_leaves(config) if leaf.path[0] == "layers" and leaf.path[-1] in lora.targets]


def init_adapters(key: jax.Array, config: ModelConfig, lora: Lora) -> Params:
    """Fresh float32 adapters with logical axis names: A drawn as PEFT draws it, B zeros, so the policy is the base.

    A is torch's `kaiming_uniform_(a=√5)`: uniform within ±1/√inputs.
    """
    letters = sizes(config)
    kernels = flax.traverse_util.flatten_dict(jax.eval_shape(lambda: init_params(jax.random.key(0), config)))
    flat: dict[tuple[str, ...], Any] = {}
    for i, leaf in enumerate(adapted(config, lora)):
        layers, *axes = kernels[leaf.path].names
        inputs = len(leaf.theirs[1])  # how many of our axes a Linear's input is
        L, *shape = leaf.shape(letters)
        bound = 1 / math.sqrt(math.prod(shape[:inputs]))
        a_shape, b_shape = (L, *shape[:inputs], lora.rank), (L, lora.rank, *shape[inputs:])
        a = jax.random.uniform(jax.random.fold_in(key, i), a_shape, jnp.float32, -bound, bound)
        box = nn.LogicallyPartitioned
        flat[(BRANCH, *leaf.path, "a")] = box(a, (layers, *axes[:inputs], "rank"))
        flat[(BRANCH, *leaf.path, "b")] = box(jnp.zeros(b_shape, jnp.float32), (layers, "rank", *axes[inputs:]))
    if config.scalar_head:  # a reward model's head is trained beside them
        flat[("score",)] = fresh_head(jax.random.fold_in(key, len(flat)), config)
    return flax.traverse_util.unflatten_dict(flat)

"""A policy's parameters on the mesh: from its files, or fresh."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from dpo_jax.model.forward import init_params
from dpo_jax.model.lora import init_adapters
from dpo_jax.model.params import Params
from dpo_jax.model.placement import Layout
from dpo_jax.weights import huggingface as weights
from dpo_jax.weights.find import Policy


def load_base(policy: Policy, layout: Layout, seed: int) -> Params:
    """What is under the adapters and never trained, from the policy's files or fresh; {} if all parameters are trained.

    It is saved nowhere: the same files or the same seed bring it back.
    """
    return {} if layout.lora is None else _load(policy, layout, seed, layout.base_dtype)


def load_params(policy: Policy, layout: Layout, seed: int) -> Params:
    """What is trained, before any training: the policy's parameters from its files or fresh, or fresh adapters."""
    lora = layout.lora
    if lora is None:
        return _load(policy, layout, seed, layout.param_dtype)
    key = jax.random.fold_in(jax.random.key(seed), 1)  # not the one that fresh parameters are drawn with
    return _fresh(lambda: init_adapters(key, layout.config, lora), layout.param_dtype, layout.trained)


def _load(policy: Policy, layout: Layout, seed: int, dtype: Any) -> Params:
    if policy.directory is not None:
        return weights.load_weights(policy.directory, policy.config, layout.shardings, dtype)
    return _fresh(lambda: init_params(jax.random.key(seed), policy.config), dtype, layout.shardings)


def _fresh(init: Callable[[], Any], dtype: Any, shardings: Any) -> Params:
    cast = lambda: jax.tree.map(lambda p: p.astype(dtype), nn.meta.unbox(init()))
    return jax.jit(cast, out_shardings=shardings)()

"""A policy's parameters on the mesh: from its files, or fresh."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dpo_jax.errors import UserError
from dpo_jax.model.config import ModelConfig, Params
from dpo_jax.model.forward import fresh_head, init_params
from dpo_jax.model.lora import init_adapters
from dpo_jax.model.options import LayoutOptions
from dpo_jax.model.placement import Layout, place_model
from dpo_jax.parallel.mesh import make_mesh
from dpo_jax.weights import huggingface as weights
from dpo_jax.weights.find import Policy, find_policy
from dpo_jax.weights.hub import ModelFiles


def load_policy(
    model: str | Path, options: LayoutOptions | None = None, *, revision: str = ""
) -> tuple[Policy, Layout, Params]:
    """A model to look at, such as a run's `export/`: what it is, how it is sharded, and its parameters.

    Args:
      model: a Hugging Face id, or a directory in that layout.
      options: number formats and attention; parameters are float32 unless they say otherwise.
      revision: the hub's branch, tag or commit; empty: its main branch.

    Returns:
      The policy with its tokenizer, its layout on all devices (as mesh_fsdp=-1 has it), and the parameters there.

    Raises:
      UserError: there is no such model, or it is not supported.
    """
    if str(model) == "tiny":
        raise UserError("model 'tiny' has no weights before it is trained; give the export/ of its run")
    policy = find_policy(str(model), Path(), 0, revision=revision)
    return policy, *load_whole(policy, make_mesh(1, -1, 1), options or LayoutOptions())


def load_whole(policy: Policy, mesh: Mesh, options: LayoutOptions) -> tuple[Layout, Params]:
    """A model's layout on a mesh and its parameters there, all of one number format.

    Args:
      policy: a model with files.
      mesh: where it is placed.
      options: as for `place_model`; param_dtype auto is the compute dtype, which is what it is read for.

    Raises:
      UserError: it is not supported, or does not divide over the mesh.
    """
    held = options.param_dtype
    layout = place_model(policy.config, mesh, dataclasses.replace(options, param_dtype="float32"))
    layout = dataclasses.replace(layout, param_dtype=layout.dtype if held == "auto" else jnp.dtype(held))
    with jax.set_mesh(mesh):
        return layout, load_params(policy, layout, 0)


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
    params = _fresh(lambda: init_adapters(key, layout.config, lora), layout.param_dtype, layout.trained)
    return params | (_head(policy, layout, seed, layout.param_dtype) if policy.config.scalar_head else {})


def _load(policy: Policy, layout: Layout, seed: int, dtype: Any) -> Params:
    if policy.files is None:
        params = _fresh(lambda: init_params(jax.random.key(seed), policy.config), dtype, layout.shardings)
    else:
        params = read_model(policy.files, policy.config, layout.shardings, dtype, head=policy.head.name)
    return params | (_head(policy, layout, seed, dtype) if policy.config.scalar_head else {})


def _head(policy: Policy, layout: Layout, seed: int, dtype: Any) -> Params:
    """A reward model's head alone: that of its files, or one drawn by the seed."""
    if policy.files is not None and policy.head.name:
        shardings = layout.shardings
        return read_model(policy.files, policy.config, shardings, dtype, head=policy.head.name, branches=("score",))
    key = jax.random.fold_in(jax.random.key(seed), 2)  # neither that of fresh parameters nor that of adapters
    fresh = lambda: {"score": fresh_head(key, policy.config)}
    return _fresh(fresh, dtype, {"score": layout.shardings["score"]})


def read_model(files: ModelFiles, config: ModelConfig, shardings: Any, dtype: Any, **read: Any) -> Params:
    """A model's weights from its files, an adapter merged into them; see `huggingface.load_weights`."""
    return weights.load_weights(files.directory, config, shardings, dtype, adapter=files.adapter, **read)


def _fresh(init: Callable[[], Any], dtype: Any, shardings: Any) -> Params:
    cast = lambda: jax.tree.map(lambda p: p.astype(dtype), nn.meta.unbox(init()))
    return jax.jit(cast, out_shardings=shardings)()

"""The policy of a run that has no export yet, from a checkpoint: parameters alone, on any mesh, adapters unmerged."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dpo_jax.config.settings import Settings
from dpo_jax.model.config import Params
from dpo_jax.model.options import LayoutOptions
from dpo_jax.model.placement import Layout, abstract_trained, place_model
from dpo_jax.training.checkpoint import restore_part
from dpo_jax.weights.find import Policy
from dpo_jax.weights.load import load_base


def run_policy(
    checkpoint: Path, settings: Settings, policy: Policy, mesh: Mesh, options: LayoutOptions
) -> tuple[Layout, Params]:
    """A run's policy at a checkpoint.

    Args:
      checkpoint: its directory, whose name is the number of updates.
      settings, policy: of the run; the model that it began with.
      mesh, options: where and in which number formats it is used.

    Returns:
      The layout, and the parameters; where adapters are trained, they are beside the base.

    Raises:
      UserError: the checkpoint is damaged, or holds something else.
    """
    s = settings
    layout = place_model(policy.config, mesh, options, s.lora)
    saved = dataclasses.replace(layout, param_dtype=s.layout.param_dtype)
    tree: Any = {"params": abstract_trained(saved, s.layout.param_dtype)}
    inside = s.reference.moves and int(checkpoint.name) > s.sft_steps  # a reference that moves is saved beside it
    with jax.set_mesh(mesh):
        found = restore_part(checkpoint, {"state": tree} if inside else tree)
        params = (found["state"] if inside else found)["params"]
        return layout, load_base(policy, layout, s.seed) | params

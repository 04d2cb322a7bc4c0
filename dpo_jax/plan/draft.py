"""A run on slices that are not there, before anything is compiled; what training would refuse is refused here too."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.config.settings import Settings
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.families import config_from_hf
from dpo_jax.model.placement import Layout, place_model
from dpo_jax.objective.objective import Objective
from dpo_jax.parallel.mesh import make_mesh, row_shards
from dpo_jax.parallel.tpu import Topology
from dpo_jax.plan.known import MODELS
from dpo_jax.plan.lengths import Lengths
from dpo_jax.rl.objective import rl_objective
from dpo_jax.rl.rollouts import LIKE_BATCHES
from dpo_jax.rows.schedule import Schedule, make_schedule
from dpo_jax.rows.shape import RowLimits, RowShape
from dpo_jax.training import inputs
from dpo_jax.training.setup import make_objective, make_optimizer
from dpo_jax.weights import hub
from dpo_jax.weights import huggingface as weights
from dpo_jax.weights.find import check_reference, find_policy


@dataclasses.dataclass(frozen=True)
class Draft:
    """A run on a topology.

    Attributes:
      settings: of the run.
      topology: where it would run.
      layout: the model on the topology's mesh.
      schedule: every step of an epoch, in rows that the mesh takes.
      steps: updates of the run.
    """

    settings: Settings
    topology: Topology
    layout: Layout
    schedule: Schedule
    steps: int

    @property
    def objective(self) -> Objective:
        if self.settings.task == "rl":
            return rl_objective(self.settings.rl.options)
        return make_objective(self.settings.objective)

    @property
    def optimizer(self) -> tuple[Any, Any]:
        """The optimiser and its learning rate by update."""
        return make_optimizer(self.settings.optimizer, self.steps)

    @functools.cached_property
    def shares(self) -> dict[RowShape, float]:
        """The row shapes that an epoch uses, and the share of steps that each has."""
        epoch = self.schedule.epoch(0)
        used, counts = np.unique(epoch.shape, return_counts=True)
        return {epoch.shapes[i]: float(n) / len(epoch.placed) for i, n in zip(used, counts, strict=True)}

    @property
    def main_shape(self) -> RowShape:
        """The row shape of most steps."""
        return max(self.shares, key=lambda shape: self.shares[shape])

    @property
    def widest_shape(self) -> RowShape:
        return max(self.shares, key=lambda shape: shape.tokens)


def find_model(name: str, key: str = "model", seed: int = 0, revision: str = "") -> ModelConfig:
    """A model's numbers: of a directory, of a published model by name, or of the hub; no weights.

    Args:
      name: of the model.
      key: the config's key that names it: `model` or `reference`.
      seed: of the tokenizer that the model `tiny` is made with.
      revision: the hub's; the numbers of a published model by name are those of its main branch.

    Raises:
      UserError: there is no such model.
    """
    if name in MODELS and not revision and not Path(name).is_dir():
        return config_from_hf(MODELS[name], name)
    if name != "tiny" or key != "model":
        files = hub.resolve_model(name, what=key, with_weights=False, revision=revision)
        return weights.read_config(files.directory)[0]
    with tempfile.TemporaryDirectory() as work:  # as large as the vocabulary that its tokenizer learns
        return find_policy(name, Path(work), seed, revision=revision).config


def make_draft(s: Settings, model: ModelConfig, lengths: Lengths, topology: Topology) -> Draft:
    """The run of these settings on a topology.

    Raises:
      UserError: they do not fit the topology, the model or the pairs, or the compiler is not installed.
    """
    mesh = make_mesh(*s.mesh, topology.devices())
    inputs.check_division(s.batch, row_shards(mesh))
    inputs.check_experts(s, model.num_experts)
    inputs.check_enough(s.batch, len(lengths))
    layout = place_model(model, mesh, s.layout, s.lora)
    if s.reference.name:
        check_reference(
            find_model(s.reference.name, "reference", revision=s.reference.revision), layout.config, s.reference.name
        )
    whole, rest = divmod(lengths.pairs, s.batch.size)
    steps = inputs.run_steps(s, whole if s.batch.order.drop_remainder else whole + bool(rest))
    limits = layout.row_limits(s.batch.microbatches)
    return Draft(s, topology, layout, _schedule(s, lengths, limits), steps)


def _schedule(s: Settings, lengths: Lengths, limits: RowLimits) -> Schedule:
    """As training makes it; of RL, which has no epoch at once, as it chooses rows for the rollouts to come."""
    if s.task != "rl":
        return make_schedule(lengths, s.batch.size, limits, s.batch.order, lengths.mixture)
    order, known = dataclasses.replace(s.batch.order, shuffle=False), lengths.lengths
    like = np.random.default_rng(s.seed).permutation(known)[: LIKE_BATCHES * s.batch.size]
    longest = np.array([known[:, 0].max(), *[s.data.max_completion_length] * s.rl.n])
    return make_schedule(lengths, s.batch.size, limits, order, lengths.mixture, longest, like)

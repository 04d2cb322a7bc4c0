"""From the config to pairs and their plan: what training and the data command share."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_jax.data.mixture import Mixture
from dpo_jax.data.prepare import DataRequest, Prepared, Progress, prepare
from dpo_jax.errors import UserError
from dpo_jax.rows.pipeline import PairSource, Schedule, make_schedule
from dpo_jax.rows.schedule import Order, RowLimits
from dpo_jax.weights import tiny

Config = Mapping[str, Any]


def prepare_pairs(
    c: Config, tokenizer: Any, workdir: Path, quarantine: Path | None, progress: Progress | None = None
) -> Prepared:
    """The config's training and evaluation pairs.

    Args:
      c: the config.
      tokenizer: of the model.
      workdir: where dialogues are written that the dataset `synthetic` makes.
      quarantine, progress: see `prepare`.

    Raises:
      UserError: see `prepare`.
    """
    dataset_path = c["dataset_path"]
    if c["dataset"] == "synthetic" and not dataset_path:
        dataset_path = str(tiny.write_dialogues(workdir, c["seed"]))
    names = [f.name for f in dataclasses.fields(DataRequest) if f.name != "dataset_path"]
    request = DataRequest(dataset_path=dataset_path, **{name: c[name] for name in names})
    return prepare(request, tokenizer, quarantine, progress)


def check_division(batch_size: int, shards: int, microbatches: int) -> None:
    """Refuse a batch that does not divide over the data shards and microbatches.

    Raises:
      UserError: with the nearest sizes that do.
    """
    parts = shards * microbatches
    if batch_size % parts:
        near = [x for x in (batch_size // parts * parts, -(-batch_size // parts) * parts) if x > 0]
        raise UserError(
            f"batch_size={batch_size} does not divide over {shards} data shards x {microbatches} microbatches; use a "
            f"multiple of {parts} ({' or '.join(map(str, near))})"
        )


def check_enough(c: Config, pairs: int) -> None:
    """Refuse a batch that there are not enough training pairs for.

    Raises:
      UserError: with the key that mends it.
    """
    if pairs < c["batch_size"] and c["drop_remainder"]:
        raise UserError(
            f"batch_size={c['batch_size']} is more than the {pairs} training pairs; lower it, or set "
            "drop_remainder=False"
        )


def check_experts(c: Config, experts: int) -> None:
    """Refuse a load-balancing loss for a model of which no expert is there to balance.

    Raises:
      UserError: with the key that mends it.
    """
    if c["router_aux_loss_coef"] and not experts:
        raise UserError(
            f"router_aux_loss_coef={c['router_aux_loss_coef']:g}: {c['model']} has no experts; leave it at 0"
        )


def plan(c: Config, pairs: PairSource, limits: RowLimits, mixture: Mixture | None = None) -> Schedule:
    """Every step of the config's run over these pairs, of which the mixture makes epochs."""
    order = Order(c["seed"], c["shuffle"], c["drop_remainder"])
    return make_schedule(pairs, c["batch_size"], limits, order, mixture)


def run_steps(c: Config, steps_per_epoch: int) -> int:
    """Updates of the config's DPO phase.

    Raises:
      UserError: all of them would be warm-up.
    """
    steps: int = c["num_steps"] or max(1, round(c["num_epochs"] * steps_per_epoch))
    if steps > 1 and c["warmup_steps"] >= steps:
        raise UserError(
            f"warmup_steps={c['warmup_steps']:g} leaves nothing of the {steps} updates; use 0.1 (a fraction)"
        )
    return steps

"""From the settings to pairs, and what is refused before anything is loaded: training, plan and inspection share it."""

import dataclasses
from pathlib import Path
from typing import Any

from dpo_jax.config.settings import BatchOptions, Settings
from dpo_jax.data.prepare import Prepared, Progress, prepare
from dpo_jax.errors import UserError
from dpo_jax.weights import tiny


def prepare_pairs(
    settings: Settings,
    tokenizer: Any,
    workdir: Path,
    quarantine: Path | None,
    progress: Progress | None = None,
    day: str = "",
) -> Prepared:
    """The run's pairs, see `prepare`; `workdir` gets the dialogues of the dataset `synthetic`.

    `day` (YYYY-MM-DD, empty: today) is what a template with a date writes, unless the config names another.
    """
    request = dataclasses.replace(settings.data, template_date=settings.data.template_date or day)
    if request.dataset == "synthetic" and not request.dataset_path:
        request = dataclasses.replace(request, dataset_path=str(tiny.write_dialogues(workdir, settings.seed)))
    return prepare(request, tokenizer, quarantine, progress)


def check_division(batch: BatchOptions, shards: int) -> None:
    """Refuse, with a UserError, a batch that does not divide over the data shards and microbatches."""
    parts = shards * batch.microbatches
    if batch.size % parts:
        near = [x for x in (batch.size // parts * parts, -(-batch.size // parts) * parts) if x > 0]
        raise UserError(
            f"batch_size={batch.size} does not divide over {shards} data shards x {batch.microbatches} microbatches; "
            f"use a multiple of {parts} ({' or '.join(map(str, near))})"
        )


def check_enough(batch: BatchOptions, pairs: int) -> None:
    """Refuse, with a UserError, a batch that there are not enough training pairs for."""
    if pairs < batch.size and batch.order.drop_remainder:
        raise UserError(
            f"batch_size={batch.size} is more than the {pairs} training pairs; lower it, or set drop_remainder=False"
        )


def check_experts(settings: Settings, experts: int) -> None:
    """Refuse, with a UserError, a load-balancing loss for a model that has no experts."""
    if (weight := settings.objective.balance) and not experts:
        raise UserError(f"router_aux_loss_coef={weight:g}: {settings.model} has no experts; leave it at 0")


def run_steps(settings: Settings, steps_per_epoch: int) -> int:
    """Updates of the run's DPO phase; a UserError if all of them would be warm-up."""
    steps = settings.num_steps or max(1, round(settings.num_epochs * steps_per_epoch))
    warmup = settings.optimizer.warmup
    if steps > 1 and warmup >= steps:
        raise UserError(f"warmup_steps={warmup:g} leaves nothing of the {steps} updates; use 0.1 (a fraction)")
    return steps

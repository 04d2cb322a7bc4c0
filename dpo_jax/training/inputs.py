"""From the settings to pairs, and what is refused before anything is loaded: training, plan and inspection share it."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.bucket.local import local_twin
from dpo_jax.config.settings import BatchOptions, Settings
from dpo_jax.data.cache.manifest import LARGEST_ID
from dpo_jax.data.prepare import DataRequest, Prepared, Progress, prepare, sources_for
from dpo_jax.data.sources import DataSources
from dpo_jax.data.split import Split
from dpo_jax.errors import UserError
from dpo_jax.preference.questions import Questions
from dpo_jax.weights import tiny
from dpo_jax.weights.find import Policy


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
    request = dataclasses.replace(_request(settings, workdir), template_date=settings.data.template_date or day)
    recasting = functools.partial(Questions, seed=settings.seed) if settings.task == "comparison" else None
    return prepare(request, tokenizer, quarantine, progress, recasting)


def _request(settings: Settings, workdir: Path) -> DataRequest:
    """What the settings ask for; `workdir` gets the dialogues of the dataset `synthetic`."""
    request = settings.data
    if request.dataset == "synthetic" and not request.dataset_path:
        request = dataclasses.replace(
            request, dataset_path=str(tiny.write_dialogues(local_twin(workdir), settings.seed))
        )
    return request


def sources_of(settings: Settings, workdir: Path) -> DataSources:
    """Where the run's rows are."""
    return sources_for(_request(settings, workdir))


def check_tokens(split: Split, policy: Policy) -> None:
    """Refuse pairs with a token for which the model's table has no row.

    A tokenizer may have such tokens (Gemma 3's stands for an image) as long as no pair has one.

    Raises:
      UserError: the ids and tokens, where the first one stands, and how to resize the table.
    """
    rows, cache = policy.config.vocab_size, split.train.cache
    if cache.manifest.get(LARGEST_ID, rows) < rows:
        return
    found: dict[int, int] = {}
    for pair in map(int, np.concatenate([split.train.index, split.evaluation.index])):
        ids = np.concatenate(cache[pair])
        for token in np.unique(ids[ids >= rows]).tolist():
            found.setdefault(token, pair)
    if not found:
        return
    where = cache.row(next(iter(found.values())))
    named = named_tokens({i: str(policy.tokenizer.convert_ids_to_tokens(i)) for i in sorted(found)})
    raise UserError(
        f"the model's table has {rows:,} rows, and the data has tokens beyond it: {named}, the first in "
        f"{where['file']} line {where['line']}; use the tokenizer that the model was trained with, or give the model "
        f"rows for them: {resize_command(policy)}"
    )


def named_tokens(tokens: Mapping[int, str], most: int = 5) -> str:
    """Tokens in words: `262144 '<image_soft_token>'`, the first `most` of them."""
    shown = [f"{i} {text!r}" for i, text in list(tokens.items())[:most]]
    return ", ".join(shown) + (f" and {len(tokens) - most:,} more" if len(tokens) > most else "")


def resize_command(policy: Policy) -> str:
    """What gives the model a row for every token of its tokenizer, in a new directory."""
    ids = max(policy.tokenizer.get_vocab().values()) + 1
    return (
        'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"d = {str(policy.directory)!r}; m = M.from_pretrained(d); m.resize_token_embeddings({ids}); "
        "m.save_pretrained('RESIZED'); T.from_pretrained(d).save_pretrained('RESIZED')\" and --config.model=RESIZED"
    )


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

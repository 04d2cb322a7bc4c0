"""A model that is ready to answer: found, its prompts rendered and checked, then its parameters on the mesh.

What can be refused is refused before any weights are read.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_jax.answering.found import Found
from dpo_jax.config.file import get_config
from dpo_jax.config.settings import Settings, read_settings
from dpo_jax.data.cuts import Ids
from dpo_jax.data.prompt_ids import prompt_tokens
from dpo_jax.data.prompts import Prompt
from dpo_jax.data.render import Renderer, make_renderer
from dpo_jax.errors import UserError
from dpo_jax.model.config import ModelConfig, Params
from dpo_jax.model.options import LayoutOptions
from dpo_jax.model.placement import Layout
from dpo_jax.parallel.mesh import first_process_first, make_mesh, row_shards
from dpo_jax.sampling.engine import Capacity, Sampler
from dpo_jax.sampling.params import SamplingParams
from dpo_jax.training.restored import run_policy
from dpo_jax.training.setup import keep_compiled
from dpo_jax.weights.find import Policy, find_policy
from dpo_jax.weights.load import load_whole

WAVES, MOST_PROMPTS = 8, 1024  # of a block: times the rows there are, and in all
_UNLIMITED = 1 << 30  # of rendering: the model's own limit refuses, and nothing is cut


def open_policy(found: Found) -> Policy:
    """The model's numbers and tokenizer; its weights are read later."""
    workdir = found.run if found.checkpoint is not None and found.run is not None else Path()
    seed = 0 if found.settings is None else found.settings.seed
    with first_process_first("dpo_jax model files"):
        return find_policy(found.model, workdir, seed, revision=found.revision)


def place(found: Found, policy: Policy, config: Settings | None, dtype: str) -> tuple[Layout, Params]:
    """The model's layout, and its parameters on the mesh.

    Args:
      found, policy: the model.
      config: whose mesh and number formats are taken; None: all devices share the parameters, and formats are a run's.
      dtype: another number format; auto: as said.

    Raises:
      UserError: it cannot be read, or does not divide over the mesh.
    """
    keep_compiled(config or found.settings or read_settings(get_config()))
    mesh = make_mesh(*(config.mesh if config is not None else (1, -1, 1)))
    options = LayoutOptions(param_dtype="auto")
    if config is not None or found.checkpoint is not None:
        settings = config or found.settings
        assert settings is not None
        options = dataclasses.replace(settings.layout, optimizer_offload=False, reference_offload=False, longest=None)
    if dtype != "auto":
        options = dataclasses.replace(options, param_dtype=dtype, compute_dtype=dtype, base_dtype=dtype)
    if found.checkpoint is None:
        return load_whole(policy, mesh, options)
    assert found.settings is not None
    return run_policy(found.checkpoint, found.settings, policy, mesh, options)


def make_sampler(policy: Policy, layout: Layout, capacity: Capacity | None = None) -> Sampler:
    """What draws the model's answers."""
    return Sampler(layout, policy.tokenizer, policy.stop_tokens(), capacity)


def make_prompt_renderer(tokenizer: Any, prompt_format: str, chat_template: str, day: str = "") -> Renderer:
    """What renders prompts as training does, of any length; `day` is what a chat template with a date writes."""
    return make_renderer(
        tokenizer, prompt_format, _UNLIMITED, _UNLIMITED, chat_template=chat_template, template_date=day
    )


def tokens_of(renderer: Renderer, model: ModelConfig, prompts: Sequence[Prompt]) -> list[Ids]:
    """Token ids of prompts, each of which the model can answer.

    Raises:
      UserError: one cannot be rendered, is too long, or has a token that the model does not know; with its place.
    """
    ids = prompt_tokens(renderer, prompts)
    for prompt, tokens in zip(prompts, ids, strict=True):
        check_tokens_of(tokens, model, prompt.where)
    return ids


def check_tokens_of(tokens: Sequence[int], model: ModelConfig, where: str) -> None:
    """Refuse, with a UserError, a prompt that this model cannot answer."""
    most, rows = model.max_position_embeddings, model.vocab_size
    if not tokens:
        raise UserError(f"{where}: the prompt has no tokens")
    if len(tokens) >= most:
        raise UserError(
            f"{where}: the prompt has {len(tokens):,} tokens, and the model {most:,} positions for prompt and answer "
            "together; shorten it"
        )
    if not 0 <= min(tokens) <= max(tokens) < rows:
        token = max(tokens) if max(tokens) >= rows else min(tokens)
        raise UserError(f"{where}: the prompt has token {token}, and the model's table has {rows:,} rows; leave it out")


def block_size(sampler: Sampler, asked: SamplingParams) -> int:
    """How many prompts are drawn in one call of the sampler: what is drawn again at most where a file is resumed.

    Which prompts are drawn together decides the last digits of log-probabilities, so a file that was stopped is resumed
    where a block begins. A few times as many answers as there are rows: then rows are idle for a small part of a block.
    """
    rows = sampler.capacity.rows * row_shards(sampler.layout.mesh)
    return max(1, min(MOST_PROMPTS, -(-WAVES * rows // asked.n)))

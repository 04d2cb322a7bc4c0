"""`dpo_jax.sample`: answers from Python."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from dpo_jax.answering.found import locate_model
from dpo_jax.answering.ready import (
    check_tokens_of,
    make_prompt_renderer,
    make_sampler,
    open_policy,
    place,
    tokens_of,
)
from dpo_jax.data.prompts import prompt_of
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.placement import Layout
from dpo_jax.sampling.engine import Capacity, Sampled, Sampler
from dpo_jax.sampling.params import Answer, SamplingParams
from dpo_jax.weights.find import Policy

_KEPT = 2  # samplers, with what they have compiled
_samplers: list[tuple[Layout, Capacity | None, Sampler]] = []


def sample(
    model: Any,
    prompts: Sequence[Any],
    *,
    ids: Sequence[str | int | None] | None = None,
    stream: bool = False,
    prompt_format: str = "auto",
    chat_template: str = "",
    capacity: Capacity | None = None,
    **asked: Any,
) -> list[list[Answer]] | Iterator[Sampled]:
    """Answers of a model to prompts.

    Args:
      model: a Hugging Face directory or id, a run's directory, or what `load_policy` returns.
      prompts: texts, lists of messages, or token ids, which may be mixed.
      ids: of prompts; draws depend on them, and where there is none on the prompt's tokens.
      stream: return an iterator of answers as they end, each with its prompt's place and which of n it is.
      prompt_format, chat_template: how texts and messages are rendered, as the config's keys.
      capacity: how much is done at once, which changes no draw; None is what suits the devices.
      **asked: the fields of `dpo_jax.sampling.params.SamplingParams`: n, temperature, top_p, top_k, min_p, max_tokens,
        min_tokens, stop, stop_token_ids, seed, round.

    Returns:
      The n answers to every prompt, in order; or the iterator.

    Raises:
      UserError: the model, a prompt or a value is refused, in one line.

    Every process of several calls it with all prompts, and gets all answers.
    """
    params = SamplingParams(**asked)
    if isinstance(model, str | Path):
        found = locate_model(str(model))
        policy = open_policy(found)
        tokens = _tokens(policy, policy.config, prompts, prompt_format, chat_template)
        layout, weights = place(found, policy, None, "auto")
    else:
        policy, layout, weights = model
        tokens = _tokens(policy, layout.config, prompts, prompt_format, chat_template)
    sampler = _sampler(policy, layout, capacity)
    return (sampler.sample if stream else sampler.answers)(weights, tokens, params, ids)


def _tokens(
    policy: Policy, model: ModelConfig, prompts: Sequence[Any], prompt_format: str, chat_template: str
) -> list[list[int]]:
    """Token ids of every prompt; those that are given as such are checked alone."""
    tokens: list[list[int]] = [_as_tokens(one) for one in prompts]
    texts = [i for i, one in enumerate(tokens) if not one]
    for i in (i for i, one in enumerate(tokens) if one):
        check_tokens_of(tokens[i], model, f"prompt {i + 1}")
    if texts:
        renderer = make_prompt_renderer(policy.tokenizer, prompt_format, chat_template)
        rendered = tokens_of(renderer, model, [prompt_of(prompts[i], i + 1) for i in texts])
        for i, found in zip(texts, rendered, strict=True):
            tokens[i] = found
    return tokens


def _as_tokens(prompt: Any) -> list[int]:
    """A prompt's tokens if that is what it is; else none."""
    held = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if isinstance(held, list | tuple) and held and all(isinstance(x, int) and not isinstance(x, bool) for x in held):
        return list(cast(list[int], held))
    return []


def _sampler(policy: Policy, layout: Layout, capacity: Capacity | None) -> Sampler:
    """The sampler of this layout: what it has compiled serves the next call."""
    for at, (known, with_capacity, sampler) in enumerate(_samplers):
        if known is layout and with_capacity == capacity:
            _samplers.append(_samplers.pop(at))
            return sampler
    _samplers.append((layout, capacity, make_sampler(policy, layout, capacity)))
    del _samplers[:-_KEPT]
    return _samplers[-1][2]

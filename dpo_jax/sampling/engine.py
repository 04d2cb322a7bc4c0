"""Sampling from a policy: a jitted decoder with a key/value cache.

Shapes: B prompts, T prompt tokens, S cache columns, V vocabulary.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from dpo_jax.model.attention.cached import empty_cache
from dpo_jax.model.config import Params
from dpo_jax.model.forward import ModelOptions, decode, unembedding

PROMPT_MULTIPLE = 64  # prompts are padded to a multiple, so that few lengths are compiled


@dataclasses.dataclass(frozen=True)
class Choice:
    """How the next token is chosen."""

    temperature: float = 0.0  # what logits are divided by before a draw; 0 is greedy
    top_p: float = 1.0  # mass of the nucleus that is drawn from; 1 is the whole vocabulary


def pick(key: jax.Array, logits_BV: jax.Array, choice: Choice) -> jax.Array:
    """Next tokens `[B]`: the most likely one at temperature 0, else a draw from the nucleus.

    Nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751): the smallest set of most likely tokens whose
    probabilities sum to at least `top_p`; its most likely token always belongs to it.
    """
    if choice.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1)
    logits_BV = logits_BV / choice.temperature
    if choice.top_p < 1:
        falling = jnp.sort(logits_BV, axis=-1, descending=True)
        probs = jax.nn.softmax(falling, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # mass of the more likely tokens
        least = jnp.min(jnp.where(before < choice.top_p, falling, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV, axis=-1)


@functools.partial(jax.jit, static_argnames=("model", "new_tokens", "choice", "stop"))
def _generate(
    params: Params, tokens_BT: jax.Array, real_BT: jax.Array, seed: jax.Array,
    *, model: ModelOptions, new_tokens: int, choice: Choice, stop: tuple[int, ...],
) -> jax.Array:  # fmt: skip
    key, softcap = jax.random.key(seed), model.config.final_logit_softcapping
    params = jax.tree.map(lambda p: p.astype(model.dtype), params)
    table_VD = unembedding(params)
    B, T = tokens_BT.shape
    real_BS = jnp.pad(real_BT, ((0, 0), (0, new_tokens)), constant_values=True)
    positions_BS = jnp.maximum(jnp.cumsum(real_BS, axis=1) - 1, 0)
    stop_ids = jnp.asarray(stop, jnp.int32)

    def next_token(hidden_BD, done_B, key):
        logits = jnp.einsum("BD,VD->BV", hidden_BD, table_VD, preferred_element_type=jnp.float32)
        if softcap:
            logits = softcap * jnp.tanh(logits / softcap)
        token = jnp.where(done_B, stop[0], pick(key, logits, choice)).astype(jnp.int32)
        return token, done_B | jnp.any(token[:, None] == stop_ids[None, :], axis=1)

    cache = empty_cache(model.config, B, T + new_tokens, model.dtype)
    hidden, cache = decode(params, tokens_BT, positions_BS[:, :T], cache, jnp.int32(0), real_BS, model)
    first, done = next_token(hidden[:, -1], jnp.zeros(B, bool), jax.random.fold_in(key, 0))

    def one(carry, i):
        token, done, cache = carry
        where = T + i
        position = jax.lax.dynamic_slice_in_dim(positions_BS, where, 1, axis=1)
        hidden, cache = decode(params, token[:, None], position, cache, where, real_BS, model)
        token, done = next_token(hidden[:, 0], done, jax.random.fold_in(key, i + 1))
        return (token, done, cache), token

    _, rest = jax.lax.scan(one, (first, done, cache), jnp.arange(new_tokens - 1, dtype=jnp.int32))
    answers = jnp.concatenate([first[:, None], rest.T], axis=1)
    on_mesh = not jax.sharding.get_abstract_mesh().empty
    return jax.lax.with_sharding_constraint(answers, P()) if on_mesh else answers  # every process reads them


def generate(
    params: Params,
    prompts: Sequence[Sequence[int]],
    model: ModelOptions,
    *,
    stop: Sequence[int],
    new_tokens: int,
    choice: Choice = Choice(),
    seed: int = 0,
) -> list[list[int]]:
    """Continue prompts.

    Args:
      params, model: the policy's parameters, and how it is computed.
      prompts: token ids, at least one each.
      stop: token ids that end an answer; not part of what is returned.
      new_tokens: the most tokens of an answer.
      choice: of every next token; greedy unless given.
      seed: of the draws.

    Returns:
      The answers' token ids, up to and without the first stop token.
    """
    width = -(-max(map(len, prompts)) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    tokens = np.zeros((len(prompts), width), np.int32)
    real = np.zeros((len(prompts), width), bool)
    for row, ids in enumerate(prompts):  # on the left: the last column is every prompt's last token
        tokens[row, width - len(ids) :] = ids
        real[row, width - len(ids) :] = True
    options = {"model": model, "new_tokens": new_tokens, "choice": choice, "stop": tuple(stop)}
    answers = jax.device_get(_generate(params, tokens, real, np.int32(seed), **options))
    return [list(itertools.takewhile(lambda token: token not in stop, ids)) for ids in answers.tolist()]

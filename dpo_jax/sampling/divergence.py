"""How far the policy is from its reference on answers of its own: an on-policy estimate of their KL divergence.

The rewards of DPO, divided by β, are log-ratios too, but on the data set's completions, which the policy may never
produce: their mean is no KL divergence and may have either sign. The divergence is an expectation over the policy's
answers, so answers are drawn: at temperature 1 from the whole vocabulary, for anything else is another distribution.

Shapes: B rows, N completion tokens of a row (two answers to its prompt), D model, V vocabulary.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.model.config import Params
from dpo_jax.model.forward import ModelOptions, hidden_states, unembedding
from dpo_jax.model.placement import Layout, axis_rules
from dpo_jax.model.tuning import row_limits
from dpo_jax.objective.token_logps import token_kl
from dpo_jax.parallel.mesh import local_rows, replicated, row_shards, to_global
from dpo_jax.parallel.watchdog import LONGER, beat
from dpo_jax.rows.batch import Batch
from dpo_jax.rows.build import Group, build_rows
from dpo_jax.rows.shape import RowShape
from dpo_jax.sampling.engine import AnswerRequest
from dpo_jax.sampling.params import Answer, SamplingParams

# Answers drawn to a prompt: a group of them is a row, so that the prompt is computed once for both.
DRAWS = 2


def make_divergence(layout: Layout, new_tokens: int) -> Callable[[Params, Params, Sequence[Group]], np.ndarray]:
    """Build `divergence(params, ref_params, answers)` → float64 `[answers, 2]`, nats.

    Of an answer y it is Σ_t KL(π(·|x, y_<t) ‖ π_ref(·|x, y_<t)), where every term is exact, a sum over the vocabulary.
    For y drawn from π its mean is KL(π(·|x) ‖ π_ref(·|x)), as is that of Σ_t log π/π_ref, whose variance is never
    smaller (Amini, Vieira and Cotterell 2025, arXiv 2504.10637). An answer's end is a token of its own.

    Args:
      layout: of both models. Their parameters may be of any dtype; all is computed in the layout's.
      new_tokens: the most tokens of an answer: rows have room for as many, whatever the answers, as a width more would
        be compiled for each.
    """
    mesh, config = layout.mesh, layout.config
    rules, shards = axis_rules(config, mesh), row_shards(mesh)

    def rows_of(both: tuple[Params, Params], micro: Batch[jax.Array], shape: RowShape) -> jax.Array:
        with nn.logical_axis_rules(rules):
            states = [hidden_states(p, micro, shape, ModelOptions(config, layout.dtype))[0] for p in both]
            hidden = [jnp.take_along_axis(h, micro.source[:, :, None], axis=1) for h in states]
            kl_BN = token_kl(hidden, [unembedding(p) for p in both], softcap=config.final_logit_softcapping)
        kl_BN = jnp.where(micro.segments[:, shape.prompt :] > 0, kl_BN, 0.0)
        return jnp.stack([x.sum(1) for x in jnp.split(kl_BN, DRAWS, axis=1)], axis=1)

    def step(params: Params, ref_params: Params, batch: Batch[jax.Array], shape: RowShape) -> jax.Array:
        both = tuple(jax.tree.map(lambda p: p.astype(layout.dtype), tree) for tree in (params, ref_params))
        return jax.lax.map(lambda micro: rows_of(both, micro, shape), batch)  # few rows at a time

    compiled = jax.jit(step, static_argnames="shape", out_shardings=replicated(mesh))
    multiple = row_limits(config, shards, layout.platform).width_multiple

    def divergence(params: Params, ref_params: Params, answers: Sequence[Group]) -> np.ndarray:
        longest = max(len(prompt) for prompt, *_ in answers)
        placed = np.pad(np.arange(len(answers)), (0, -len(answers) % shards), constant_values=-1)
        prompt, answer = (-(-n // multiple) * multiple for n in (longest, new_tokens))
        shape, mine = RowShape(prompt, (answer,) * DRAWS, len(placed)), local_rows(mesh, shards)
        rows = build_rows(answers, placed[:, None], shape)
        batch = rows.map(lambda x: x.reshape(-1, shards, *x.shape[1:])[:, mine])
        nats = compiled(params, ref_params, to_global(batch, mesh, shards), shape)
        return jax.device_get(nats).astype(np.float64).reshape(-1, DRAWS)[: len(answers)]

    return divergence


def kl_request(prompts: Sequence[Sequence[int]], *, new_tokens: int, seed: int) -> AnswerRequest:
    """What an estimate needs of the policy: `DRAWS` answers to each prompt.

    Args:
      new_tokens: the most tokens of an answer: what is estimated is the divergence of the answers' first so many.
      seed: of the draws; the same at every estimate, so that it changes by what the policy has learned.
    """
    return AnswerRequest(prompts, SamplingParams(n=DRAWS, max_tokens=new_tokens, seed=seed))


def make_on_policy_kl(
    layout: Layout, request: AnswerRequest
) -> Callable[[Params, Params, Sequence[Sequence[Answer]]], dict[str, float]]:
    """Build `estimate(params, ref_params, answers)`: the KL divergence of the policy's answers from the reference's.

    Args:
      layout: of both models.
      request: from `kl_request`; `answers` are the policy's to it.

    Returns:
      `estimate`, whose values are `kl`: the mean over answers, in nats an answer; `kl_error`: its standard error, by
      prompts (not of a single one); `kl_per_token`: the same sum over the number of tokens. Every process of several
      must call it.
    """
    divergence = make_divergence(layout, request.asked.max_tokens)

    def estimate(params: Params, ref_params: Params, drawn: Sequence[Sequence[Answer]]) -> dict[str, float]:
        groups = [
            tuple(np.asarray(ids, np.int32) for ids in (prompt, *(answer.token_ids for answer in answers)))
            for prompt, answers in zip(request.prompts, drawn, strict=True)
        ]
        beat("computing the KL divergence", LONGER)
        nats = divergence(params, ref_params, groups)
        means = nats.mean(axis=1)
        error = {"kl_error": float(means.std(ddof=1) / len(means) ** 0.5)} if len(means) > 1 else {}
        tokens = sum(len(ids) for _, *answers in groups for ids in answers)
        return {"kl": float(means.mean()), "kl_per_token": float(nats.sum() / tokens)} | error

    return estimate

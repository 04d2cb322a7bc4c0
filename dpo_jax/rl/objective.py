"""What a step of RL minimises: rewards of answers and log-probabilities of their tokens to a loss, and metrics.

All of it is inside the jitted step: the reference's log-probabilities, the penalty that is taken from rewards, the
advantages, ratios, the loss.

Shapes: as in `estimators.py`; K groups in a row, n answers of a group, N tokens of a row.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.objective.logps import Logps
from dpo_jax.objective.objective import Groups, Objective
from dpo_jax.objective.rl_table import RL_LOSSES, RlOptions
from dpo_jax.rl import estimators
from dpo_jax.rl.estimators import of_tokens, sums_of_tokens

FURTHEST = "sampling/logp_difference_max"


def rl_objective(o: RlOptions) -> Objective:
    """The objective of answers with `Batch.rewards` and `Batch.drawn_logps`; `Logps.of_tokens` must be there.

    Its metrics, as means over a batch: `loss`; `kl`, Σ_t (log π − log π_ref) of an answer in nats, where there is a
    reference; `entropy`, nats a token; `clip_ratio`, the share of tokens (of answers, where a ratio is of those) whose
    ratio the clip bound; `sampling/logp_difference_mean` and `_max`, between the sampler's log-probability of a token
    and the learner's.
    """
    facts = RL_LOSSES[o.loss]
    low = facts.low if o.clip_low is None else o.clip_low
    high = facts.high if o.clip_high is None else o.clip_high

    def values(policy: Logps, reference: Logps | None, batch: Groups, tokens_n: jax.Array) -> dict[str, jax.Array]:
        K, n = batch.completion_tokens.shape[-2:]
        assert batch.owner is not None
        assert batch.drawn_logps is not None
        assert policy.of_tokens is not None
        assert policy.entropy is not None
        owner, real, drawn = batch.owner, batch.owner >= 0, batch.drawn_logps
        total = lambda x: sums_of_tokens(x, owner, (K, n))  # [..., K, n]
        length = jnp.maximum(batch.completion_tokens, 1).astype(jnp.float32)
        logps = jnp.where(real, policy.of_tokens, 0.0)
        old = jax.lax.stop_gradient(logps) if batch.old_logps is None else batch.old_logps
        ref = None
        if reference is not None:
            assert reference.of_tokens is not None
            ref = jnp.where(real, jax.lax.stop_gradient(reference.of_tokens), 0.0)

        rewards, scored = _rewards(batch)
        if o.kl == "k1" and ref is not None:
            rewards = rewards - o.kl_coef * total(old - ref)
        advantage = estimators.ADVANTAGES[o.advantage](rewards, scored)

        # The loss of every token, or of every answer where ratios are of those; weights and penalties are of tokens.
        log_ratio = logps - old
        weight = jnp.where(real, 1.0, 0.0)
        if o.correction_cap and facts.ratio != "sequence":
            weight = weight * estimators.truncated_weight(old - drawn, o.correction_cap)
        if facts.ratio == "token":
            loss, bound = _bounded(facts.clip, jnp.exp(log_ratio), logps, of_tokens(advantage, owner), low, high)
            per_answer, bound = total(loss * weight), total(jnp.where(bound, 1.0, 0.0)) / length
        else:
            ratio = jnp.exp(total(log_ratio) / (length if facts.ratio == "answer" else 1.0))
            loss, bound = _bounded(facts.clip, ratio, logps, advantage, low, high)
            if facts.ratio == "answer":
                loss = loss * total(weight)  # as often as the answer has tokens
            elif o.correction_cap:
                loss = loss * estimators.truncated_weight(total(old - drawn), o.correction_cap)
            per_answer, bound = loss, jnp.where(bound, 1.0, 0.0)
        if o.kl in estimators.KL_IN_LOSS and ref is not None:
            per_answer = per_answer + o.kl_coef * total(estimators.KL_IN_LOSS[o.kl](logps, ref, old))

        tokens = tokens_n.sum()
        together = tokens if batch.drawn_tokens is None else batch.drawn_tokens[..., None]
        over: dict[str, Any] = {
            "answer": n * length,
            "most": n * o.max_tokens,
            "sum": n,
            "tokens": tokens,
            "drawn": together,
        }
        apart = jnp.where(real, jnp.abs(old - drawn), 0.0)
        out = {
            "loss": jnp.sum(per_answer / over[facts.average], axis=-1),
            "entropy": jnp.sum(total(jnp.where(real, policy.entropy, 0.0)), axis=-1) / tokens,
            "clip_ratio": _share(bound, length, facts.ratio == "token", tokens_n),
            "sampling/logp_difference_mean": jnp.sum(total(apart), axis=-1) / tokens,
            # Of the row that a group is in, which is all that the largest one of a batch needs.
            FURTHEST: jnp.broadcast_to(jnp.max(apart, axis=-1, keepdims=True), batch.is_group.shape),
        }
        if ref is not None:
            out["kl"] = jnp.mean(total(jax.lax.stop_gradient(logps) - ref), axis=-1)
        return {name: x if name == "loss" else jax.lax.stop_gradient(x) for name, x in out.items()}

    return Objective(values, "loss", o.kl_coef > 0, across=o.across, balance=o.balance)


def _rewards(batch: Groups) -> tuple[jax.Array, jax.Array]:
    """Rewards, 0 where there is none, and which answers have one."""
    assert batch.rewards is not None
    scored = jnp.isfinite(batch.rewards) & batch.is_group[..., None]
    return jnp.where(scored, batch.rewards, 0.0), scored


def _bounded(
    clip: str, ratio: jax.Array, logps: jax.Array, advantage: jax.Array, low: float, high: float
) -> tuple[jax.Array, jax.Array]:
    if clip == "both":
        return estimators.clipped(ratio, advantage, low, high)
    if clip == "weight":
        return estimators.weighted(ratio, logps, advantage, high)
    return -ratio * advantage, jnp.zeros(ratio.shape, bool)


def _share(bound: jax.Array, length: jax.Array, of_tokens: bool, tokens_n: jax.Array) -> jax.Array:
    if of_tokens:
        return jnp.sum(bound * length, axis=-1) / tokens_n.sum()
    return jnp.mean(bound, axis=-1)

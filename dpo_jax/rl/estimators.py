"""Estimators of RL against a reward: pure functions of what was drawn. Advantages, KL penalties, ratios, weights.

Shapes: `[..., K, n]` for K groups of n answers to a prompt, of a whole batch with its rows (and microbatches) in front;
`[..., N]` for the tokens of a row. `owner`, int `[..., N]`, says whose a token is: group · n + answer, -1 for padding.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

EPSILON = 1e-4  # beside a standard deviation, as TRL has it


def of_tokens(values: jax.Array, owner: jax.Array) -> jax.Array:
    """A number of every answer `[..., K, n]` as one of each of its tokens, `[..., N]`; 0 for padding."""
    flat = values.reshape(*values.shape[:-2], -1)
    return jnp.where(owner >= 0, jnp.take_along_axis(flat, jnp.maximum(owner, 0), axis=-1), 0.0)


def sums_of_tokens(values: jax.Array, owner: jax.Array, groups: tuple[int, int]) -> jax.Array:
    """The sum of a number `[..., N]` over the tokens of every answer, `[..., *groups]` with groups = (K, n)."""
    K, n = groups
    # No matrix product: a TPU's would round float32 values to bfloat16.
    mine = owner[..., None] == jnp.arange(K * n).reshape((1,) * owner.ndim + (-1,))
    return jnp.sum(jnp.where(mine, values[..., None], 0.0), axis=-2).reshape(*values.shape[:-1], K, n)


def _mean(rewards: jax.Array, scored: jax.Array, axis: int | None) -> jax.Array:
    count = jnp.maximum(jnp.sum(scored, axis=axis, keepdims=True), 1)
    return jnp.sum(jnp.where(scored, rewards, 0.0), axis=axis, keepdims=True) / count


def _std(rewards: jax.Array, scored: jax.Array, axis: int | None) -> jax.Array:
    """With Bessel's correction; 0 of one."""
    count = jnp.sum(scored, axis=axis, keepdims=True)
    away = jnp.where(scored, rewards - _mean(rewards, scored, axis), 0.0)
    return jnp.sqrt(jnp.sum(away * away, axis=axis, keepdims=True) / jnp.maximum(count - 1, 1))


def _teaches(rewards: jax.Array, scored: jax.Array) -> jax.Array:
    """Which answers have a reward and are not all worth the same as the others: a mean may be off by rounding."""
    least = jnp.min(jnp.where(scored, rewards, jnp.inf), axis=-1, keepdims=True)
    most = jnp.max(jnp.where(scored, rewards, -jnp.inf), axis=-1, keepdims=True)
    return scored & (most > least)


def centred(rewards: jax.Array, scored: jax.Array) -> jax.Array:
    """A_i = r_i − mean(r of the group). Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783."""
    return jnp.where(_teaches(rewards, scored), rewards - _mean(rewards, scored, -1), 0.0)


def group(rewards: jax.Array, scored: jax.Array) -> jax.Array:
    """A_i = (r_i − mean(r)) / (std(r) + ε) of the group. Shao et al. 2024 (GRPO), arXiv 2402.03300, section 4.1.2."""
    return centred(rewards, scored) / (_std(rewards, scored, -1) + EPSILON)


def leave_one_out(rewards: jax.Array, scored: jax.Array) -> jax.Array:
    """A_i = r_i − mean(r of the others of the group). Ahmadian et al. 2024 (RLOO), arXiv 2402.14740, equation 7."""
    count = jnp.sum(scored, axis=-1, keepdims=True)
    total = jnp.sum(jnp.where(scored, rewards, 0.0), axis=-1, keepdims=True)
    others = (total - rewards) / jnp.maximum(count - 1, 1)
    return jnp.where(_teaches(rewards, scored), rewards - others, 0.0)


def batch(rewards: jax.Array, scored: jax.Array) -> jax.Array:
    """A_i = (r_i − mean(r of the group)) / (std(r of the batch) + ε). REINFORCE++, arXiv 2501.03262."""
    return centred(rewards, scored) / (_std(rewards, scored, None) + EPSILON)


def whitened(rewards: jax.Array, scored: jax.Array) -> jax.Array:
    """Leave-one-out, then (A_i − mean(A)) / (std(A) + ε) over the batch, as TRL's RLOO with normalize_advantages."""
    found = leave_one_out(rewards, scored)
    away = found - _mean(found, scored, None)
    return jnp.where(scored, away / (_std(found, scored, None) + EPSILON), 0.0)


# (rewards `[..., K, n]`, which answers have one) → what is learned from each, 0 where it has no reward
ADVANTAGES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "centred": centred,
    "group": group,
    "leave_one_out": leave_one_out,
    "batch": batch,
    "whitened": whitened,
}


def k2(logps: jax.Array, reference: jax.Array) -> jax.Array:
    """½ (log π − log π_ref)² of a token, whose gradient is that of KL(π ‖ π_ref) on the policy's own answers.

    Schulman 2020, http://joschu.net/blog/kl-approx.html; its gradient: Liu et al. 2025, arXiv 2510.01555.
    """
    return 0.5 * jnp.square(logps - reference)


def k3(logps: jax.Array, reference: jax.Array) -> jax.Array:
    """π_ref/π − 1 − log(π_ref/π) of a token, whose mean is KL(π ‖ π_ref) and whose gradient is that of KL(π_ref ‖ π).

    Schulman 2020; GRPO's penalty (arXiv 2402.03300, equation 4).
    """
    log_ratio = reference - logps
    return jnp.exp(log_ratio) - log_ratio - 1


def k3_weighted(logps: jax.Array, reference: jax.Array, old: jax.Array) -> jax.Array:
    """π/π_old · k3 of a token, whose mean and gradient are those of KL(π ‖ π_ref); TRL's default in the loss.

    DeepSeek-AI 2025, arXiv 2512.02556, section 3.1. The ratio counts even where it is 1: it has a gradient.
    """
    return jnp.exp(logps - old) * k3(logps, reference)


# (log π, log π_ref, log π_old) → the penalty that is added to the loss of a token. k1, log π − log π_ref, is taken from
# the reward instead.
KL_IN_LOSS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "k2": lambda logps, reference, old: k2(logps, reference),
    "k3": lambda logps, reference, old: k3(logps, reference),
    "k3_weighted": k3_weighted,
}


def truncated_weight(log_ratio: jax.Array, cap: float) -> jax.Array:
    """min(π_old/π_drawn, cap), constant to the gradient: what corrects for a sampler of other probabilities.

    Yao et al. 2025 (truncated importance sampling), as verl's rollout correction has it.
    """
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(jnp.minimum(log_ratio, 20.0)), cap))


def clipped(ratio: jax.Array, advantage: jax.Array, low: float, high: float) -> tuple[jax.Array, jax.Array]:
    """−min(ρ A, clip(ρ, 1 − low, 1 + high) A), and whether the clip bound it. PPO, arXiv 1707.06347."""
    loss = -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage)
    bound = ((ratio < 1 - low) & (advantage < 0)) | ((ratio > 1 + high) & (advantage > 0))
    return loss, bound


def weighted(ratio: jax.Array, logps: jax.Array, advantage: jax.Array, high: float) -> tuple[jax.Array, jax.Array]:
    """−sg(min(ρ, high)) A log π, and whether the clip bound it. CISPO, arXiv 2506.13585, equation 4."""
    loss = -jax.lax.stop_gradient(jnp.minimum(ratio, high)) * advantage * logps
    return loss, (ratio > high) & (advantage > 0)

"""What a step minimises: weighted losses of `losses.py` and what a run logs of every pair.

Shapes: M microbatches (absent where one is looked at alone), B rows, K groups in a row, n completions of a group.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.objective.logps import Logps, TokenWeights
from dpo_jax.objective.losses import LOSSES, Scored, difference
from dpo_jax.objective.table import LOSS_FACTS, needs_reference


class Groups(Protocol):
    """What an objective reads of a batch, see `rows.batch.Batch`: which groups there are, and their completions."""

    @property
    def is_group(self) -> jax.Array: ...

    @property
    def completion_tokens(self) -> jax.Array: ...

    @property
    def margin(self) -> jax.Array | None: ...

    @property
    def owner(self) -> jax.Array | None: ...

    @property
    def rewards(self) -> jax.Array | None: ...

    @property
    def drawn_logps(self) -> jax.Array | None: ...

    @property
    def old_logps(self) -> jax.Array | None: ...

    @property
    def drawn_tokens(self) -> jax.Array | None: ...


# (policy's log-probabilities, the reference's or None, the groups' part of the batch, mean tokens `[n]` of completions
# over the whole batch) -> metrics of every group
Values = Callable[[Logps, Logps | None, Groups, jax.Array], dict[str, jax.Array]]

# (the policy's log-probabilities of all groups of a set, the reference's or None, tokens of completions, margins or
# None) -> metrics of every group; arrays of NumPy
SetValues = Callable[[Logps, Logps | None, np.ndarray, np.ndarray | None], Mapping[str, np.ndarray]]
# How a value of every group becomes one of a batch, where that is not the mean.
EXTREMES: dict[str, Callable[..., jax.Array]] = {
    "min_reward": jnp.min,
    "max_reward": jnp.max,
    "sampling/logp_difference_max": jnp.max,
}

# Relative error of a summed float32 log-probability: in float32, equal models then have an accuracy of exactly 0.
ROUNDING = 1e-6
# Exponents of f-divergences end here, as TRL's alpha-divergence has it: float32 ends at 88.
LARGEST_EXPONENT = 80.0


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
      values: log-probabilities `[B, K, n]` (or `[M, B, K, n]`) → metrics of every group `[B, K]` by name. Those in
        `EXTREMES` become the least or the greatest of a batch, the others means.
      loss: the name in `values` whose mean over the batch's groups is minimised.
      needs_reference: whether the reference's forward pass runs.
      across: whether a group's value depends on the other groups, so that `values` must see the whole batch at once.
      balance: weight of the experts' load-balancing loss, which comes on top; 0 where there is none.
    """

    values: Values
    loss: str
    needs_reference: bool
    across: bool = False
    balance: float = 0.0


class _Set(NamedTuple):
    """The groups of a set, without their tokens: `[N]` and `[N, n]`."""

    is_group: jax.Array
    completion_tokens: jax.Array
    margin: jax.Array | None = None
    owner: jax.Array | None = None
    rewards: jax.Array | None = None
    drawn_logps: jax.Array | None = None
    old_logps: jax.Array | None = None
    drawn_tokens: jax.Array | None = None


def reduced(values: Mapping[str, jax.Array], is_group: jax.Array) -> dict[str, jax.Array]:
    """Values of groups to one of all that are there: sums, or extremes."""
    # Masked first, so that padding can hold anything finite or not.
    return {
        name: EXTREMES[name](jnp.where(is_group, value, jnp.inf if EXTREMES[name] is jnp.min else -jnp.inf))
        if name in EXTREMES
        else jnp.sum(jnp.where(is_group, value, 0.0))
        for name, value in values.items()
    }


def together(parts: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Reduced values of the parts of a batch, `[parts]`, to those of the batch."""
    return {name: EXTREMES.get(name, jnp.sum)(value, axis=0) for name, value in parts.items()}


def mean_tokens(groups: Groups) -> jax.Array:
    """Mean tokens `[n]` of the completions of a group, over all groups; at least one token in all."""
    tokens = jnp.sum(groups.completion_tokens, axis=tuple(range(groups.completion_tokens.ndim - 1)))
    return jnp.maximum(tokens, 1).astype(jnp.float32) / jnp.maximum(jnp.sum(groups.is_group), 1)


def make_set_values(objective: Objective) -> SetValues:
    """Build the values of every group of a set that is scored in parts: those it has in one batch of the whole set.

    A loss that divides by the tokens of a batch (`sft`), or that compares its groups with each other (`aot`), has
    another value in another batch; taken over the whole set it does not depend on how the set was cut.

    They are `[N]` by name, of log-probabilities `[N, n]` of N groups.
    """

    @jax.jit
    def values(
        policy: Logps, reference: Logps | None, tokens_Nn: jax.Array, margin_N: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        groups = _Set(jnp.ones(tokens_Nn.shape[:1], bool), tokens_Nn, margin_N)
        return objective.values(policy, reference, groups, mean_tokens(groups))

    return lambda *scored: jax.device_get(values(*scored))


def _alpha(log_ratio: jax.Array, alpha: float) -> jax.Array:
    if abs(alpha - 1) < 1e-6:
        return log_ratio
    return (jnp.exp(jnp.minimum((alpha - 1) * log_ratio, LARGEST_EXPONENT)) - 1) / (alpha - 1)


# f'(t) of f-DPO (Wang et al. 2023, arXiv 2309.16240) by log t = log(π/π_ref): log t, 1 − 1/t, log(2t/(1+t)), and
# (t^(α−1) − 1)/(α−1), which is the first for α → 1 and the second for α = 0. Constants cancel in a difference.
DIVERGENCES: dict[str, Callable[[jax.Array, float], jax.Array]] = {
    "reverse_kl": lambda log_ratio, alpha: log_ratio,
    "forward_kl": lambda log_ratio, alpha: 1 - jnp.exp(jnp.minimum(-log_ratio, LARGEST_EXPONENT)),
    "js": lambda log_ratio, alpha: math.log(2) + jax.nn.log_sigmoid(log_ratio),
    "alpha": _alpha,
}


def _wpo_weight(policy: Logps, tokens: jax.Array) -> jax.Array:
    """WPO's weight of a pair: how likely the policy itself would have said both completions; constant to the gradient.

    exp(mean over tokens of log π(token) − log Σ_v π(v)²), the product of both completions. Zhou et al. 2024, arXiv
    2406.11827, equation 2 with its sampled alignment. Every loss of a pair is weighted, `sft` too (in TRL the
    mean of `sft` by the mean weight).
    """
    assert policy.log_sum_sq is not None
    return jax.lax.stop_gradient(jnp.exp(jnp.sum((policy.all_whole - policy.log_sum_sq) / tokens, axis=-1)))


def ld_weights(alpha: float) -> TokenWeights | None:
    """LD-DPO's weights of completion tokens, for the policy and for the reference; None where α = 1: all count whole.

    Of a pair whose shorter completion has l tokens, a completion's first l tokens count whole and the rest by α (Liu et
    al. 2024, arXiv 2409.06411).
    """

    def weights(number_BNK: jax.Array, groups: Groups) -> jax.Array:
        shared = number_BNK <= groups.completion_tokens.min(-1)[:, None, :]
        return jnp.where(shared, 1.0, alpha)

    return None if alpha == 1 else weights


def preference_objective(
    parts: Mapping[str, float],
    *,
    beta: float,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    wpo: bool = False,
    balance: float = 0.0,
    **hyperparameters: float,
) -> Objective:
    """A weighted sum of losses with DPO's metrics.

    Rewards are β·(log π − log π_ref) summed over the completion, whatever the loss; without a reference β·log π, per
    token where the loss is (as TRL's CPO and ORPO trainers have it; SimPO's γ is in no reward and no margin).

    Args:
      parts: weights by loss, from `table.parse_loss`.
      beta: of every part.
      f_divergence: a name in `DIVERGENCES`; `f_alpha` is the coefficient of `alpha`.
      wpo: whether every pair's losses are weighted by `_wpo_weight`; `Logps.log_sum_sq` must be there.
      balance: as in `Objective`; `Logps.balance` must be there.
      hyperparameters: by the names that the losses take.

    Returns:
      The objective. `dpo_loss` is the whole sum; of several parts each is there too, unweighted, as `loss_NAME`.
    """
    reference_needed = needs_reference(parts)
    per_token = any(LOSS_FACTS[name].per_token for name in parts) and not reference_needed
    known = {"beta": beta} | hyperparameters
    taken = {name: {k: known[k] for k in LOSS_FACTS[name].hyperparameters if k in known} for name in parts}

    def values(policy: Logps, reference: Logps | None, groups: Groups, tokens_n: jax.Array) -> dict[str, jax.Array]:
        assert (reference is not None) == reference_needed
        pairs = _scored(policy, reference, groups, tokens_n, lambda x: DIVERGENCES[f_divergence](x, f_alpha))
        losses = {name: LOSSES[name](pairs, **numbers) for name, numbers in taken.items()}
        if wpo:
            weight = _wpo_weight(policy, pairs.tokens)
            losses = {name: weight * loss for name, loss in losses.items()}
        weighted = [loss if parts[name] == 1 else parts[name] * loss for name, loss in losses.items()]
        single = {f"loss_{name}": loss for name, loss in losses.items()} if len(losses) > 1 else {}
        return {"dpo_loss": functools.reduce(operator.add, weighted)} | single | _rewards(pairs, beta, per_token)

    across = any(LOSS_FACTS[name].across for name in parts)
    return Objective(values, "dpo_loss", reference_needed, across, balance)


def _scored(policy: Logps, reference: Logps | None, groups: Groups, tokens_n: jax.Array, divergence) -> Scored:
    return Scored(
        policy=policy.logps,
        reference=None if reference is None else reference.logps,
        scores=None if reference is None else divergence(policy.logps - reference.logps),
        tokens=jnp.maximum(groups.completion_tokens, 1).astype(jnp.float32),
        chosen_logp=policy.all_whole[..., 0],
        chosen_tokens=tokens_n[0],
        is_pair=groups.is_group,
    )


def _rewards(pairs: Scored, beta: float, per_token: bool) -> dict[str, jax.Array]:
    if pairs.reference is None:
        rewards = beta * (pairs.policy / pairs.tokens if per_token else pairs.policy)
        margin, noise = difference(rewards), jnp.zeros(())
    else:
        ratios = pairs.policy - pairs.reference
        rewards = beta * ratios
        margin = beta * difference(ratios)
        # The two forward passes are compiled apart and may differ in the last bits: below that, nothing is preferred.
        noise = beta * ROUNDING * jnp.sum(jnp.abs(pairs.policy), axis=-1)
    return {
        "accuracy": (rewards[..., 0] > rewards[..., 1] + noise).astype(jnp.float32),
        "margin": margin,
        "chosen_reward": rewards[..., 0],
        "rejected_reward": rewards[..., 1],
        "chosen_logp": pairs.policy[..., 0],
        "rejected_logp": pairs.policy[..., 1],
    }


def sft_objective() -> Objective:
    """Mean negative log-likelihood per token of all completions of the groups."""

    values = lambda policy, _, groups, tokens_n: {"loss": -policy.all_whole.sum(-1) / tokens_n.sum()}
    return Objective(values, "loss", needs_reference=False)


def reward_objective(*, center: float = 0.0, balance: float = 0.0) -> Objective:
    """What a reward model of Bradley and Terry's minimises: −log σ(r_c − r_r − m) + center · (r_c + r_r)².

    r are the scores of chosen and rejected and m is the pair's margin (Touvron et al. 2023, arXiv 2307.09288, equation
    2); the second term keeps scores around 0, which no comparison does (Eisenstein et al. 2023, arXiv 2312.09244).
    `accuracy` is the share of pairs whose chosen completion has the higher score, `margin` the mean of r_c − r_r;
    `mean_reward`, `min_reward` and `max_reward` are of all completions.

    Args:
      center: the weight of the second term.
      balance: as in `Objective`.
    """

    def values(policy: Logps, reference: Logps | None, groups: Groups, tokens_n: jax.Array) -> dict[str, jax.Array]:
        chosen, rejected = policy.logps[..., 0], policy.logps[..., 1]
        wanted = 0.0 if groups.margin is None else groups.margin
        loss = -jax.nn.log_sigmoid(chosen - rejected - wanted) + center * jnp.square(chosen + rejected)
        return {
            "loss": loss,
            "accuracy": (chosen > rejected).astype(jnp.float32),
            "margin": chosen - rejected,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "mean_reward": (chosen + rejected) / 2,
            "min_reward": jnp.minimum(chosen, rejected),
            "max_reward": jnp.maximum(chosen, rejected),
        }

    return Objective(values, "loss", needs_reference=False, balance=balance)


def label_objective(*, balance: float = 0.0) -> Objective:
    """What a generative preference model minimises: −log π of the right label after a comparison, its first completion.

    `accuracy` is the share of comparisons whose right label is more likely than the other one, `margin` the mean
    difference of their log-probabilities.
    """

    def values(policy: Logps, reference: Logps | None, groups: Groups, tokens_n: jax.Array) -> dict[str, jax.Array]:
        right, other = policy.logps[..., 0], policy.logps[..., 1]
        return {
            "loss": -right,
            "accuracy": (right > other).astype(jnp.float32),
            "margin": right - other,
            "chosen_logp": right,
            "rejected_logp": other,
        }

    return Objective(values, "loss", needs_reference=False, balance=balance)

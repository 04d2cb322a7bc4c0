"""Verdicts to win rates: raw, with its error over prompts, and with equal lengths. NumPy alone.

A verdict is what a `PreferenceModel` says: +1, the second completion that it was shown is better; NaN, nothing. A pair
is judged in both orders: `forward` is the verdict on (A, B) and `backward` the one on (B, A).
"""

import math
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
_BLOCK = 1 << 20  # draws held at once
# Weight of the penalty in `fit_logistic`: AlpacaEval's C = 100, where it does not choose one by cross-validation.
PENALTY = 0.01
_STEPS, _CLOSE = 100, 1e-12  # Newton's: at most so many, until the gradient is so small a part of the weights


@dataclass(frozen=True)
class WinRate:
    """How often A wins against B, over prompts.

    Attributes:
      rate: mean of `wins_of`, over the answers of a prompt first and then over prompts; NaN without any verdict.
      error: standard error of `rate` by bootstrap over prompts; NaN below two prompts.
      wins, ties, losses: shares of verdicts for A, for none (exactly 0) and for B, weighted as in `rate`.
      agreement: share of pairs of which both orders name the same one (or none), weighted as in `rate`.
      prompts, comparisons: with a verdict.
      no_verdict: comparisons without one in some order, which are left out of all the above.
    """

    rate: float
    error: float
    wins: float
    ties: float
    losses: float
    agreement: float
    prompts: int
    comparisons: int
    no_verdict: int


@dataclass(frozen=True)
class LengthControlled:
    """A win rate at equal lengths: `rate`, its standard error, and `slope`, what a longer answer gains (logits)."""

    rate: float
    error: float
    slope: float


def wins_of(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """How much A wins, float64 `[n]`: 1 always, 0.5 a tie, 0 never; NaN where an order has no verdict.

    (r(B, A) - r(A, B) + 2) / 4, where r is +1 if the second that is shown is better. tinker-cookbook writes
    (r(A, B) - r(B, A) + 2) / 4, which is B's win rate in this convention, and A's where r is +1 for the first.

    >>> wins_of(np.array([-1.0, 1.0, 1.0]), np.array([1.0, 1.0, -1.0])).tolist()
    [1.0, 0.5, 0.0]
    """
    return (np.asarray(backward, np.float64) - np.asarray(forward, np.float64) + 2) / 4


def both_orders_verdict(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Verdicts on (A, B) and on (B, A) to one, `[n]`: half their difference; +1 B is better, NaN where either has none.

    What a judge has for a place falls out, and exchanging A and B negates it exactly.
    """
    return (np.asarray(forward, np.float64) - np.asarray(backward, np.float64)) / 2


def win_rate(forward: np.ndarray, backward: np.ndarray, groups: np.ndarray, *, seed: int = 0) -> WinRate:
    """The win rate of A over B.

    Args:
      forward, backward: verdicts on (A, B) and on (B, A), `[n]`.
      groups: the number of each comparison's prompt, integers `[n]`.
      seed: of the bootstrap.
    """
    forward, backward = np.asarray(forward, np.float64), np.asarray(backward, np.float64)
    wins, groups = wins_of(forward, backward), np.asarray(groups)
    there = ~np.isnan(wins)
    verdict = both_orders_verdict(forward, backward)[there]
    of_prompt = lambda values: group_means(values, groups[there])
    means = of_prompt(wins[there])
    # The two orders agree where each, turned to the same sides, has the same sign.
    same = np.sign(forward[there]) == -np.sign(backward[there])
    wins_, ties, losses, agreement = (
        mean_or_nan(of_prompt(part.astype(np.float64))) for part in (verdict < 0, verdict == 0, verdict > 0, same)
    )
    return WinRate(
        rate=mean_or_nan(means),
        error=bootstrap_error(means, seed=seed),
        wins=wins_,
        ties=ties,
        losses=losses,
        agreement=agreement,
        prompts=len(means),
        comparisons=int(there.sum()),
        no_verdict=int((~there).sum()),
    )


def group_means(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Means of `values` `[n]` by `groups` `[n]`, in the groups' ascending order."""
    _, which, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return np.bincount(which, values, minlength=len(counts)) / counts


def mean_or_nan(values: np.ndarray) -> float:
    """The mean; NaN, without a warning, of no values."""
    return float(np.mean(values)) if len(values) else math.nan


def bootstrap_error(values: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> float:
    """Standard error of the mean of `values` `[n]` by the bootstrap: the spread of the means of n values drawn again.

    The same values give the same error. With more and more resamples it tends to the analytic std / sqrt(n), std with
    n as divisor; with 10,000 it is within some 0.7% of that (1 / sqrt(2 * 10,000)). NaN below two values.
    """
    values = np.asarray(values, np.float64)
    n = len(values)
    if n < 2:
        return math.nan
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // n)
    means = [
        values[rng.integers(n, size=(min(block, resamples - start), n), dtype=np.int32)].mean(1)
        for start in range(0, resamples, block)
    ]
    return float(np.concatenate(means).std())


def length_controlled(
    wins: np.ndarray, length_differences: np.ndarray, groups: np.ndarray, *, penalty: float = PENALTY
) -> LengthControlled:
    """The win rate of A where both answers were equally long, after AlpacaEval's length-controlled one.

    logit P(A wins) = theta + phi * tanh((length_A - length_B) / std), std of the differences over all comparisons; the
    rate is that at a difference of zero, 1 / (1 + exp(-theta)). AlpacaEval's third term, how difficult each of its
    805 instructions is, is fitted over all models of its leaderboard, and its ridge towards shortened and lengthened
    baselines needs those: of one pair of models neither can be known, and both are left out. Dubois et al. 2024,
    Length-Controlled AlpacaEval, arXiv 2404.04475.

    Exchanging A and B gives 1 - rate. Every prompt has the same weight. The error is by the sandwich estimator with
    prompts as clusters, at this std.

    Args:
      wins: `wins_of` `[n]`; fractions are targets of the regression as they are; NaN is left out.
      length_differences: length of A's answer less that of B's `[n]`.
      groups: the number of each comparison's prompt `[n]`.
      penalty: see `fit_logistic`; it keeps theta finite where A always wins.
    """
    wins, differences = np.asarray(wins, np.float64), np.asarray(length_differences, np.float64)
    there = ~np.isnan(wins) & ~np.isnan(differences)
    wins, differences = wins[there], differences[there]
    _, which, counts = np.unique(np.asarray(groups)[there], return_inverse=True, return_counts=True)
    if len(counts) < 2:
        return LengthControlled(math.nan, math.nan, math.nan)
    spread = float(differences.std(ddof=1))
    term = np.tanh(differences / spread) if spread else np.zeros_like(differences)
    features, weights = np.stack([np.ones_like(term), term], 1), 1 / counts[which]
    theta, phi = fit_logistic(features, wins, weights, penalty=penalty)
    covariance = _clustered_covariance(features, wins, weights, np.array([theta, phi]), which, penalty)
    rate = float(_logistic(theta))
    return LengthControlled(rate, rate * (1 - rate) * math.sqrt(covariance[0, 0]), float(phi))


def fit_logistic(
    features: np.ndarray, targets: np.ndarray, weights: np.ndarray, *, penalty: float = PENALTY
) -> np.ndarray:
    """Coefficients `[k]` of a logistic regression without an intercept of its own, by Newton's method.

    They minimise sum_i weights_i * cross entropy(targets_i, logistic(features_i . c)) + penalty / 2 * |c|^2, which is
    strictly convex: there is one minimum, and it is finite also where the targets can be separated.

    Args:
      features: `[n, k]`; targets: from 0 to 1 `[n]`; weights: `[n]`; penalty: above 0.
    """
    features, targets = np.asarray(features, np.float64), np.asarray(targets, np.float64)
    coefficients = np.zeros(features.shape[1])

    def cost(c: np.ndarray) -> float:
        logits = features @ c
        return float(weights @ (np.logaddexp(0, logits) - targets * logits) + penalty / 2 * c @ c)

    for _ in range(_STEPS):
        chance = _logistic(features @ coefficients)
        gradient = features.T @ (weights * (chance - targets)) + penalty * coefficients
        if np.abs(gradient).max() <= _CLOSE * max(1.0, float(weights.sum())):
            break
        step = np.linalg.solve(_curvature(features, weights, chance, penalty), gradient)
        size, now = 1.0, cost(coefficients)
        # Newton overshoots where chances are near 0 or 1; a shorter step of the same direction always goes down.
        while size > 1e-9 and cost(coefficients - size * step) > now:
            size /= 2
        if size <= 1e-9:  # as low as rounding lets it go
            break
        coefficients = coefficients - size * step
    return coefficients


def _clustered_covariance(
    features: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    coefficients: np.ndarray,
    clusters: np.ndarray,
    penalty: float,
) -> np.ndarray:
    """H^-1 (sum_g s_g s_g^T) H^-1 `[k, k]`: of the coefficients, whatever the dependence within a cluster g."""
    chance = _logistic(features @ coefficients)
    scores = features * (weights * (targets - chance))[:, None]
    sums = np.stack([np.bincount(clusters, column) for column in scores.T], 1)
    bread = np.linalg.inv(_curvature(features, weights, chance, penalty))
    return bread @ (sums.T @ sums) @ bread


def _curvature(features: np.ndarray, weights: np.ndarray, chance: np.ndarray, penalty: float) -> np.ndarray:
    return features.T @ (features * (weights * chance * (1 - chance))[:, None]) + penalty * np.eye(features.shape[1])


def _logistic(logits: np.ndarray | float) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -np.asarray(logits, np.float64)))

"""Preference losses: pure functions that return one number per pair.

Every loss takes pairs as `Scored` (`[..., 2]` arrays, index 0 chosen, 1 rejected) and, keyword-only, the
hyperparameters it names; it returns `[...]`. Callers mask and take the mean over the real pairs of a batch.
A new loss is a function here and a line of its name in `table.py`.

In the equations: r_w, r_l are the scores of the chosen and the rejected completion, log(π/π_ref) unless another
f-divergence is chosen; h = r_w − r_l; |y| counts a completion's tokens; σ is the logistic function.
"""

import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from dpo_jax.objective.table import LOSS_FACTS


@flax.struct.dataclass
class Scored:
    """Pairs as a loss sees them.

    Attributes:
      policy: log π of both completions, summed over their tokens (LD-DPO: weighted), `[..., 2]`.
      reference: log π_ref likewise; None without a reference.
      scores: f'(π/π_ref) of the f-divergence, for reverse KL the log-ratio, `[..., 2]`; None without a reference.
      tokens: of both completions, `[..., 2]`, at least 1.
      chosen_logp: log π of the chosen completion, every token counted whole, `[...]`.
      chosen_tokens: of the chosen completions, mean over the pairs of the whole batch; a scalar.
      is_pair: whether there is such a pair, `[...]`; only losses that compare pairs with each other need it.
    """

    policy: jax.Array
    reference: jax.Array | None
    scores: jax.Array | None
    tokens: jax.Array
    chosen_logp: jax.Array
    chosen_tokens: jax.Array
    is_pair: jax.Array


def difference(x: jax.Array) -> jax.Array:
    """Chosen minus rejected, `[..., 2]` → `[...]`."""
    return x[..., 0] - x[..., 1]


def _scores(pairs: Scored) -> jax.Array:
    """(r_w, r_l), `[..., 2]`."""
    assert pairs.scores is not None
    return pairs.scores


def _margin(pairs: Scored) -> jax.Array:
    """h. Taken model by model first, as TRL does: equal models then give exactly 0 and a loss of exactly ln 2."""
    return difference(_scores(pairs))


def _both(pairs: Scored) -> tuple[jax.Array, jax.Array]:
    """r_w and r_l."""
    return _scores(pairs)[..., 0], _scores(pairs)[..., 1]


def _smoothed(z: jax.Array, label_smoothing: float) -> jax.Array:
    """−(1−ε)·log σ(z) − ε·log σ(−z)."""
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(z) - label_smoothing * jax.nn.log_sigmoid(-z)


def sigmoid(pairs: Scored, *, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """DPO: −(1−ε)·log σ(β·h) − ε·log σ(−β·h), with ε the label smoothing.

    Rafailov et al. 2023, arXiv 2305.18290, equation 7; smoothing is conservative DPO (Mitchell 2023, "A note on DPO
    with noisy preferences"): ε is the probability that a label is flipped. TRL ignores it here.
    """
    return _smoothed(beta * _margin(pairs), label_smoothing)


def robust(pairs: Scored, *, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """Robust DPO: (−(1−ε)·log σ(β·h) + ε·log σ(−β·h)) / (1−2ε), unbiased under labels flipped with probability ε < 1/2.

    Chowdhury et al. 2024, arXiv 2403.00409, equation 12.
    """
    h = beta * _margin(pairs)
    clean, flipped = jax.nn.log_sigmoid(h), jax.nn.log_sigmoid(-h)
    return (-(1 - label_smoothing) * clean + label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge(pairs: Scored, *, beta: float) -> jax.Array:
    """Hinge on the normalised likelihood: max(0, 1 − β·h).

    Zhao et al. 2023 (SLiC), arXiv 2305.10425, applied to log-ratios as in Liu et al. 2023 (RSO), arXiv 2309.06657.
    """
    return jnp.maximum(0.0, 1.0 - beta * _margin(pairs))


def ipo(pairs: Scored, *, beta: float) -> jax.Array:
    """IPO: (r_w/|y_w| − r_l/|y_l| − 1/(2β))².

    Azar et al. 2023, arXiv 2310.12036, equation 17 (β is τ there); per token, as its authors meant it and TRL has it.
    """
    return (difference(_scores(pairs) / pairs.tokens) - 1 / (2 * beta)) ** 2


def exo_pair(pairs: Scored, *, beta: float, label_smoothing: float) -> jax.Array:
    """EXO on pairs: KL(p‖q) with p = (σ(β·h), σ(−β·h)) and q = (1−ε, ε); ε must be above 0, the paper has 1e-3.

    Ji et al. 2024, arXiv 2402.00856, equation 16.
    """
    h = beta * _margin(pairs)
    chosen = jax.nn.sigmoid(h) * (jax.nn.log_sigmoid(h) - math.log1p(-label_smoothing))
    return chosen + jax.nn.sigmoid(-h) * (jax.nn.log_sigmoid(-h) - math.log(label_smoothing))


def nca_pair(pairs: Scored, *, beta: float) -> jax.Array:
    """NCA: −log σ(β·r_w) − ½·log σ(−β·r_w) − ½·log σ(−β·r_l): absolute likelihoods, so that r_w does not fall.

    Chen et al. 2024, arXiv 2402.05369, with two completions.
    """
    chosen, rejected = _both(pairs)
    both = jax.nn.log_sigmoid(-beta * chosen) + jax.nn.log_sigmoid(-beta * rejected)
    return -jax.nn.log_sigmoid(beta * chosen) - 0.5 * both


def bco_pair(pairs: Scored, *, beta: float) -> jax.Array:
    """BCO on pairs: −log σ(β·r_w) − log σ(−β·r_l), a binary classifier of completions (no reward shift).

    Jung et al. 2024, arXiv 2404.04656.
    """
    chosen, rejected = _both(pairs)
    return -jax.nn.log_sigmoid(beta * chosen) - jax.nn.log_sigmoid(-beta * rejected)


def sppo_hard(pairs: Scored, *, beta: float) -> jax.Array:
    """SPPO with hard labels: (r_w − 1/(2β))² + (r_l + 1/(2β))².

    Wu et al. 2024, arXiv 2405.00675, equation 4.7 with winning probabilities 1 and 0.
    """
    chosen, rejected = _both(pairs)
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def _matched(x: jax.Array, y: jax.Array, is_pair: jax.Array) -> jax.Array:
    """For every x the y of the same rank, minus it: sort(x) − sort(y) at the places of x; 0 where there is no pair."""
    shape, n = x.shape, x.size
    real = is_pair.reshape(n)
    # Places without a pair come last in both orders, so real ones are matched with real ones.
    x, y = (jnp.where(real, v.reshape(n), jnp.inf) for v in (x, y))
    rank = jnp.argsort(jnp.argsort(jax.lax.stop_gradient(x)))
    return jnp.where(real, x - jnp.sort(y)[rank], 0.0).reshape(shape)


def aot(pairs: Scored, *, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """AOT: DPO's loss of sort(log π_w/π_l) − sort(log π_ref,w/π_ref,l), both sorted over the whole batch.

    The policy's log-ratios dominate the reference's in distribution, not pair by pair. Melnyk et al. 2024, arXiv
    2406.05882, paired variant. The value at a pair is that of its policy log-ratio's rank.
    """
    assert pairs.reference is not None
    delta = _matched(difference(pairs.policy), difference(pairs.reference), pairs.is_pair)
    return _smoothed(beta * delta, label_smoothing)


def aot_unpaired(pairs: Scored, *, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """AOT without pairs: DPO's loss of sort(r_w) − sort(r_l), each sorted over the whole batch.

    Melnyk et al. 2024, arXiv 2406.05882, unpaired variant. The value at a pair is that of its r_w's rank.
    """
    chosen, rejected = _both(pairs)
    return _smoothed(beta * _matched(chosen, rejected, pairs.is_pair), label_smoothing)


def apo_zero(pairs: Scored, *, beta: float) -> jax.Array:
    """APO-zero: 1 − σ(β·r_w) + σ(β·r_l); for chosen completions better than what the model says itself.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7.
    """
    chosen, rejected = _both(pairs)
    return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


def apo_down(pairs: Scored, *, beta: float) -> jax.Array:
    """APO-down: σ(β·r_w) + 1 − σ(β·h); for chosen completions worse than what the model says itself: both fall.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8.
    """
    return jax.nn.sigmoid(beta * _both(pairs)[0]) + jax.nn.sigmoid(-beta * _margin(pairs))


def discopop(pairs: Scored, *, beta: float, discopop_tau: float = 0.05) -> jax.Array:
    """DiscoPOP: −(1−m)·log σ(β·h) + m·exp(−β·h), m = σ(β·h/τ): the loss that a search found.

    Lu et al. 2024, arXiv 2406.08414, equation 5 (τ = 0.05).
    """
    h = beta * _margin(pairs)
    # exp(−h)·σ(h/τ) in one exponential: apart, the first overflows where the second is 0.
    exponential = jnp.exp(jax.nn.log_sigmoid(h / discopop_tau) - h)
    return -jax.nn.sigmoid(-h / discopop_tau) * jax.nn.log_sigmoid(h) + exponential


def sigmoid_norm(pairs: Scored, *, beta: float) -> jax.Array:
    """DPO per token: −log σ(β·(r_w/|y_w| − r_l/|y_l|)).

    Length-normalised DPO of Lambert et al. 2024 (Tülu 3), arXiv 2411.15124.
    """
    return -jax.nn.log_sigmoid(beta * difference(_scores(pairs) / pairs.tokens))


def sft(pairs: Scored) -> jax.Array:
    """Negative log-likelihood of the chosen completions, mean over the tokens of the whole batch.

    A pair's own share: −log π(y_w) divided by the batch's mean |y_w|, so that the mean over pairs is that over tokens.
    """
    return -pairs.chosen_logp / pairs.chosen_tokens


def simpo(pairs: Scored, *, beta: float, simpo_gamma: float = 0.5, label_smoothing: float = 0.0) -> jax.Array:
    """SimPO: −log σ(β·(log π(y_w)/|y_w| − log π(y_l)/|y_l|) − γ), without a reference; smoothing as in `sigmoid`.

    Meng et al. 2024, arXiv 2405.14734, equation 6. TRL's CPOTrainer adds `sft` to it (cpo_alpha): `simpo:1,sft:1`.
    """
    return _smoothed(beta * difference(pairs.policy / pairs.tokens) - simpo_gamma, label_smoothing)


def cpo(pairs: Scored, *, beta: float, cpo_alpha: float = 1.0, label_smoothing: float = 0.0) -> jax.Array:
    """CPO: −log σ(β·(log π(y_w) − log π(y_l))) + α·`sft`, without a reference; smoothing as in `sigmoid`.

    Xu et al. 2024, arXiv 2401.08417, equation 3 and its likelihood term (α = 1).
    """
    return _smoothed(beta * difference(pairs.policy), label_smoothing) + cpo_alpha * sft(pairs)


def orpo(pairs: Scored, *, beta: float) -> jax.Array:
    """ORPO: `sft` − β·log σ(log odds(y_w) − log odds(y_l)), odds = p/(1−p) of p = exp(log π(y)/|y|); no reference.

    Hong et al. 2024, arXiv 2403.07691, equations 6 and 7 (β is λ there). TRL's first term counts the prompt's tokens
    too; here it is the completion's likelihood, as in the paper.
    """
    mean = pairs.policy / pairs.tokens
    return sft(pairs) - beta * jax.nn.log_sigmoid(difference(mean - _log1mexp(mean)))


def _log1mexp(x: jax.Array) -> jax.Array:
    """log(1 − eˣ) for x ≤ 0, with a finite gradient at 0 too: places without a pair are there."""
    x = jnp.minimum(x, -1e-12)
    far = x < -0.6931472  # −ln 2: beyond, 1 − eˣ has no cancellation
    return jnp.where(far, jnp.log1p(-jnp.exp(jnp.where(far, x, -1.0))), jnp.log(-jnp.expm1(x)))


# By the names of the table, which says what each takes and needs.
LOSSES: dict[str, Callable[..., jax.Array]] = {name: globals()[name] for name in LOSS_FACTS}

"""Preference losses: pure functions that return one number per pair.

Every loss takes the summed log-probabilities of both completions under the policy and the reference, `[..., 2]` each
(index 0 chosen, 1 rejected), and returns `[...]`. Callers mask and reduce.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def log_ratio(policy: jax.Array, reference: jax.Array) -> jax.Array:
    """(log π − log π_ref)(chosen) − (log π − log π_ref)(rejected), `[...]`: the argument of every loss here.

    Taken model by model first, as TRL does, so that equal models give exactly 0 and a step-1 loss of exactly ln 2.
    """
    ratios = policy - reference
    return ratios[..., 0] - ratios[..., 1]


def sigmoid(policy: jax.Array, reference: jax.Array, *, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """DPO: −(1−ε)·log σ(β·h) − ε·log σ(−β·h), with h the log-ratio and ε the label smoothing.

    Rafailov et al. 2023, arXiv 2305.18290, equation 7; smoothing is conservative DPO (Mitchell 2023, "A note on DPO
    with noisy preferences"): ε is the probability that a label is flipped.

    >>> import jax.numpy as jnp
    >>> round(float(sigmoid(jnp.array([-1.0, -1.0]), jnp.array([-1.0, -1.0]), beta=0.1)), 6)
    0.693147
    """
    h = beta * log_ratio(policy, reference)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(h) - label_smoothing * jax.nn.log_sigmoid(-h)


def robust(policy: jax.Array, reference: jax.Array, *, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """Robust DPO: (−(1−ε)·log σ(β·h) + ε·log σ(−β·h)) / (1−2ε), unbiased under labels flipped with probability ε < 1/2.

    Chowdhury et al. 2024, arXiv 2403.00409, equation 12.
    """
    h = beta * log_ratio(policy, reference)
    clean, flipped = jax.nn.log_sigmoid(h), jax.nn.log_sigmoid(-h)
    return (-(1 - label_smoothing) * clean + label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge(policy: jax.Array, reference: jax.Array, *, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """Hinge on the normalised likelihood: max(0, 1 − β·h). `label_smoothing` has no meaning here and must be 0.

    Zhao et al. 2023 (SLiC), arXiv 2305.10425, applied to log-ratios as in Liu et al. 2023 (RSO), arXiv 2309.06657.
    """
    del label_smoothing  # refused by the trainer unless 0
    return jnp.maximum(0.0, 1.0 - beta * log_ratio(policy, reference))


LOSSES: dict[str, Callable[..., jax.Array]] = {"sigmoid": sigmoid, "robust": robust, "hinge": hinge}
# Losses for which `label_smoothing` means something.
SMOOTHED = ("sigmoid", "robust")

"""Learning-rate schedule and optimiser, with the conventions of transformers' Trainer so that runs compare."""

from typing import Any

import jax
import optax

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "rmsprop")


def schedule(kind: str, *, peak: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Learning rate by update, counted from 0: linear warm-up from 0 to `peak`, then `kind` to 0 (or constant).

    The first update of a run with warm-up has a rate of 0, as in transformers' `get_scheduler`.
    """
    rest = max(1, total_steps - warmup_steps)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[kind]
    if warmup_steps == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps])


def _decayed(params: Any) -> Any:
    """True for weights that decay: all but the norms' scales and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.endswith(("scale", "bias")), params)


def optimizer(
    kind: str, rate: optax.Schedule, *, weight_decay: float, max_grad_norm: float
) -> optax.GradientTransformation:
    """Clip by global norm (0 = off), then AdamW(0.9, 0.999, 1e-8) or RMSprop(0.99, 1e-8) as torch defines them.

    RMSprop is what the DPO paper trained with; its decay is decoupled here as AdamW's is (Loshchilov & Hutter 2019,
    arXiv 1711.05101).
    """
    scale = {
        "adamw": optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
        "rmsprop": optax.scale_by_rms(decay=0.99, eps=1e-8, eps_in_sqrt=False),
    }[kind]
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm) if max_grad_norm > 0 else optax.identity(),
        scale,
        optax.add_decayed_weights(weight_decay, mask=_decayed) if weight_decay > 0 else optax.identity(),
        optax.scale_by_learning_rate(rate),
    )

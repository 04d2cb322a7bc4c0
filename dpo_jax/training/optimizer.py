"""Learning-rate schedule and optimiser, with the conventions of transformers' Trainer so that runs compare."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpo_jax.model.config import Params

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "rmsprop")


def rate_schedule(kind: str, *, peak: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Learning rate by update, counted from 0: linear warm-up from 0 to `peak`, then `kind` to 0 (or constant).

    The first update of a run with warm-up has a rate of 0, as in transformers' `get_scheduler`.
    """
    rest = max(1, total_steps - warmup_steps)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[kind]
    if not warmup_steps:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps])


def _decayed(params: Params) -> Any:
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


def apply_updates(params: Params, updates: Params, count: jax.Array) -> Params:
    """The parameters after an update; `updates` are float32.

    In bfloat16 a rate of 1e-6 moves hardly any weight by as much as half of the distance to the next number: rounded to
    the nearest one, parameters would stay as they are. They are rounded up or down at random, with odds that make the
    mean exact (stochastic rounding, Gupta et al. 2015, arXiv 1502.02551). The draws follow from `count`, the updates
    made before, so a resumed run makes the same.
    """
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count), len(leaves))

    def new(p: jax.Array, u: jax.Array, key: jax.Array) -> jax.Array:
        exact = p.astype(jnp.float32) + u
        return _rounded(exact, key) if p.dtype == jnp.bfloat16 else exact.astype(p.dtype)

    return jax.tree.unflatten(tree, [new(*each) for each in zip(leaves, jax.tree.leaves(updates), keys, strict=True)])


def _rounded(x: jax.Array, key: jax.Array) -> jax.Array:
    """Float32 → bfloat16, whose bits are the upper half: random ones are added to the lower half, which is cut off."""
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)

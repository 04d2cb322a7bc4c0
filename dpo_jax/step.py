"""The step: both models' log-probabilities, the loss, its gradient, the update and every metric, in one jit.

The reference is an argument: never in the state, never donated, never differentiated. A batch is a tree of arrays
`[M, B, ...]`: M microbatches (scanned) of B pair rows. Loss and metrics are means over the real pairs of the whole
batch, whatever the rows, the microbatches and the mesh.

Shapes: M microbatches, B rows, K pairs in a row, T tokens of a row, N completion tokens of a row.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dpo_jax.attention import Slots
from dpo_jax.losses import log_ratio

Params = Any
Batch = dict[str, jax.Array]
LogpsFn = Callable[[Params, Batch, Slots], jax.Array]  # (params, one microbatch, widths) -> float32 [B, K, 2]

# Relative error of a summed float32 log-probability: in float32, equal models then have an accuracy of exactly 0.
ROUNDING = 1e-6


@flax.struct.dataclass
class TrainState:
    """What an update changes: its count, the master parameters and the optimiser's state."""

    step: jax.Array
    params: Params
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
      values: (policy logps, reference logps or None) `[B, K, 2]` → per-pair metrics `[B, K]` by name.
      loss: the name in `values` that is minimised.
      count: what the sums are divided by, of the whole batch.
      needs_reference: whether the reference's forward pass runs.
    """

    values: Callable[[jax.Array, jax.Array | None], dict[str, jax.Array]]
    loss: str
    count: Callable[[Batch], jax.Array]
    needs_reference: bool


def preference_objective(loss_fn: Callable[..., jax.Array], *, beta: float, label_smoothing: float) -> Objective:
    """A loss of `losses.py` with DPO's metrics: rewards are β·(log π − log π_ref), summed over the completion."""

    def values(policy: jax.Array, reference: jax.Array | None) -> dict[str, jax.Array]:
        assert reference is not None
        rewards = beta * (policy - reference)
        # The two forward passes are compiled apart and may differ in the last bits: below that, nothing is preferred.
        noise = beta * ROUNDING * jnp.sum(jnp.abs(policy), axis=-1)
        return {
            "dpo_loss": loss_fn(policy, reference, beta=beta, label_smoothing=label_smoothing),
            "accuracy": (rewards[..., 0] > rewards[..., 1] + noise).astype(jnp.float32),
            "margin": beta * log_ratio(policy, reference),
            "chosen_reward": rewards[..., 0],
            "rejected_reward": rewards[..., 1],
            "chosen_logp": policy[..., 0],
            "rejected_logp": policy[..., 1],
        }

    return Objective(values, "dpo_loss", lambda batch: jnp.sum(batch["is_pair"]), needs_reference=True)


def sft_objective() -> Objective:
    """Mean negative log-likelihood per token of the chosen completions."""

    def values(policy: jax.Array, reference: jax.Array | None) -> dict[str, jax.Array]:
        return {"loss": -policy[..., 0]}

    return Objective(values, "loss", lambda batch: jnp.sum(batch["completion_tokens"][..., 0]), needs_reference=False)


def _summed(objective: Objective, policy, reference, is_pair_BK: jax.Array) -> dict[str, jax.Array]:
    """Masked sums over a microbatch's pairs; masked first, so that padding can hold anything finite or not."""
    return {k: jnp.sum(jnp.where(is_pair_BK, v, 0.0)) for k, v in objective.values(policy, reference).items()}


def make_train_step(
    logps: LogpsFn, objective: Objective, tx: optax.GradientTransformation, rate: optax.Schedule, *, compute_dtype: Any
):
    """Build the jitted `train_step(state, ref_params, batch, slots) -> (state, metrics)`; the state is donated.

    Args:
      logps: the model: log-probabilities of a microbatch's pairs.
      objective: what is minimised.
      tx: the optimiser, clipping included.
      rate: the learning rate by update, to report.
      compute_dtype: master parameters are cast to it once a step. Gradients are summed over microbatches in float32.

    Returns:
      The step; `slots` is static, so it compiles once per row shape. `metrics` holds float32 scalars: the objective's
      values as means, `grad_norm` before clipping, and `learning_rate`.
    """

    def train_step(state: TrainState, ref_params: Params | None, batch: Batch, slots: Slots):
        count = jnp.maximum(objective.count(batch), 1).astype(jnp.float32)
        compute_params = jax.tree.map(lambda p: p.astype(compute_dtype), state.params)

        def loss_fn(params: Params, micro: Batch, reference: jax.Array | None):
            sums = _summed(objective, logps(params, micro, slots), reference, micro["is_pair"])
            return sums[objective.loss] / count, sums

        def micro_grads(micro: Batch):
            reference = (
                logps(ref_params, micro, slots) if objective.needs_reference else None
            )  # constant to the gradient
            (_, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(compute_params, micro, reference)
            return grads, sums

        def accumulate(carry, micro: Batch):
            grads, sums = micro_grads(micro)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), carry, (grads, sums)), None

        if batch["tokens"].shape[0] == 1:
            grads, sums = micro_grads(jax.tree.map(lambda x: x[0], batch))
            grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        else:
            sums_shape = jax.eval_shape(micro_grads, jax.tree.map(lambda x: x[0], batch))[1]
            zeros = (
                jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params),
                jax.tree.map(lambda s: jnp.zeros((), s.dtype), sums_shape),
            )
            (grads, sums), _ = jax.lax.scan(accumulate, zeros, batch)
        metrics = {k: v / count for k, v in sums.items()} | {
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(rate(state.step), jnp.float32),
        }
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(train_step, donate_argnames="state", static_argnames="slots")


def make_eval_step(logps: LogpsFn, objective: Objective, *, compute_dtype: Any, out_shardings: Any = None):
    """Build the jitted `eval_step(params, ref_params, batch, slots)` → every value of the objective, pair by pair.

    Args:
      logps, objective, compute_dtype: as in `make_train_step`.
      out_shardings: of the values; replicated, so that every process can read them.

    Returns:
      The step: values `[M, B, K]` by name, meaningless where a row has no pair k. Means are the caller's, who knows
      which pair lies where.
    """

    def eval_step(params: Params, ref_params: Params | None, batch: Batch, slots: Slots):
        compute_params = jax.tree.map(lambda p: p.astype(compute_dtype), params)

        def one(_, micro: Batch):
            reference = logps(ref_params, micro, slots) if objective.needs_reference else None
            return None, objective.values(logps(compute_params, micro, slots), reference)

        return jax.lax.scan(one, None, batch)[1]

    return jax.jit(eval_step, static_argnames="slots", out_shardings=out_shardings)


def init_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """A state at update 0. Inside jit, so that optimiser moments are made with the parameters' shardings."""
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))

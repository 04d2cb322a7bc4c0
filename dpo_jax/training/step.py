"""The step: both models' log-probabilities, the loss, its gradient, the update and every metric, in one jit.

The reference is an argument: never in the state, never donated, never differentiated. So is the frozen base of a policy
of which only adapters are trained. A batch has arrays `[M, B, ...]`: M microbatches (scanned) of B rows. Loss and
metrics are means over the groups of the whole batch, whatever the rows, the microbatches and the mesh.

Shapes: M microbatches, B rows, K groups in a row, n completions of a group.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dpo_jax.model.config import Params
from dpo_jax.model.experts import balance_loss
from dpo_jax.model.remat import to_device, to_host
from dpo_jax.objective.logps import Logps, LogpsFn
from dpo_jax.objective.objective import EXTREMES, Objective, mean_tokens, reduced, together
from dpo_jax.rows.batch import Batch
from dpo_jax.rows.shape import RowShape
from dpo_jax.training.health import SKIPPED
from dpo_jax.training.optimizer import apply_updates


@flax.struct.dataclass
class TrainState:
    """What an update changes: the count of updates made, the master parameters and the optimiser's state."""

    step: jax.Array
    params: Params
    opt_state: Any


def _reference(
    logps: LogpsFn, objective: Objective, ref_params: Params | None, shape: RowShape, micro: Batch[jax.Array]
) -> Logps | None:
    """The reference's log-probabilities, from the batch if they were computed before."""
    if not objective.needs_reference:
        return None
    if micro.ref_logps is not None:
        return Logps(micro.ref_logps, whole=micro.ref_whole)
    assert ref_params is not None
    return logps(ref_params, micro, shape)


def _batch_gradient(
    models: tuple[LogpsFn, LogpsFn],
    objective: Objective,
    params: Params,
    ref_params: Params | None,
    batch: Batch[jax.Array],
    shape: RowShape,
) -> tuple[Params, dict[str, jax.Array]]:
    """The gradient of the mean loss, in float32, and the mean of every value over the batch's groups.

    `models` are those of the policy and the reference.
    """
    logps, ref_logps = models
    count = jnp.maximum(jnp.sum(batch.is_group), 1).astype(jnp.float32)
    tokens_n = mean_tokens(batch)
    reference_of = functools.partial(_reference, ref_logps, objective, ref_params, shape)  # constant to the gradient

    def loss_of(policy: Logps, reference: Logps | None, part: Batch[jax.Array]):
        sums = reduced(objective.values(policy, reference, part, tokens_n), part.is_group)
        loss = sums[objective.loss] / count
        if objective.balance:
            assert policy.balance is not None
            # A microbatch balances its own tokens; the batch's loss is the mean of theirs.
            one = part.tokens.ndim == 2
            uneven = balance_loss(policy.balance) if one else jnp.sum(jax.vmap(balance_loss)(policy.balance))
            loss += objective.balance * uneven / batch.tokens.shape[0]
            sums["router_balance"] = uneven * count / batch.tokens.shape[0]
        return loss, sums

    def micro_loss(params: Params, micro: Batch[jax.Array]):
        reference = reference_of(micro)
        return loss_of(logps(params, micro, shape), reference, micro)

    def along(params: Params, item: tuple[Batch[jax.Array], Logps]):
        """A microbatch's log-probabilities along the loss's gradient to them."""
        micro, cotangent = item
        values, cotangents = (jax.tree.leaves(x) for x in (logps(params, micro, shape), cotangent))
        return sum(jnp.sum(x * c) for x, c in zip(values, cotangents, strict=True)), {}

    if objective.across and batch.tokens.shape[0] > 1:
        # The loss compares groups of all microbatches: first its gradient to all log-probabilities, then theirs.
        policy, reference = jax.lax.map(lambda micro: (logps(params, micro, shape), reference_of(micro)), batch)
        cotangents, sums = jax.grad(loss_of, has_aux=True)(policy, reference, batch)
        grads, _ = _sum_of_gradients(along, params, (batch, cotangents))
    else:
        grads, sums = _sum_of_gradients(micro_loss, params, batch)
    return grads, {name: value if name in EXTREMES else value / count for name, value in sums.items()}


def _sum_of_gradients(
    loss: Callable[[Params, Any], tuple[jax.Array, Any]], params: Params, items: Any
) -> tuple[Params, Any]:
    """The float32 sum over `items` (first axis, one after the other) of the gradient of `loss`, and its aux of all.

    Float32 gradients are added where they arise, a layer's at a time (`VJP.with_refs`): the gradient of one microbatch
    alone is never held. Others are added as a whole, as a sum of many in bfloat16 would lose what is small.
    """
    gradient = jax.grad(loss, has_aux=True)
    if jax.tree.leaves(items)[0].shape[0] == 1:
        grads, aux = gradient(params, jax.tree.map(lambda x: x[0], items))
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), aux
    if any(p.dtype != jnp.float32 for p in jax.tree.leaves(params)):
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)

        def add(sums: Params, item: Any):
            grads, aux = gradient(params, item)
            return jax.tree.map(lambda a, g: a + g.astype(a.dtype), sums, grads), aux

        grads, aux = jax.lax.scan(add, zeros, items)
        return grads, together(aux)
    sums = jax.tree.map(lambda p: jax.new_ref(jnp.zeros_like(p)), params)

    def add_in_place(_, item: Any):
        pull_back: Any
        value, pull_back, aux = jax.vjp(lambda params: loss(params, item), params, has_aux=True)
        pull_back.with_refs(sums)(jnp.ones_like(value))
        return None, aux

    aux = jax.lax.scan(add_in_place, None, items)[1]
    return jax.tree.map(jax.ref.freeze, sums), together(aux)


def _over(base: Params | None, logps: LogpsFn) -> LogpsFn:
    """`logps` of the union of the base's branches and those given; of two of one name the given one counts.

    Over a frozen base the adapters are the policy, and `{}`, the base alone, is its reference; a whole tree is itself.
    """
    return lambda params, micro, shape: logps((base or {}) | params, micro, shape)


def make_train_step(
    logps: LogpsFn,
    objective: Objective,
    tx: optax.GradientTransformation,
    rate: optax.Schedule,
    *,
    compute_dtype: Any,
    reference_logps: LogpsFn | None = None,
    optimizer_offload: bool = False,
    **jit: Any,
):
    """Build the jitted `train_step(state, ref_params, batch, shape, base=None) -> (state, metrics)`; donates the state.

    Args:
      logps: the model: log-probabilities of a microbatch's groups.
      objective: what is minimised.
      tx: the optimiser, clipping included.
      rate: the learning rate by update, to report.
      compute_dtype: master parameters are cast to it once a step, as is a reference that is kept more exactly.
      reference_logps: the model with the reference's parameters, where they are kept elsewhere; None is `logps`.
      optimizer_offload: the optimiser's state is kept in the host's memory.
      jit: of `jax.jit`, such as `compiler_options`.

    Returns:
      The step; `shape` is static, so it compiles once per row shape. `base` are branches of the parameter tree that are
      not trained: policy and reference are what is put over it (see `_over`). `metrics` holds float32 scalars: the
      objective's values as means, `grad_norm` before clipping, `learning_rate`, and `skipped`: 1 where loss or gradient
      are not finite, and the state is the old one.
    """

    def train_step(
        state: TrainState,
        ref_params: Params | None,
        batch: Batch[jax.Array],
        shape: RowShape,
        base: Params | None = None,
    ):
        params, reference, base = _cast((state.params, ref_params, base), compute_dtype)
        models = _over(base, logps), _over(base, reference_logps or logps)
        grads, means = _batch_gradient(models, objective, params, reference, batch, shape)
        metrics = means | {
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(rate(state.step), jnp.float32),
        }
        if optimizer_offload:
            state = dataclasses.replace(state, opt_state=to_device(state.opt_state))
        # An update that is not finite would be the last one: the whole state stays, and the schedule does not move on.
        # (A conditional takes no memory; a choice between both states by jnp.where held half of the parameters more.)
        finite = jnp.isfinite(metrics["grad_norm"]) & jnp.isfinite(means[objective.loss])
        state = jax.lax.cond(finite, functools.partial(_updated, tx), lambda state, _: state, state, grads)
        if optimizer_offload:
            state = dataclasses.replace(state, opt_state=to_host(state.opt_state))
        return state, metrics | {SKIPPED: 1.0 - finite.astype(jnp.float32)}

    return jax.jit(train_step, donate_argnames="state", static_argnames="shape", **jit)


def _updated(tx: optax.GradientTransformation, state: TrainState, grads: Params) -> TrainState:
    updates, opt_state = tx.update(grads, state.opt_state, _cast(state.params, jnp.float32))
    return TrainState(state.step + 1, apply_updates(state.params, updates, state.step), opt_state)


def make_eval_step(logps: LogpsFn, objective: Objective, *, compute_dtype: Any, **jit: Any):
    """Build the jitted `eval_step(params, ref_params, batch, shape, base=None)` → what the objective reads.

    That is the policy's `Logps` and the reference's (None where the objective has none), `[M, B, K, n]`, meaningless
    where a row has no group k. Values are the caller's, who knows which group is where, and has those of the other
    batches (`objective.make_set_values`). Arguments are as in `make_train_step`.
    """

    def eval_step(
        params: Params,
        ref_params: Params | None,
        batch: Batch[jax.Array],
        shape: RowShape,
        base: Params | None = None,
    ) -> tuple[Logps, Logps | None]:
        params, reference_params, base = _cast((params, ref_params, base), compute_dtype)
        over_base = _over(base, logps)

        def one(micro: Batch[jax.Array]) -> tuple[Logps, Logps | None]:
            reference = _reference(over_base, objective, reference_params, shape, micro)
            # How evenly experts were used is of a batch, not of a group.
            return dataclasses.replace(over_base(params, micro, shape), balance=None), reference

        return jax.lax.map(one, batch)

    return jax.jit(eval_step, static_argnames="shape", **jit)


def make_logps_step(logps: LogpsFn, *, compute_dtype: Any, **jit: Any):
    """Build the jitted `logps_step(params, batch, shape, base=None)` → what a reference is kept by, `[M, B, K, n]`.

    That is its log-probabilities, and those with every token counted whole where LD-DPO weighs them. Arguments are as
    in `make_train_step`.
    """

    def logps_step(
        params: Params, batch: Batch[jax.Array], shape: RowShape, base: Params | None = None
    ) -> list[jax.Array]:
        params, base = _cast((params, base), compute_dtype)
        values = jax.lax.map(lambda micro: _over(base, logps)(params, micro, shape), batch)
        return [x for x in (values.logps, values.whole) if x is not None]

    return jax.jit(logps_step, static_argnames="shape", **jit)


def make_reference_sync(alpha: float, *, shardings: Any = None):
    """Build the jitted `sync(reference, params)` → (1−α)·reference + α·params; the reference is donated.

    TR-DPO's soft update (Gorbatovski et al. 2024, arXiv 2404.09656), in the reference's own dtype: keep it
    in float32, as a small α's changes are lost in bfloat16.
    """

    def sync(reference: Params, params: Params) -> Params:
        return jax.tree.map(lambda r, p: (1 - alpha) * r + alpha * p.astype(r.dtype), reference, params)

    return jax.jit(sync, donate_argnames="reference", out_shardings=shardings)


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda p: p.astype(dtype), tree)


def init_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """A state at update 0. Inside jit, so that optimiser moments are made with the parameters' shardings.

    Moments are float32 whatever the parameters are: a second moment that falls by 0.1% a step would not move in
    bfloat16.
    """
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(_cast(params, jnp.float32)))

"""The step on groups of n completions: float64 NumPy's loss on one device, and the same numbers on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax.model.options import LayoutOptions
from dpo_jax.model.placement import place_model
from dpo_jax.objective.objective import Objective
from dpo_jax.objective.policy_logps import logps_fn
from dpo_jax.parallel.mesh import make_mesh, to_global
from dpo_jax.rows.shape import RowShape
from dpo_jax.training.setup import start_state
from dpo_jax.training.step import make_train_step
from tests.oracles import oracle
from tests.training.test_same_losses import CONFIG, _fresh

PLACED = np.append(np.arange(14), [-1, -1]).reshape(8, 2)
TX = optax.sgd(1e-2)  # the update is the gradient: Adam's would magnify rounding where that is near 0


@functools.cache
def _groups(n):
    return oracle.RandomGroups(np.random.default_rng(n).integers(1, 5, (14, 1 + n)), CONFIG.vocab_size)


def _values(policy, reference, batch, mean_tokens):
    """A loss of groups: completions are told apart by their number, and each is divided by its own mean length."""
    weights = jnp.arange(1.0, 1 + policy.logps.shape[-1])[None, None]
    ratios = (policy.logps - reference.logps) / mean_tokens[None, None]
    return {"loss": -jnp.sum(weights * jax.nn.log_sigmoid(ratios), axis=-1), "first": policy.logps[..., 0]}


@functools.cache
def _run(n, sizes=(1, 1, 1), microbatches=1):
    """Two updates: the metrics of each and the final parameters."""
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    layout = place_model(CONFIG, mesh, LayoutOptions(compute_dtype="float32"))
    with jax.set_mesh(mesh):
        policy, reference = (jax.tree.map(jnp.array, _fresh(seed)) for seed in (0, 1))
        state = start_state(jax.device_put(policy, layout.shardings), TX, layout)
        reference = jax.device_put(reference, layout.shardings)
        objective = Objective(_values, "loss", needs_reference=True)
        step = make_train_step(logps_fn(layout, remat="dots"), objective, TX, lambda _: 1e-2, compute_dtype=jnp.float32)
        shape = RowShape(12, (8,) * n, rows=8, places=2)
        batch = to_global(oracle.rows(_groups(n), PLACED, shape, microbatches), mesh, 8 // microbatches)
        metrics = []
        for _ in range(2):
            state, values = step(state, reference, batch, shape)
            metrics.append(jax.device_get(values))
        return metrics, jax.device_get(state.params)


@pytest.mark.parametrize("n", [pytest.param(n, marks=() if n == 3 else pytest.mark.slow) for n in (1, 3, 4, 8)])
def test_the_first_update_sees_the_float64_loss(n):
    policy, reference = (
        np.array([[oracle.completion_logp(_fresh(seed), p, x, CONFIG) for x in xs] for p, *xs in _groups(n).ids])
        for seed in (0, 1)
    )
    ratios = (policy - reference) / _groups(n).lengths[:, 1:].mean(0)
    (first, _), _ = _run(n)
    assert float(first["loss"]) == pytest.approx(
        (np.arange(1, 1 + n) * np.logaddexp(0, -ratios)).sum(1).mean(), rel=1e-5
    )
    assert float(first["first"]) == pytest.approx(policy[:, 0].mean(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "sizes"), [(1, (2, 2, 2)), (3, (1, 8, 1)), (4, (2, 2, 2)), (8, (8, 1, 1))])
def test_a_mesh_changes_nothing(n, sizes):
    ours, theirs = _run(n, sizes), _run(n)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), ours, theirs)


@pytest.mark.slow
def test_microbatches_change_nothing():
    ours, theirs = _run(4, microbatches=2), _run(4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), ours, theirs)

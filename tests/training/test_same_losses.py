"""Every mesh, the attention kernel, every remat policy and what lies in the host's memory: the same losses."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.model.forward import init_params
from dpo_jax.model.options import LayoutOptions
from dpo_jax.model.placement import place_model
from dpo_jax.model.remat import REMAT_POLICIES
from dpo_jax.objective.objective import preference_objective
from dpo_jax.objective.policy_logps import logps_fn
from dpo_jax.parallel.mesh import host_shardings, make_mesh, to_global
from dpo_jax.rows.shape import RowShape
from dpo_jax.training.optimizer import optimizer, rate_schedule
from dpo_jax.training.setup import start_state
from dpo_jax.training.step import make_train_step
from tests.oracles import oracle

# Divides over eight devices in every way.
CONFIG = dataclasses.replace(
    oracle.CONFIG, vocab_size=64, num_attention_heads=8, num_key_value_heads=2, intermediate_size=32
)
SHAPE = RowShape(12, (8, 8), 8, 2)
PAIRS = oracle.RandomGroups(np.random.default_rng(0).integers(1, 5, (14, 3)))
PLACED = np.append(np.arange(14), [-1, -1]).reshape(8, 2)
RATE = rate_schedule("constant", peak=1e-2, warmup_steps=0, total_steps=10)
TX = optimizer("adamw", RATE, weight_decay=0.01, max_grad_norm=1.0)


@functools.cache
def _fresh(seed):
    fresh = nn.meta.unbox(jax.jit(functools.partial(init_params, config=CONFIG))(jax.random.key(seed)))
    return jax.device_get(jax.tree.map(lambda p: p * 8 if p.ndim > 2 else p, fresh))


def _run(sizes=(1, 1, 1), remat="dots", steps=3, microbatches=1, **options):
    """Three updates; the metrics of each, the final parameters and the final state's shardings."""
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    layout = place_model(CONFIG, mesh, LayoutOptions(compute_dtype="float32", **options))
    with jax.set_mesh(mesh):
        fresh = [jax.tree.map(jnp.array, _fresh(seed)) for seed in (0, 1)]
        state = start_state(jax.device_put(fresh[0], layout.shardings), TX, layout)
        reference = jax.device_put(fresh[1], layout.reference_shardings)
        from_host = layout.options.reference_offload
        step = make_train_step(
            logps_fn(layout, remat=remat),
            preference_objective({"sigmoid": 1.0}, beta=0.1),
            TX,
            RATE,
            compute_dtype=jnp.float32,
            reference_logps=logps_fn(layout, remat=remat, from_host=True) if from_host else None,
            optimizer_offload=layout.options.optimizer_offload,
        )
        batch = to_global(oracle.rows(PAIRS, PLACED, SHAPE, microbatches), mesh, 8 // microbatches)
        metrics = []
        for _ in range(steps):
            state, m = step(state, reference, batch, SHAPE)
            metrics.append(jax.device_get(m))
        return metrics, jax.device_get(state.params), jax.tree.map(lambda x: x.sharding.memory_kind, state.opt_state)


@pytest.fixture(scope="module")
def plain():
    return _run()


def _same(ours, theirs):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), ours[:2], theirs[:2])


@pytest.mark.sweep
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 1, 8), (2, 2, 2)])
def test_every_mesh_gives_the_same_losses(sizes, plain):
    """With the vocabulary over all devices, and fewer kv-heads than tensor shards; `test_step.py` has (1, 8, 1)."""
    _same(_run(sizes), plain)


@pytest.mark.slow
def test_the_kernel_in_the_step_gives_the_same_losses(plain):
    """On other meshes below, with microbatches."""
    _same(_run((2, 2, 2), attention="splash"), plain)


@pytest.mark.slow
def test_moments_and_reference_in_host_memory_change_no_number(plain):
    run = _run((1, 4, 2), optimizer_offload=True, reference_offload=True)
    _same(run, plain)
    adam = next(s for s in run[2] if hasattr(s, "mu"))
    assert set(jax.tree.leaves((adam.mu, adam.nu))) == {"pinned_host"}


def test_on_host_moves_the_memory_and_keeps_the_spread():
    mesh = make_mesh(1, 8, 1)
    sharding = jax.NamedSharding(mesh, jax.P("fsdp"))
    (moved,) = host_shardings([sharding])
    assert moved.memory_kind == "pinned_host"
    assert moved.spec == sharding.spec


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("remat", "microbatches"), [("full", 4), ("full", 1), *((x, 4) for x in REMAT_POLICIES if x != "full")]
)
def test_every_remat_policy_gives_the_same_losses(remat, microbatches, plain):
    """Also where gradients are added a layer at a time, while the backward pass computes again what it lacks."""
    _same(_run(remat=remat, microbatches=microbatches), plain)


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "microbatches"), [((1, 1, 8), 4), ((1, 4, 2), 2)])
def test_every_mesh_sums_the_gradients_of_microbatches(sizes, microbatches, plain):
    _same(_run(sizes, microbatches=microbatches, attention="splash"), plain)

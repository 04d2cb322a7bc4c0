"""The step: the same numbers on every mesh and with every number of microbatches, the reference never touched."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax.model.forward import ModelOptions, hidden_states, init_params, unembedding
from dpo_jax.model.placement import axis_rules, param_shardings
from dpo_jax.objective.logps import Logps, group_logps
from dpo_jax.objective.objective import make_set_values, preference_objective, sft_objective
from dpo_jax.parallel.mesh import make_mesh, to_global
from dpo_jax.rows.batch import Batch
from dpo_jax.rows.shape import RowShape
from dpo_jax.training.optimizer import optimizer, rate_schedule
from dpo_jax.training.setup import moment_shardings
from dpo_jax.training.step import TrainState, init_state, make_eval_step, make_reference_sync, make_train_step
from tests.oracles import oracle
from tests.oracles.oracle import CONFIG

SHAPE = RowShape(12, (8, 8), 8, 2)
PAIRS = oracle.RandomGroups(np.random.default_rng(0).integers(1, 5, (14, 3)))
PLACED = np.append(np.arange(14), [-1, -1]).reshape(8, 2)
OBJECTIVE = preference_objective({"sigmoid": 1.0}, beta=0.1)
RATE = rate_schedule("constant", peak=1e-2, warmup_steps=0, total_steps=10)
TX = optimizer("adamw", RATE, weight_decay=0.01, max_grad_norm=1.0)


@functools.cache
def _fresh(seed):
    fresh = nn.meta.unbox(jax.jit(functools.partial(init_params, config=CONFIG))(jax.random.key(seed)))
    return jax.device_get(jax.tree.map(lambda p: p * 8 if p.ndim > 2 else p, fresh))


def _params(seed):
    return jax.tree.map(jnp.array, _fresh(seed))


def _logps(rules):
    def logps(params, micro, slots):
        with nn.logical_axis_rules(rules):
            hidden, _ = hidden_states(params, micro, slots, ModelOptions(CONFIG, remat="dots"))
            return group_logps(hidden, micro, unembedding(params), slots)

    return logps


def _run(sizes, microbatches=1, steps=2, objective=OBJECTIVE, devices=None, placed=PLACED):
    """Train a few steps on a mesh; returns (state, reference, metrics of each step)."""
    mesh = make_mesh(*sizes, devices=devices)
    shardings = param_shardings(CONFIG, mesh)
    with jax.set_mesh(mesh):
        params = jax.device_put(_params(0), shardings)
        reference = jax.device_put(_params(1), shardings) if objective.needs_reference else None
        state = jax.jit(init_state, static_argnums=1, out_shardings=_state_shardings(params, shardings, mesh))(
            params, TX
        )
        step = make_train_step(_logps(axis_rules(CONFIG, mesh)), objective, TX, RATE, compute_dtype=jnp.float32)
        batch = to_global(oracle.rows(PAIRS, placed, SHAPE, microbatches), mesh, 8 // microbatches)
        metrics = []
        for _ in range(steps):
            state, m = step(state, reference, batch, SHAPE)
            metrics.append(jax.device_get(m))
        return state, reference, metrics


def _state_shardings(params, shardings, mesh):
    replicated = jax.NamedSharding(mesh, jax.P())
    return TrainState(replicated, shardings, moment_shardings(TX, params, shardings, mesh))


@pytest.fixture(scope="module")
def one_device():
    return _run((1, 1, 1), devices=jax.devices()[:1])


def _close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=atol, rtol=1e-4), a, b)


def test_the_first_step_is_the_float64_oracles(one_device):
    policy, reference = (
        np.array([[oracle.completion_logp(_fresh(s), p, x, CONFIG) for x in xs] for p, *xs in PAIRS.ids])
        for s in (0, 1)
    )
    rewards = 0.1 * (policy - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    first = one_device[2][0]
    expected = {
        "dpo_loss": np.logaddexp(0, -margin).mean(),
        "accuracy": (margin > 0).mean(),
        "margin": margin.mean(),
        "chosen_reward": rewards[:, 0].mean(),
        "rejected_reward": rewards[:, 1].mean(),
        "chosen_logp": policy[:, 0].mean(),
        "rejected_logp": policy[:, 1].mean(),
    }
    for name, value in expected.items():
        assert float(first[name]) == pytest.approx(value, abs=1e-4), name
    assert float(first["learning_rate"]) == pytest.approx(1e-2)


def test_the_gradient_is_the_oracles_by_finite_differences(one_device):
    """grad_norm bounds nothing by itself: one direction of the gradient is checked against float64 differences."""
    params, reference = _params(0), _params(1)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), oracle.rows(PAIRS, PLACED, SHAPE))

    def loss(params):
        logps = _logps(axis_rules(CONFIG, mesh))
        policy, ref = (logps(p, batch, SHAPE) for p in (params, reference))
        values = OBJECTIVE.values(policy, ref, batch, jnp.ones(2))
        return jnp.sum(jnp.where(batch.is_group, values["dpo_loss"], 0.0)) / 14

    with jax.set_mesh(mesh):
        grads = jax.jit(jax.grad(loss))(params)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda p: rng.normal(size=p.shape), params)
    along = sum(
        float((np.asarray(g, np.float64) * d).sum())
        for g, d in zip(*map(jax.tree.leaves, (grads, direction)), strict=True)
    )

    def exact(t):
        moved = jax.tree.map(lambda p, d: np.asarray(p, np.float64) + t * d, params, direction)
        logp = lambda tree, i, j: oracle.completion_logp(tree, PAIRS.ids[i][0], PAIRS.ids[i][j], CONFIG)
        h = [
            0.1 * (logp(moved, i, 1) - logp(reference, i, 1) - logp(moved, i, 2) + logp(reference, i, 2))
            for i in range(14)
        ]
        return np.logaddexp(0, -np.array(h)).mean()

    assert along == pytest.approx((exact(1e-6) - exact(-1e-6)) / 2e-6, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_every_mesh_gives_the_same_numbers(sizes, one_device):
    devices = jax.devices()[: int(np.prod(sizes))]
    state, reference, metrics = _run(sizes, devices=devices)
    _close(metrics, one_device[2])
    _close(state.params, one_device[0].params)
    assert_sharded(state.params, reference, state.opt_state, sizes)


def _assert_same_sharding(a, b):
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)


def assert_sharded(params, reference, opt_state, sizes):
    """Parameters, reference and both moments lie alike, and really in parts."""
    _, fsdp, tensor = sizes
    adam = next(s for s in opt_state if hasattr(s, "mu"))
    for tree in (reference, adam.mu, adam.nu):
        jax.tree.map(_assert_same_sharding, params, tree)
    gate = params["layers"]["mlp"]["gate"]
    assert gate.addressable_shards[0].data.shape == (2, 16 // fsdp, 24 // tensor)
    query = params["layers"]["attention"]["q"]
    assert query.addressable_shards[0].data.shape == (2, 16 // fsdp, 4 // tensor, 4)


@pytest.mark.sweep
@pytest.mark.parametrize("microbatches", [2, 8])
def test_microbatches_do_not_change_the_result(microbatches, one_device):
    state, _, metrics = _run((1, 1, 1), microbatches, devices=jax.devices()[:1])
    _close(metrics, one_device[2])
    _close(state.params, one_device[0].params)


def test_sft_is_the_mean_loss_per_token_of_all_completions():
    """Of pairs that are both; SFT on chosen ones has groups of one."""
    _, _, metrics = _run((1, 1, 1), 2, steps=1, objective=sft_objective(), devices=jax.devices()[:1])
    logps = [oracle.completion_logp(_fresh(0), p, one, CONFIG) for p, *both in PAIRS.ids for one in both]
    assert float(metrics[0]["loss"]) == pytest.approx(-sum(logps) / PAIRS.lengths[:, 1:].sum(), abs=1e-5)


# Pairs in other rows, places without a pair between them: nothing depends on where a pair lies.
SCATTERED = np.random.default_rng(1).permutation(PLACED.reshape(-1)).reshape(8, 2)
ACROSS = preference_objective({"aot": 1.0, "aot_unpaired": 0.5, "sft": 0.2}, beta=0.1, label_smoothing=0.1)


@pytest.fixture(scope="module")
def across_one_device():
    return _run((1, 1, 1), steps=1, objective=ACROSS, devices=jax.devices()[:1])


def test_losses_across_pairs_are_the_float64_oracles(across_one_device):
    policy, reference = (
        np.array([[oracle.completion_logp(_fresh(s), p, x, CONFIG) for x in xs] for p, *xs in PAIRS.ids])
        for s in (0, 1)
    )
    smoothed = lambda z: 0.9 * np.logaddexp(0, -z) + 0.1 * np.logaddexp(0, z)
    ratios = policy - reference
    aot = smoothed(0.1 * (np.sort(policy[:, 0] - policy[:, 1]) - np.sort(reference[:, 0] - reference[:, 1]))).mean()
    unpaired = smoothed(0.1 * (np.sort(ratios[:, 0]) - np.sort(ratios[:, 1]))).mean()
    sft = -policy[:, 0].sum() / PAIRS.lengths[:, 1].sum()
    first = across_one_device[2][0]
    expected = {
        "loss_aot": aot,
        "loss_aot_unpaired": unpaired,
        "loss_sft": sft,
        "dpo_loss": aot + unpaired / 2 + sft / 5,
    }
    for name, value in expected.items():
        assert float(first[name]) == pytest.approx(value, abs=1e-4), name


@pytest.mark.sweep
@pytest.mark.parametrize(("sizes", "microbatches"), [((8, 1, 1), 1), ((1, 2, 1), 4)])
def test_losses_across_pairs_see_the_whole_batch(sizes, microbatches, across_one_device):
    devices = jax.devices()[: int(np.prod(sizes))]
    state, _, metrics = _run(sizes, microbatches, steps=1, objective=ACROSS, devices=devices, placed=SCATTERED)
    _close(metrics, across_one_device[2])
    _close(state.params, across_one_device[0].params, atol=1e-4)  # Adam divides by gradients near 0


def test_a_reference_free_loss_takes_no_reference():
    objective = preference_objective({"simpo": 1.0}, beta=2.0, simpo_gamma=0.5)
    state, reference, metrics = _run((1, 1, 1), 2, steps=1, objective=objective, devices=jax.devices()[:1])
    assert reference is None
    assert int(state.step) == 1
    mean = np.array([[oracle.completion_logp(_fresh(0), p, x, CONFIG) / len(x) for x in xs] for p, *xs in PAIRS.ids])
    rewards = 2.0 * mean
    expected = {
        "dpo_loss": np.logaddexp(0, -(rewards[:, 0] - rewards[:, 1] - 0.5)).mean(),
        "accuracy": (rewards[:, 0] > rewards[:, 1]).mean(),
        "margin": (rewards[:, 0] - rewards[:, 1]).mean(),
        "chosen_reward": rewards[:, 0].mean(),
    }
    for name, value in expected.items():
        assert float(metrics[0][name]) == pytest.approx(value, abs=1e-4), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_moves_towards_the_policy_where_it_lies(dtype):
    mesh = make_mesh(2, 2, 2)
    shardings = param_shardings(CONFIG, mesh)
    with jax.set_mesh(mesh):
        params = jax.device_put(jax.tree.map(lambda p: p.astype(dtype), _params(0)), shardings)
        reference = jax.device_put(_params(1), shardings)
        before = jax.tree.map(lambda x: np.array(x, np.float64), reference)
        moved = make_reference_sync(0.25, shardings=shardings)(reference, params)
    expected = jax.tree.map(lambda r, p: 0.75 * r + 0.25 * np.asarray(p, np.float64), before, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), moved, expected)
    jax.tree.map(_assert_same_sharding, moved, params)
    assert {x.dtype for x in jax.tree.leaves(moved)} == {jnp.dtype("float32")}
    assert all(x.is_deleted() for x in jax.tree.leaves(reference))
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))


def test_the_reference_survives_donated_steps_and_the_step_is_traced_once_a_shape():
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = _params(0)
        reference = jax.tree.map(jnp.copy, params)
        before = jax.tree.map(lambda x: np.array(x, copy=True), reference)
        state = init_state(params, TX)
        logps = chex.assert_max_traces(_logps(axis_rules(CONFIG, mesh)), n=4)  # twice a shape: policy and reference
        step = make_train_step(logps, OBJECTIVE, TX, RATE, compute_dtype=jnp.float32)
        other = RowShape(16, (8, 8), 8, 2)
        for i in range(6):
            shape = SHAPE if i % 2 == 0 else other
            batch = to_global(oracle.rows(PAIRS, PLACED, shape), mesh, 8)
            old = state
            state, metrics = step(state, reference, batch, shape)
            if i == 0:
                assert float(metrics["dpo_loss"]) == pytest.approx(np.log(2), abs=1e-6)
                assert float(metrics["accuracy"]) == 0.0
            assert jax.tree.leaves(old.params)[0].is_deleted()
    chex.assert_trees_all_equal(reference, before)
    assert int(state.step) == 6


@pytest.mark.sweep
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["the loss", "a parameter's gradient"])
def test_an_update_that_is_not_finite_is_not_made_and_the_next_is_as_if_it_had_not_been(where, bad):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    rate = rate_schedule("linear", peak=1e-2, warmup_steps=0, total_steps=10)
    tx = optimizer("adamw", rate, weight_decay=0.01, max_grad_norm=1.0)

    @jax.custom_vjp
    def spoilt(x, factor):  # the loss stays finite, its gradient does not
        return x

    spoilt.defvjp(lambda x, factor: (x, factor), lambda factor, g: (g * factor, None))
    plain = _logps(axis_rules(CONFIG, mesh))

    def logps(params, micro, slots):
        factor = micro.slots[0, 0, 0]  # a field that this model does not read
        return plain(params | {"embedding": spoilt(params["embedding"], factor)}, micro._replace(slots=None), slots)

    with jax.set_mesh(mesh):
        batch = to_global(oracle.rows(PAIRS, PLACED, SHAPE), mesh, 8)
        given = jnp.zeros((*batch.is_group.shape, 2), jnp.float32)
        good = batch._replace(ref_logps=given, slots=jnp.ones(given.shape))
        wrong = good._replace(**({"ref_logps": given + bad} if where == "the loss" else {"slots": good.slots * bad}))
        step = make_train_step(logps, OBJECTIVE, tx, rate, compute_dtype=jnp.float32)
        outcomes = []
        for given_batches in ([good, good], [good, wrong, wrong, good]):
            state = init_state(_params(0), tx)
            metrics = []
            for one in given_batches:
                state, m = step(state, None, one, SHAPE)
                metrics.append(jax.device_get(m))
            outcomes.append((jax.device_get(state), metrics))
    (state, metrics), (after_bad, seen) = outcomes
    assert [float(m["skipped"]) for m in seen] == [0, 1, 1, 0]
    assert np.isfinite(seen[1]["dpo_loss"]) == (where != "the loss")
    assert not np.isfinite(seen[1]["grad_norm"])
    chex.assert_trees_all_equal(after_bad, state)  # bit by bit, the schedule's count too
    chex.assert_trees_all_equal(seen[-1], metrics[-1])


def test_padding_may_hold_anything(one_device):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    rows = oracle.rows(PAIRS, PLACED, SHAPE)
    rows = rows._replace(tokens=np.where(rows.segments == 0, 60, rows.tokens).astype(np.int32))
    with jax.set_mesh(mesh):
        step = make_train_step(_logps(axis_rules(CONFIG, mesh)), OBJECTIVE, TX, RATE, compute_dtype=jnp.float32)
        _, metrics = step(init_state(_params(0), TX), _params(1), to_global(rows, mesh, 8), SHAPE)
    _close(jax.device_get(metrics), one_device[2][0], atol=1e-6)


@pytest.mark.sweep
@pytest.mark.parametrize(("objective", "trained"), [(OBJECTIVE, "one_device"), (ACROSS, "across_one_device")])
def test_evaluation_is_what_a_training_step_reports(objective, trained, request):
    one_device = request.getfixturevalue(trained)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        step = make_eval_step(_logps(axis_rules(CONFIG, mesh)), objective, compute_dtype=jnp.float32)
        scored = step(_params(0), _params(1), to_global(oracle.rows(PAIRS, PLACED, SHAPE, 2), mesh, 4), SHAPE)
        by_pair = jax.tree.map(lambda x: np.asarray(x).reshape(*PLACED.shape, 2)[PLACED >= 0], scored)
        values = make_set_values(objective)(*by_pair, PAIRS.lengths[:, 1:])
    assert values.keys() <= one_device[2][0].keys()
    for name, value in values.items():
        assert value.mean() == pytest.approx(float(one_device[2][0][name]), abs=1e-5), name


def test_swapping_the_completions_negates_the_margin():
    swapped = oracle.RandomGroups(PAIRS.lengths[:, [0, 2, 1]])
    swapped.ids = [(p, r, c) for p, c, r in PAIRS.ids]
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        step = make_eval_step(_logps(axis_rules(CONFIG, mesh)), OBJECTIVE, compute_dtype=jnp.float32)
        a, b = (
            make_set_values(OBJECTIVE)(
                *jax.tree.map(
                    lambda x: np.asarray(x[0])[PLACED >= 0],
                    step(_params(0), _params(1), to_global(oracle.rows(p, PLACED, SHAPE), mesh, 8), SHAPE),
                ),
                p.lengths[:, 1:],
            )
            for p in (PAIRS, swapped)
        )
    np.testing.assert_allclose(a["margin"], -b["margin"], atol=1e-5)
    np.testing.assert_array_equal(a["accuracy"], 1 - b["accuracy"])


@pytest.mark.sweep
@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("loss", ["sigmoid", "aot"])
def test_the_load_balancing_loss_comes_on_top(loss, microbatches):
    """A model of two numbers: log-probabilities are linear in `a`, the experts' mean probabilities in `b`."""
    x = np.random.default_rng(0).normal(size=(microbatches, 4, 2, 2)).astype(np.float32)
    used = np.random.default_rng(1).uniform(size=(microbatches, 3)).astype(np.float32)
    # The two fields that this model reads hold its inputs.
    batch = Batch(
        tokens=np.zeros((microbatches, 4, 5), np.int32),
        segments=x,
        positions=used,
        source=np.zeros((microbatches, 4, 0), np.int32),
        is_group=np.ones((microbatches, 4, 2), bool),
        completion_tokens=np.ones((microbatches, 4, 2, 2), np.int32),
        ref_logps=np.zeros_like(x),
    )

    def logps(params, micro, slots):
        share = params["b"] * jnp.arange(1.0, 4.0)
        balance = {"assigned": micro.positions * 8, "probability": share * 8, "tokens": jnp.float32(8)}
        return Logps(params["a"] * micro.segments, balance=balance)

    def metrics_at(a, b):
        objective = preference_objective({loss: 1.0}, beta=0.1, balance=0.5)
        rate = rate_schedule("constant", peak=1.0, warmup_steps=0, total_steps=1)
        step = make_train_step(logps, objective, optax.sgd(1.0), rate, compute_dtype=jnp.float32)
        params = {"a": jnp.float32(a), "b": jnp.float32(b)}
        state, metrics = step(init_state(params, optax.sgd(1.0)), None, batch, SHAPE)
        return metrics, {
            name: params_before - float(state.params[name]) for name, params_before in (("a", a), ("b", b))
        }

    metrics, grads = metrics_at(0.7, 0.2)
    per_micro = 3 * (used * 0.2 * np.arange(1, 4)).sum(1)
    assert float(metrics["router_balance"]) == pytest.approx(per_micro.mean(), rel=1e-5)
    assert grads["b"] == pytest.approx(0.5 * per_micro.mean() / 0.2, rel=1e-4)
    h = 1e-2
    slope = (float(metrics_at(0.7 + h, 0.2)[0]["dpo_loss"]) - float(metrics_at(0.7 - h, 0.2)[0]["dpo_loss"])) / (2 * h)
    assert grads["a"] == pytest.approx(slope, abs=1e-3)

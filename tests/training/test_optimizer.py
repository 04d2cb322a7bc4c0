"""Schedules against transformers' formulas, optimisers against torch's update rules written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.config.settings import OptimizerOptions
from dpo_jax.training.optimizer import apply_updates, optimizer, rate_schedule
from dpo_jax.training.setup import make_optimizer

PARAMS = {"w": jnp.asarray([1.0, -2.0, 3.0]), "norm": {"scale": jnp.asarray([1.0, 1.0])}}


def _after(kind, step, warmup, total):
    """transformers' get_scheduler multiplier, by update counted from 0."""
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + np.cos(np.pi * progress))}[kind]


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedule_is_that_of_transformers(kind, warmup):
    rate = rate_schedule(kind, peak=2e-3, warmup_steps=warmup, total_steps=20)
    ours = [float(rate(jnp.asarray(i))) for i in range(20)]
    np.testing.assert_allclose(ours, [2e-3 * _after(kind, i, warmup, 20) for i in range(20)], rtol=1e-5, atol=1e-10)


def _run(kind, grads, weight_decay=0.0, max_grad_norm=0.0, lr=0.1):
    tx = optimizer(kind, lambda _: lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    params, state = PARAMS, tx.init(PARAMS)
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


def _grads(n=4):
    rng = np.random.default_rng(0)
    return [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), PARAMS) for _ in range(n)]


def test_adamw_decays_weights_and_not_norms():
    grads, lr, decay = _grads(), 0.1, 0.01
    ours = _run("adamw", grads, weight_decay=decay)
    for path, has_decay in ((("w",), True), (("norm", "scale"), False)):
        get = lambda tree, path=path: np.asarray(
            tree[path[0]] if len(path) == 1 else tree[path[0]][path[1]], np.float64
        )
        w, m, v = get(PARAMS), 0.0, 0.0
        for t, g in enumerate(map(get, grads), 1):
            w = w * (1 - lr * decay * has_decay)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            w = w - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        np.testing.assert_allclose(get(ours), w, rtol=1e-5)


def test_rmsprop_is_torchs():
    grads, lr = _grads(), 0.1
    w, v = np.asarray(PARAMS["w"], np.float64), 0.0
    for g in (np.asarray(g["w"], np.float64) for g in grads):
        v = 0.99 * v + 0.01 * g * g
        w = w - lr * g / (np.sqrt(v) + 1e-8)
    np.testing.assert_allclose(_run("rmsprop", grads)["w"], w, rtol=1e-5)


def test_clipping_is_by_global_norm():
    """RMSprop's first update depends on the gradient's direction only, its second on both gradients' sizes."""
    grads = _grads(2)
    norm = lambda g: np.sqrt(sum(float((np.asarray(x) ** 2).sum()) for x in jax.tree.leaves(g)))
    clipped = [jax.tree.map(lambda x, g=g: x * min(1, 0.5 / norm(g)), g) for g in grads]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        _run("rmsprop", grads, max_grad_norm=0.5),
        _run("rmsprop", clipped),
    )
    assert norm(grads[0]) > 0.5


def test_updates_too_small_for_bfloat16_move_it_in_the_mean():
    """0.02 lies 6e-5 from the next number in bfloat16; a hundred updates of 1e-6 move it by 1e-4 nevertheless."""
    start = {"w": jnp.full((200, 200), 0.02, jnp.bfloat16), "exact": jnp.full(3, 0.02)}
    down = jax.tree.map(lambda p: jnp.full(p.shape, -1e-6), start)
    update = jax.jit(apply_updates)
    params = start
    for count in range(100):
        params = update(params, down, count)
    moved = np.asarray(params["w"], np.float64) - float(start["w"][0, 0])
    assert moved.mean() == pytest.approx(-1e-4, rel=0.02)
    assert params["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(params["exact"], 0.02 - 1e-4, rtol=1e-5)
    # Each update goes to one of the two numbers around the exact sum, the same ones at the same count.
    once = update(start, down, 7)["w"]
    assert set(np.unique(np.asarray(once, np.float32))) <= {float(x) for x in _neighbours(0.02 - 1e-6)}
    np.testing.assert_array_equal(once, update(start, down, 7)["w"])
    assert (once != update(start, down, 8)["w"]).any()


def _neighbours(x):
    """The bfloat16 numbers below and above."""
    low = (np.float32(x).view(np.uint32) & 0xFFFF0000).astype(np.uint32)
    return low.view(np.float32), (low + np.uint32(0x10000)).view(np.float32)


def test_what_is_a_bfloat16_number_stays_what_it_is():
    params = {"w": jnp.asarray([0.0, -0.0, 1.0, -2.5, 3e38, -1e-30], jnp.bfloat16)}
    zero = {"w": jnp.zeros(6)}
    for count in range(20):
        np.testing.assert_array_equal(apply_updates(params, zero, count)["w"], params["w"])


@pytest.mark.parametrize(
    ("warmup", "steps", "rates"),
    [
        (0.1, 1, [1.0]),  # a run of one update makes it
        (0.1, 10, [0.0, 1.0]),
        (0.25, 10, [0.0, 1 / 3, 2 / 3, 1.0]),  # rounded up, as transformers does
        (2, 10, [0.0, 0.5, 1.0]),
        (0.0, 10, [1.0]),
    ],
)
def test_warm_up_by_updates_or_by_their_share(warmup, steps, rates):
    _, rate = make_optimizer(OptimizerOptions("adamw", 1.0, "linear", warmup, 0.0, 1.0), steps)
    np.testing.assert_allclose([rate(n) for n in range(len(rates))], rates, rtol=1e-6)

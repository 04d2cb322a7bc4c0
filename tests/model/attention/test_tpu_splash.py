"""The attention kernel, interpreted, against dense blocks; its tiles against brute force."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.model.attention.dense import Scores, dense_attention
from dpo_jax.model.attention.tpu_splash import (
    Tiling,
    splash_attention,
    tile,
    tiles_run,
    visible,
)
from dpo_jax.parallel.mesh import make_mesh
from dpo_jax.rows.shape import RowShape

TILING = Tiling(256, interpret=True)
SLOTS = RowShape(120, (56, 72))  # 248 tokens: padded to whole tiles


def _segments(rng, rows, slots):
    """Two pairs and padding in every slot."""
    out = np.zeros((rows, slots.length), np.int32)
    for row in out:
        start = 0
        for width in slots.widths:
            first, end = np.sort(rng.choice(np.arange(1, width), 2, replace=False))
            row[start : start + first], row[start + first : start + end] = 1, 2
            start += width
    return out


def _inputs(dtype, heads=4, kv_heads=2, rows=2, width=32, slots=SLOTS):
    rng = np.random.default_rng(0)
    # As large as a trained model's: one spacing of bfloat16 is then 2e-3 or less.
    q, k, v, out = (
        jnp.asarray(size * rng.normal(size=(rows, slots.length, n, width)), dtype)
        for n, size in ((heads, 1.0), (kv_heads, 1.0), (kv_heads, 0.1), (heads, 0.1))
    )
    segments = jnp.asarray(_segments(rng, rows, slots))
    return q, k, v, segments, jnp.where((segments != 0)[:, :, None, None], out, 0)


@contextlib.contextmanager
def _on_mesh(sizes, kv_heads):
    """Rows and heads spread as the product's rules do it; kv-heads that do not divide are everywhere."""
    by_kv_head = "tensor" if kv_heads % sizes[2] == 0 else None
    rules = [("rows", ("data", "fsdp")), ("heads", "tensor"), ("kv_heads", by_kv_head)]
    with jax.set_mesh(make_mesh(*sizes)), nn.logical_axis_rules(rules):
        yield


def _value_and_gradients(attend, q, k, v, segments, cotangent):
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segments), q, k, v)
    real = (segments != 0)[:, :, None, None]
    return jax.tree.map(lambda x: np.asarray(x, np.float32), (jnp.where(real, out, 0), *pull(cotangent)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "within", "softcap", "heads"),  # pairwise
    [
        (jnp.float32, 1e-5, None, (4, 2)),
        (jnp.bfloat16, 2e-3, 5.0, (4, 2)),
        (jnp.float32, 1e-5, 5.0, (4, 4)),
        (jnp.bfloat16, 2e-3, None, (4, 4)),
        (jnp.float32, 1e-5, 5.0, (4, 1)),
        (jnp.bfloat16, 2e-3, None, (4, 1)),
    ],
)
def test_the_kernel_is_dense_attention_with_its_gradients(dtype, within, softcap, heads):
    inputs = _inputs(dtype, *heads)
    options = {"shape": SLOTS, "scores": Scores(softcap=softcap)}
    ours = _value_and_gradients(functools.partial(splash_attention, tiling=TILING, **options), *inputs)
    theirs = _value_and_gradients(functools.partial(dense_attention, **options), *inputs)
    for name, a, b in zip(("out", "q", "k", "v"), ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=within, rtol=within if dtype == jnp.float32 else 8e-3, err_msg=name)


def test_scale_is_what_scores_are_multiplied_by():
    q, k, v, segments, _ = _inputs(jnp.float32)
    options = {"shape": SLOTS, "scores": Scores(scale=0.05)}
    ours = splash_attention(q, k, v, segments, tiling=TILING, **options)
    theirs = dense_attention(q, k, v, segments, **options)
    real = np.asarray(segments) != 0
    np.testing.assert_allclose(np.asarray(ours)[real], np.asarray(theirs)[real], atol=1e-5)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("sizes", "kv_heads"),
    [((2, 2, 2), 2), ((1, 2, 4), 2), ((1, 1, 8), 2), ((1, 4, 2), 1), ((1, 2, 4), 8)],
)
def test_every_mesh_runs_its_own_rows_and_heads(sizes, kv_heads):
    """Also where there are fewer kv-heads than tensor shards: then each takes those of its query heads."""
    inputs = _inputs(jnp.float32, 8, kv_heads, rows=4)
    attend = functools.partial(splash_attention, tiling=TILING, shape=SLOTS)
    alone = _value_and_gradients(attend, *inputs)
    with _on_mesh(sizes, kv_heads):
        spread = _value_and_gradients(jax.jit(attend), *inputs)
    for a, b in zip(spread, alone, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


WIDTHS = [(120, 56, 72), (500, 300, 200), (640, 256, 384), (700, 300, 0), (700, 300), (300, 200, 90, 7, 140, 0, 33)]


@pytest.mark.parametrize("slots", [RowShape(prompt, tuple(rest)) for prompt, *rest in WIDTHS])
@pytest.mark.parametrize("side", [128, 256, 512])
def test_tiles_that_run_are_those_with_anything_visible(slots, side):
    n = -(-slots.length // side)
    columns = np.arange(n * side)
    seen = visible(columns[:, None], columns[None, :], slots).reshape(n, side, n, side).any((1, 3))
    assert tiles_run(slots, side) == seen.sum()


def test_the_chosen_tile_is_the_cheapest_and_rows_are_padded_to_it():
    side, length = tile(RowShape(1216, (352, 432)), 1024)
    assert side % 128 == 0
    assert side <= 1024
    assert length % side == 0
    assert length - side < 2000 <= length
    assert tile(RowShape(64, (24, 24)), 1024) == (128, 128)

"""Attention in tiles that skip, against dense blocks with gradients, and what it skips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.errors import UserError
from dpo_jax.model import tuning
from dpo_jax.model.attention import cpu_tiles as tiles
from dpo_jax.model.attention.cpu_tiles import Skipping, tiled_attention
from dpo_jax.model.attention.dense import Scores, dense_attention
from dpo_jax.rows.shape import RowShape
from tests.model.attention.test_tpu_splash import _inputs, _on_mesh

SLOTS = RowShape(120, (56, 72))
SMALL = Skipping(16)


def _rows(lengths, slots):
    """Segment ids of rows with groups of these lengths `[rows, groups, 1+n]`, behind each other in every slot."""
    out = np.zeros((len(lengths), slots.length), np.int32)
    for row, pairs in zip(out, lengths, strict=True):
        begin = 0
        for slot, width in enumerate(slots.widths):
            ids = np.repeat(np.arange(1, len(pairs) + 1), [pair[slot] for pair in pairs])[:width]
            row[begin : begin + len(ids)] = ids
            begin += width
    return jnp.asarray(out)


@functools.cache
def _compiled(attend, **options):
    return jax.jit(lambda *inputs: _pulled(functools.partial(attend, **options), *inputs))


def _pulled(attend, q, k, v, segments, cotangent, *window):
    """What `_value_and_gradients` gives, inside jit."""
    options = {"window": window} if window else {}
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segments, **options), q, k, v)
    return jnp.where((segments != 0)[:, :, None, None], out, 0), *pull(cotangent)


def _same(inputs, skipping=SMALL, within=1e-5, relative=1e-5, slots=SLOTS, **options):
    """The gradient of padding's own output is no matter: it is masked wherever a loss comes from it."""
    q, k, v, segments, cotangent, *window = inputs
    inputs = (q, k, v, segments, jnp.where((segments != 0)[:, :, None, None], cotangent, 0), *window)
    ours = _compiled(tiled_attention, skipping=skipping, shape=slots, **options)(*inputs)
    theirs = _compiled(dense_attention, shape=slots, **options)(*inputs)
    for name, a, b in zip(("out", "q", "k", "v"), ours, theirs, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=within, rtol=relative, err_msg=name)


def _random(slots, rows=2, heads=4, kv_heads=2):
    """Queries, keys, values and a cotangent."""
    rng = np.random.default_rng(0)
    shapes = [(rows, slots.length, n, 32) for n in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("dtype", "heads", "softcap"),
    [
        (jnp.float32, (4, 2), None),
        (jnp.float32, (4, 4), 5.0),
        (jnp.float32, (4, 1), None),
        (jnp.bfloat16, (4, 2), None),
    ],
)
def test_tiles_are_dense_attention_with_its_gradients(dtype, heads, softcap):
    close = {"within": 1e-5, "relative": 1e-5} if dtype == jnp.float32 else {"within": 2e-3, "relative": 1.6e-2}
    _same(_inputs(dtype, *heads), scores=Scores(softcap=softcap), **close)


pair = st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(1, 20))


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(pair, min_size=0, max_size=8), min_size=2, max_size=2), st.sampled_from([8, 24, 200]))
def test_any_pairs_in_a_row_and_any_tile(lengths, tile):
    """Also an empty row, pairs that are longer than a tile, and slots that are full or no multiple of it."""
    q, k, v, cotangent = _random(SLOTS)
    _same((q, k, v, _rows(lengths, SLOTS), cotangent), Skipping(tile), scores=Scores(scale=0.3))


def test_pairs_in_no_order_are_as_right():
    q, k, v, cotangent = _random(SLOTS)
    segments = jnp.asarray(np.random.default_rng(1).integers(0, 4, size=(2, SLOTS.length)), jnp.int32)
    _same((q, k, v, segments, cotangent))


@pytest.mark.parametrize(
    "slots", [RowShape(64, (40,)), RowShape(64, (40, 0)), RowShape(0, (48, 40)), RowShape(8, (100, 1))]
)
def test_slots_that_are_empty_or_shorter_than_a_tile(slots):
    """Also rows of an SFT phase, which have one completion slot."""
    q, k, v, cotangent = _random(slots)
    _same((q, k, v, _rows([[(5, 30, 1), (3, 8, 12)], [(64, 99, 40)]], slots), cotangent), slots=slots)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_window_counts_positions(size):
    q, k, v, segments, cotangent = _inputs(jnp.float32)
    positions = np.zeros_like(segments)
    for row, out in zip(np.asarray(segments), positions, strict=True):
        for i in (1, 2):  # both completions go on from the prompt's end
            prompt = np.flatnonzero(row[: SLOTS.prompt] == i)
            out[prompt] = np.arange(len(prompt))
            for begin, width in zip(SLOTS.starts[1:], SLOTS.completions, strict=True):
                own = begin + np.flatnonzero(row[begin : begin + width] == i)
                out[own] = len(prompt) + np.arange(len(own))
    _same((q, k, v, segments, cotangent, jnp.asarray(positions), jnp.int32(size)))


@pytest.mark.sweep
@pytest.mark.parametrize(("sizes", "kv_heads"), [((2, 2, 2), 2), ((1, 4, 2), 1), ((1, 2, 4), 8)])
def test_every_mesh_runs_its_own_rows_and_heads(sizes, kv_heads):
    inputs = _inputs(jnp.float32, 8, kv_heads, rows=4)
    options = {"shape": SLOTS}
    theirs = _compiled(dense_attention, **options)(*inputs)
    attend = functools.partial(tiled_attention, skipping=SMALL, **options)
    with _on_mesh(sizes, kv_heads):
        ours = jax.jit(functools.partial(_pulled, attend))(*inputs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_keys_of_other_pairs_are_not_read():
    """Where they are not a number, what is skipped tells itself from what is masked: 0 times NaN is NaN."""
    slots, rng = RowShape(512, (64, 64)), np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, slots.length, 2, 8)), jnp.float32) for _ in range(3))
    segments = _rows([[(192, 32, 32), (320, 32, 32)]], slots)  # as wide as stretches are rounded to
    first_prompt = (segments == 1) & (jnp.arange(slots.length) < slots.prompt)[None]
    spoilt = jnp.where(first_prompt[:, :, None, None], jnp.nan, v)
    options = {"shape": slots, "skipping": Skipping(32)}
    out = np.asarray(jax.jit(functools.partial(tiled_attention, **options))(q, k, spoilt, segments))
    second = np.asarray(segments[0]) == 2
    assert np.isfinite(out[0, second]).all()
    dense = np.asarray(jax.jit(functools.partial(dense_attention, shape=slots))(q, k, spoilt, segments))
    assert np.isnan(dense[0, second]).all()


def test_the_widths_hold_every_stretch_and_hardly_more():
    slots = RowShape(1200, (344, 424))
    lengths = np.random.default_rng(0).integers((60, 10, 10), (240, 80, 100), size=(8, 3))
    spec = tiles._Spec(slots, 64, 1.0, None)
    segments = spec.pad(_rows([lengths], slots))
    shown = 0
    for kind in tiles._kinds(spec):
        _, needed = jax.jit(functools.partial(tiles._stretches, spec, kind))(segments)
        table, bounds = jax.jit(functools.partial(tiles._schedule, spec, kind))(segments)
        assert bounds[-1] == len(table)
        assert int(bounds[0]) == int((needed == 0).all(-1).sum())
        for i, widths in enumerate(kind.widths):
            for _, start, _, _ in np.asarray(table[bounds[i] : bounds[i + 1]]):
                sizes = tuple(needed[0, list(kind.starts).index(start)].tolist())
                held = [w for w in kind.widths if sizes[0] <= w[0] and sizes[1] <= w[1]]
                assert widths == min(held, key=sum)
                shown += 64 * sum(widths)
    dense = 1200 * 1201 / 2 + 768 * 1200 + (344 * 345 + 424 * 425) / 2
    own = sum(p * (p + 1) / 2 + (c + r) * p + (c * (c + 1) + r * (r + 1)) / 2 for p, c, r in lengths.tolist())
    assert own < shown < 0.45 * dense


def test_tiles_are_for_cpu():
    class Elsewhere:
        platform = "gpu"

    with pytest.raises(UserError, match="attention=tiles is for CPU, and this is gpu"):
        tuning.choose_tiling("tiles", Elsewhere())
    assert tuning.choose_tiling("auto", Elsewhere()) is None
    assert tuning.choose_tiling("auto", jax.devices()[0]) == Skipping()
    assert tuning.choose_tiling("dense", jax.devices()[0]) is None

"""Meshes: what is refused, and who holds which rows."""

import dataclasses

import jax
import numpy as np
import pytest

from dpo_jax.errors import UserError
from dpo_jax.model.placement import axis_rules, param_shardings
from dpo_jax.parallel.mesh import local_rows, make_mesh, row_shards, to_global
from tests.oracles.oracle import CONFIG


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 1, 8), (1, 1, 8)), ((1, -1, 1), (1, 8, 1))],
)
def test_sizes(sizes, shape):
    mesh = make_mesh(*sizes)
    assert tuple(mesh.shape.values()) == shape
    assert row_shards(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((3, 1, 1), "mesh of 3 devices, but there are 8"),
        ((3, -1, 1), "3 does not divide the 8 devices"),
        ((-1, -1, 1), "at most one"),
        ((0, 1, 1), "positive"),
        ((16, 1, 1), "mesh of 16 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, words):
    with pytest.raises(UserError, match=words):
        make_mesh(*sizes)


@pytest.mark.parametrize(
    ("sizes", "changed", "words"),
    [
        ((1, 8, 1), {"hidden_size": 12}, "mesh_fsdp=8 does not divide the model's hidden_size=12"),
        ((1, 1, 8), {}, "mesh_tensor=8 does not divide the model's num_attention_heads=4"),
    ],
)
def test_a_model_that_does_not_divide_is_refused(sizes, changed, words):
    with pytest.raises(UserError, match=words):
        axis_rules(dataclasses.replace(CONFIG, **changed), make_mesh(*sizes))


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 2, 4), (2, 2, 2), (1, 1, 8)])
@pytest.mark.parametrize("vocab", [48, 49])
def test_tables_are_spread_whether_or_not_their_tokens_divide(vocab, sizes):
    config = dataclasses.replace(CONFIG, vocab_size=vocab, num_attention_heads=8, intermediate_size=32)
    mesh = make_mesh(*sizes)
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    tables = {k: s for k, s in param_shardings(config, mesh).items() if k in ("embedding", "lm_head")}
    assert tables
    shape = (vocab, config.hidden_size)
    for sharding in tables.values():
        assert np.prod(sharding.shard_shape(shape)) * parts == np.prod(shape)


def test_rows_are_spread_over_data_and_fsdp():
    mesh = make_mesh(2, 2, 2)
    np.testing.assert_array_equal(local_rows(mesh, 8), np.arange(8))  # one process holds them all
    rows = np.arange(2 * 8 * 3, dtype=np.int32).reshape(2, 8, 3)
    placed = to_global({"x": rows}, mesh, 8)["x"]
    np.testing.assert_array_equal(placed, rows)
    assert placed.addressable_shards[0].data.shape == (2, 2, 3)
    assert len({s.index[1].start for s in placed.addressable_shards}) == 4
    assert jax.device_count() == 8

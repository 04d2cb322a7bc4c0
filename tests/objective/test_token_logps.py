"""The spread vocabulary: the same values and gradients on every mesh, and no array as large as all logits."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.model.vocabulary import embed
from dpo_jax.objective.token_logps import LogpOptions, token_logps
from dpo_jax.parallel.mesh import make_mesh
from dpo_jax.parallel.spread import Spread

ROWS, N, D = 8, 12, 8


def _rules(width):
    """Where tables lie by width if their tokens do not divide: over all that holds the vocabulary, or some of it."""
    return [("rows", ("data", "fsdp")), ("vocab_parts", ("tensor", "fsdp")), ("table", width)]


def _all(table, hidden, tokens, weights, options):
    """Embeddings and log-probabilities with their gradients to everything."""

    def loss(table, hidden):
        values = token_logps(hidden, tokens, table, options)
        total = jnp.sum(values.logps * weights) + jnp.sum(embed(table, tokens) * hidden) / 3
        return total, (values, embed(table, tokens))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(table, hidden)


def _inputs(vocab):
    rng = np.random.default_rng(0)
    table, hidden, weights = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((vocab, D), (ROWS, N, D), (ROWS, N))
    )
    return table, hidden, jnp.asarray(rng.integers(0, vocab, (ROWS, N))), weights


SIZES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)]
VOCABULARIES = [40, 31, 5]  # divides, does not; some parts are padding and nothing else
WAYS = [(None, "fsdp"), (2.0, None), (2.0, ("tensor", "fsdp"))]  # softcap, and where a table lies by width
# Every mesh with every vocabulary, and each of both with every way.
PAIRWISE = [(sizes, vocab, *WAYS[(i + j) % 3]) for i, sizes in enumerate(SIZES) for j, vocab in enumerate(VOCABULARIES)]


def _options(softcap):
    """With a softcap also a temperature, and without one also log Σ p²."""
    return LogpOptions(
        16, softcap=softcap, temperature=0.7 if softcap else 1.0, log_sum_sq=softcap is None, entropy=True
    )


@functools.cache
def _alone(vocab, options):
    return _all(*_inputs(vocab), options)


@pytest.mark.sweep
@pytest.mark.parametrize(("sizes", "vocab", "softcap", "width"), PAIRWISE)
def test_every_mesh_gives_the_same_values_and_gradients(sizes, vocab, softcap, width):
    options = _options(softcap)
    for block in (None, 4):
        with jax.set_mesh(make_mesh(*sizes)), nn.logical_axis_rules(_rules(width)):
            spread = _all(*_inputs(vocab), dataclasses.replace(options, block=block))
        # Values are sums of a hundred log-probabilities of -10 and less, which cancel.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), spread, _alone(vocab, options))


BLOCKS = [(3, 4), (1000, 4), (7, 1), (16, 40), (16, 1000)]


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("vocab", "chunk", "block", "softcap"),  # every pair of a vocabulary and blocks, with and without a cap in turn
    [(v, *b, (None, 2.0)[(i + j) % 2]) for i, v in enumerate([1, 7, 40, 31]) for j, b in enumerate(BLOCKS)],
)
def test_blocks_of_the_vocabulary_change_nothing(vocab, chunk, block, softcap):
    inputs, options = _inputs(vocab), _options(softcap)
    found = _all(*inputs, dataclasses.replace(options, chunk_tokens=chunk, block=block))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-5), found, _all(*inputs, options))


def test_logits_that_one_block_dwarfs_are_summed_exactly():
    """The running maximum moves by hundreds from block to block, up and down."""
    table = jnp.asarray([[-300.0], [500.0], [-400.0], [499.0], [0.0], [500.5]])
    options = LogpOptions(16, block=1, log_sum_sq=True, entropy=True)
    logps, squares, entropy = token_logps(jnp.ones((1, 2, 1)), jnp.asarray([[3, 5]]), table, options)
    logits = np.asarray(table, np.float64)[:, 0]
    expected = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    np.testing.assert_allclose(logps[0], expected[[3, 5]], atol=3e-5)  # a unit in the last place of 500
    np.testing.assert_allclose(squares[0], [np.log(np.exp(2 * expected).sum())] * 2, atol=6e-5)
    np.testing.assert_allclose(entropy[0], [-(np.exp(expected) * expected).sum()] * 2, atol=6e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("block", [None, 4])
def test_temperature_and_entropy_are_those_of_float64(temperature, softcap, block):
    table, hidden, tokens, weights = _inputs(31)
    options = LogpOptions(16, block=block, softcap=softcap, temperature=temperature, entropy=True)
    logits = np.einsum("bnd,vd->bnv", np.asarray(hidden, np.float64), np.asarray(table, np.float64))
    capped = softcap * np.tanh(logits / softcap) if softcap else logits
    scaled = capped / temperature
    scaled -= scaled.max(-1, keepdims=True)
    log_p = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    values = token_logps(hidden, tokens, table, options)
    hit = np.asarray(tokens)[..., None]
    np.testing.assert_allclose(values.logps, np.take_along_axis(log_p, hit, -1)[..., 0], atol=2e-5)
    np.testing.assert_allclose(values.entropy, -(np.exp(log_p) * log_p).sum(-1), atol=2e-5)
    found = jax.grad(lambda h: jnp.sum(token_logps(h, tokens, table, options).logps * weights))(hidden)
    back = (np.eye(31)[np.asarray(tokens)] - np.exp(log_p)) * np.asarray(weights, np.float64)[..., None] / temperature
    back = back * (1 - (capped / softcap) ** 2) if softcap else back
    np.testing.assert_allclose(found, back @ np.asarray(table, np.float64), atol=5e-5)


def test_rows_that_do_not_divide_are_everywhere():
    table, _, tokens, _ = _inputs(40)
    sizes = (1, 8, 1)
    with jax.set_mesh(make_mesh(*sizes)), nn.logical_axis_rules(_rules(None)):
        assert Spread.of(3).rows == ()
        found = jax.jit(embed)(table, tokens[:3])
    np.testing.assert_array_equal(found, np.asarray(table)[np.asarray(tokens[:3])])


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 1), (2, 2, 2)])
@pytest.mark.parametrize("block", [None, 64, 1000])
@pytest.mark.parametrize("vocab", [1048, 1047])
def test_no_array_holds_all_logits_or_a_table_of_the_whole_vocabulary(sizes, block, vocab):
    """Every buffer of the compiled program, forward and backward."""
    rows, n, width = 16, 48, 16
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = make_mesh(*sizes, devices=devices)
    table, hidden, tokens = jnp.zeros((vocab, width)), jnp.zeros((rows, n, width)), jnp.zeros((rows, n), jnp.int32)

    def loss(table, hidden):
        return token_logps(hidden, tokens, table, LogpOptions(16, block))[0].sum() + embed(table, tokens).sum()

    divides = vocab % (sizes[1] * sizes[2]) == 0
    with jax.set_mesh(mesh), nn.logical_axis_rules(_rules(None if divides else ("tensor", "fsdp"))):
        table_spec = jax.P(("tensor", "fsdp")) if divides else jax.P(None, ("tensor", "fsdp"))
        shardings = [jax.NamedSharding(mesh, spec) for spec in (table_spec, jax.P(("data", "fsdp")))]
        step = jax.jit(jax.grad(loss, argnums=(0, 1)), in_shardings=shardings, out_shardings=tuple(shardings))
        text = step.lower(table, hidden).compile().as_text()
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"\b(?:f32|bf16|pred|s32)\[([\d,]+)\]", text)}
    row_shards, shards = sizes[0] * sizes[1], sizes[1] * sizes[2]
    largest = max(int(np.prod(shape)) for shape in shapes if shape[-1] > n)
    # A device's rows x tokens x vocabulary would be this much; chunks hold a small part of it.
    assert largest <= rows // row_shards * n * vocab // 4
    if shards > 1:
        whole = [shape for shape in shapes if np.prod(shape) >= vocab * width and max(shape) >= vocab]
        assert not whole, "a device holds a whole table"

"""One draw against the distribution that temperature and filters make, enumerated in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.sampling import draws
from dpo_jax.sampling.draws import Choice, Filters, Numbers, blocks_of, draw
from dpo_jax.sampling.params import SamplingParams

V, DRAWS = 24, 20_000
LOGITS = np.random.default_rng(0).normal(size=V).astype(np.float32) * 2
LOGITS[[3, 11]] = LOGITS[7]  # equally likely tokens
SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"top_p": 0.05},
    {"min_p": 0.1},
    {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.8, "min_p": 0.2, "min_tokens": 3},
]


def expected(logits, asked, stops=(), index=0):
    """The distribution, by the definitions."""
    z = logits.astype(np.float64).copy()
    if index < asked.min_tokens:
        z[list(stops)] = -np.inf
    z /= asked.temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    order = np.lexsort((np.arange(len(p)), -p))
    kept = order[: asked.top_k] if asked.top_k else order
    if asked.top_p < 1:
        share = p[kept] / p[kept].sum()
        kept = kept[: int(np.searchsorted(np.cumsum(share), asked.top_p)) + 1]
    kept = kept[p[kept] >= asked.min_p * p.max()]
    out = np.zeros(len(p))
    out[kept] = p[kept] / p[kept].sum()
    return out


def drawn(logits, asked, count, stops=(-1,), index=0, beside=()):
    """`count` rows that ask for the same; `beside` are what every second, third, ... row asks for instead."""
    who = jnp.stack(
        [jnp.arange(count, dtype=jnp.uint32), jnp.zeros(count, jnp.uint32), jnp.zeros(count, jnp.uint32)], 1
    )
    rows = jnp.broadcast_to(jnp.asarray(logits), (count, len(logits)))
    run = jax.jit(functools.partial(draw, filters=Filters.of(asked, *beside), blocks=blocks_of(len(logits))))
    choice = Choice.empty(count)
    for row in range(count):
        choice.put(row, Choice.of([asked, *beside][row % (1 + len(beside))]))
    return run(rows, who, jnp.full(count, index, jnp.int32), choice, Numbers.of(asked, stops))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_draws_have_their_distribution(setting):
    """Pearson's chi-square at a million to one, with the degrees of freedom of the tokens that can be drawn."""
    asked = SamplingParams(max_tokens=8, **setting)
    p = expected(LOGITS, asked, stops=[5])
    out = drawn(LOGITS, asked, DRAWS, stops=[5])
    counts = np.bincount(out.token, minlength=V)
    assert counts[p == 0].sum() == 0
    likely = p * DRAWS >= 5
    chi = (((counts - DRAWS * p)[likely] ** 2) / (DRAWS * p)[likely]).sum()
    freedom = max(1, likely.sum() - 1)
    assert chi < freedom + 5 * (2 * freedom) ** 0.5 + 20
    np.testing.assert_allclose(out.logprob, np.log(p[out.token]), atol=2e-6)
    z = LOGITS.astype(np.float64)
    np.testing.assert_allclose(out.full, (z - np.log(np.exp(z).sum()))[out.token], atol=2e-6)


def test_a_wrong_distribution_would_be_seen():
    p = expected(LOGITS, SamplingParams(temperature=1.05))
    counts = np.bincount(drawn(LOGITS, SamplingParams(), DRAWS).token, minlength=V)
    likely = p * DRAWS >= 5
    assert (((counts - DRAWS * p)[likely] ** 2) / (DRAWS * p)[likely]).sum() > 2 * V


def test_greedy_takes_the_first_of_the_most_likely():
    asked = SamplingParams(temperature=0.0, top_k=3, top_p=0.1, min_p=0.5)
    out = drawn(np.float32([1, 4, 4, 0]), asked, 5)
    assert (out.token == 1).all()
    assert (out.logprob == 0).all()


@pytest.mark.parametrize("vocabulary", [1, 61, 4096, 50257, 128256])
def test_blocks_hold_the_vocabulary(vocabulary):
    blocks = blocks_of(vocabulary)
    assert 1 <= blocks <= max(512, vocabulary**0.5)
    assert -(-vocabulary // blocks) <= 4096


@pytest.mark.parametrize("vocabulary", [61, 4096, 4097])
def test_every_token_can_be_drawn_and_no_other(vocabulary):
    logits = np.full(vocabulary, -np.inf, np.float32)
    logits[[0, vocabulary // 3, vocabulary - 1]] = 0
    counts = np.bincount(drawn(logits, SamplingParams(), 600).token, minlength=vocabulary)
    assert set(np.flatnonzero(counts)) == {0, vocabulary // 3, vocabulary - 1}
    assert counts.max() < 300


@pytest.mark.slow
def test_a_nucleus_wider_than_the_candidates_is_sorted_whole(monkeypatch):
    """A row's draw does not depend on whether a row beside it needs more candidates than were looked at."""
    logits = np.random.default_rng(1).normal(size=300).astype(np.float32) * 0.1
    for setting in ({"top_p": 0.95}, {"top_k": 280}, {"top_k": 290, "top_p": 0.99, "min_p": 0.5}):
        asked = SamplingParams(**setting)
        p = expected(logits, asked)
        assert (p > 0).sum() > draws.CANDIDATES or asked.min_p
        out = drawn(logits, asked, 4000)
        np.testing.assert_allclose(out.logprob, np.log(p[out.token]), atol=1e-5)
        monkeypatch.setattr(draws, "CANDIDATES", 300)
        assert (drawn(logits, asked, 4000).token == out.token).all()
        monkeypatch.undo()


@pytest.mark.sweep
@pytest.mark.parametrize("vocabulary", [61, 300, 4097])
def test_a_rows_draw_does_not_depend_on_what_rows_beside_it_ask_for(vocabulary):
    """Greedy, filtered by rank with few and with all candidates, by min_p, by nothing."""
    logits = np.random.default_rng(2).normal(size=vocabulary).astype(np.float32)
    settings = [{}, {"temperature": 0.0, "top_p": 0.5}, {"top_p": 0.9, "temperature": 0.8}, {"min_p": 0.2}]
    settings += [{"top_k": 5, "min_p": 0.1}, {"temperature": 1.3}, {"top_k": 290, "top_p": 0.99}]
    every = [SamplingParams(**one) for one in settings]
    count = 60 * len(every)
    mixed = drawn(logits, every[0], count, beside=every[1:])
    for k, asked in enumerate(every):
        alone = drawn(logits, asked, count)
        mine = slice(k, None, len(every))
        assert (mixed.token[mine] == alone.token[mine]).all(), asked
        np.testing.assert_allclose(mixed.logprob[mine], alone.logprob[mine], atol=1e-6)
        assert len(set(alone.token[mine].tolist())) > 1 or not asked.temperature


def test_draws_are_a_function_of_who_and_when():
    out = {}
    for who in itertools.product((0, 1), repeat=3):
        for index, seed, round_ in itertools.product((0, 1), repeat=3):
            numbers = Numbers.of(SamplingParams(seed=seed, round=round_), [-1])
            u = draws._uniforms(jnp.asarray([who], jnp.uint32), jnp.asarray([index], jnp.int32), numbers)
            out[who, index, seed, round_] = float(u[0][0])
    assert len(set(out.values())) == len(out)

"""Attention over prompts, pages and the buffer against plain float64 attention of each row's whole sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.model.attention.dense import Scores
from dpo_jax.model.attention.paged import (
    Kept,
    LayerCache,
    Tables,
    for_keeping,
    key_heads,
    paged_attention,
    write_pages,
    write_prompts,
)

# Three prompts, one that nobody asks; five rows, one empty; four answers at most to a prompt; pages of four columns.
PROMPTS, OWN, RECENT = (5, 9, 3), (6, 0, 4, 3, 0), 2
ASKED = (0, 0, 2, 0, None)  # the prompt of each row
PAGES = ((7, 1), (), (3,), (0,), ())
R, S, N, J, T, M, A = 5, 12, 8, 4, 4, 2, 4
H, G, E = 6, 3, 8


def random(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def written(dtype=jnp.float32, heads=G):
    """Keys and values `[tokens, G, E]` of every row's sequence and of its new token, and the cache that holds them."""
    prompts = [[random(n, G, E, seed=10 * i + j) for j in (0, 1)] for i, n in enumerate(PROMPTS)]
    tails = [[random(n + RECENT + 1, G, E, seed=100 + 10 * r + j) for j in (0, 1)] for r, n in enumerate(OWN)]
    zeros = lambda *shape: jnp.zeros(shape, dtype)
    scales = lambda x, c: [jnp.zeros((x, heads, c)) for _ in (0, 1)] if dtype == jnp.int8 else []
    kept = Kept(zeros(3, heads, E, S), zeros(3, heads, S, E), *scales(3, S))
    packed = [for_keeping(jnp.asarray(np.concatenate([p[j] for p in prompts])), heads) for j in (0, 1)]
    first = np.cumsum([0, *PROMPTS])[:3]
    kept = write_prompts(kept, *packed, jnp.arange(3), jnp.asarray(first))
    own = Kept(zeros(N, heads, J, E), zeros(N, heads, J, E), *scales(N, J))
    done = np.zeros(R, int)
    while (done < OWN).any():  # a chunk of up to three tokens at a time: pages are left half full and written on
        steps = np.minimum(3, np.array(OWN) - done)
        for r in np.flatnonzero(steps):
            buffer = [np.zeros((R, heads, T, E), np.float32) for _ in (0, 1)]
            for j in (0, 1):
                new = for_keeping(jnp.asarray(tails[r][j][done[r] : done[r] + steps[r]]), heads)
                buffer[j][r, :, : steps[r]] = np.swapaxes(new, 0, 1)
            targets = np.full((R, 2), N)
            mine = PAGES[r][done[r] // J :][:2]
            targets[r, : len(mine)] = mine
            own = write_pages(own, Kept(*map(jnp.asarray, buffer)), jnp.asarray(targets), jnp.asarray(done))
            done[r] += steps[r]
    recent = [np.zeros((R, heads, T, E), np.float32) for _ in (0, 1)]
    for r, n in enumerate(OWN):
        for j in (0, 1):
            recent[j][r, :, :RECENT] = np.swapaxes(for_keeping(jnp.asarray(tails[r][j][n : n + RECENT]), heads), 0, 1)
    whole = [
        [np.concatenate([prompts[p][j] if p is not None else prompts[0][j][:0], tails[r][j]]) for j in (0, 1)]
        for r, p in enumerate(ASKED)
    ]
    return whole, LayerCache(kept, own, Kept(*map(jnp.asarray, recent)))


def tables():
    asks, place = np.full((3, A), R), np.full(R, 3 * A)
    for p, rows in ((0, (3, 0, 1)), (2, (2,))):
        asks[p, : len(rows)] = rows
        place[list(rows)] = p * A + np.arange(len(rows))
    owner, start, pages = np.full(N, R), np.zeros(N, int), np.full((R, M), N)
    for r, mine in enumerate(PAGES):
        pages[r, : len(mine)] = mine
        for i, page in enumerate(mine):
            owner[page], start[page] = r, i * J
    position = [(PROMPTS[p] if p is not None else 0) + n for p, n in zip(ASKED, OWN, strict=True)]
    arrays = (asks, place, PROMPTS, owner, start, pages, OWN, position)
    return Tables(*(jnp.asarray(x, jnp.int32) for x in arrays))


def expected(q, k, v, window, scores):
    """One row's attention in float64: q `[H, E]`, k and v `[tokens, G, E]`."""
    k, v = (np.repeat(x.astype(np.float64), H // G, axis=1)[-(window or len(x)) :] for x in (k, v))
    z = np.einsum("HE,THE->HT", q.astype(np.float64), k) * (scores.scale or E**-0.5)
    if scores.softcap:
        z = scores.softcap * np.tanh(z / scores.softcap)
    w = np.exp(z - z.max(1, keepdims=True))
    return np.einsum("HT,THE->HE", w / w.sum(1, keepdims=True), v)


@pytest.mark.parametrize("window", [None, 4, 7])
@pytest.mark.parametrize("scores", [Scores(), Scores(0.5, 2.0)])
@pytest.mark.parametrize("heads", [G, H])
def test_a_row_attends_to_its_whole_sequence(window, scores, heads):
    whole, cache = written(heads=heads)
    q = random(R, 1, H, E, seed=1000)
    k, v = (for_keeping(jnp.asarray(np.stack([x[j][-1:] for x in whole])), heads) for j in (0, 1))
    size = None if window is None else jnp.int32(window)
    out = jax.jit(paged_attention, static_argnames="scores")(
        q, k, v, cache, tables(), jnp.int32(RECENT), window=size, scores=scores
    )
    for r in range(R):
        np.testing.assert_allclose(out[r, 0], expected(q[r, 0], *whole[r], window, scores), atol=1e-5)


@pytest.mark.slow
def test_int8_is_near_and_not_equal():
    q = random(R, 1, H, E, seed=1000)
    outs = []
    for dtype in (jnp.float32, jnp.int8):
        whole, cache = written(dtype)
        k, v = (jnp.asarray(np.stack([x[j][-1:] for x in whole])) for j in (0, 1))
        outs.append(paged_attention(q, k, v, cache, tables(), jnp.int32(RECENT)))
    assert 1e-4 < float(jnp.abs(outs[0] - outs[1]).max()) < 0.05


@pytest.mark.parametrize(
    ("heads", "kv_heads", "shards", "kept"),
    [(32, 8, 1, 8), (32, 8, 8, 8), (32, 8, 16, 16), (32, 4, 8, 8), (9, 3, 1, 3), (12, 6, 4, 12), (6, 2, 3, 6)],
)
def test_heads_are_kept_as_often_as_devices_need_them(heads, kv_heads, shards, kept):
    assert key_heads(heads, kv_heads, shards) == kept

"""Attention of one new token a row, for decoding: to its prompt, to its own earlier tokens, and to itself.

Keys and values lie in three places. A prompt's are kept once, for all answers to it. An answer's own are kept in pages
of a pool, so that they take the room of the tokens that are there. Those of the last tokens, since the pages were last
written, are in a short buffer. Attention is computed in each place for itself, and the softmaxes are merged (as in
Hydragen, Juravsky et al. 2024, arXiv 2402.05099). Nothing that a loop over tokens reads is copied or written in it but
the short buffer.

Shapes: R rows (answers), P prompts, A answers to a prompt at once, S columns of a prompt, N pages of J columns, M pages
of a row, T columns of the buffer, H query heads, G heads of the keys (H = G * Q), E head width. All numbers of rows,
prompts and pages are one device's own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dpo_jax.model.attention.dense import MASKED, PLAIN, Scores
from dpo_jax.parallel.spread import mesh_axes, per_device

INT8_LARGEST = 127.0


class Kept(NamedTuple):
    """Keys and values `[X, G, S, E]`; int8 ones with a float32 scale `[X, G, S]` each.

    Those of prompts have keys `[X, G, E, S]`, as products read them: on CPU a product of a few queries with many keys
    that lie as values do takes ten times as long.
    """

    k: Any
    v: Any
    k_scale: Any = None
    v_scale: Any = None


class Tables(NamedTuple):
    """Which row asks what is kept, int32; a number behind the last one stands for none.

    Attributes:
      asks: `[P, A]` rows that answer a prompt; None: row r answers prompt r.
      place: `[R]` where in `asks`, flat, a row stands.
      prompt_tokens: `[P]` length of a prompt.
      owner: `[N]` the row that a page belongs to.
      start: `[N]` how many tokens of that row's answer are before the page.
      pages: `[R, M]` a row's pages.
      kept: `[R]` how many tokens of a row's answer are in its pages.
      position: `[R]` of the first token that is not: prompt and pages together.
    """

    asks: Any
    place: Any
    prompt_tokens: Any
    owner: Any
    start: Any
    pages: Any
    kept: Any
    position: Any


class LayerCache(NamedTuple):
    """What one layer keeps: of P prompts S columns, of N pages J columns, and in the buffer of R rows T columns."""

    prompts: Kept
    own: Kept
    recent: Kept


def cached_heads(caches: Any) -> int:
    """Heads of the keys that are kept, of one layer's cache, of several, or of those of all layers in one."""
    while not isinstance(caches, LayerCache):
        caches = caches[0]
    return caches.recent.v.shape[-3]


def key_heads(heads: int, kv_heads: int, shards: int) -> int:
    """How many heads of keys are kept, so that they divide over `shards`: each kv-head once if that is enough."""
    return next(n for n in range(kv_heads, heads + 1, kv_heads) if n % shards == 0 and heads % n == 0)


def for_keeping(x: jax.Array, heads: int) -> jax.Array:
    """Keys or values `[..., G, E]` with each kv-head as often as `key_heads` asks."""
    return x if x.shape[-2] == heads else jnp.repeat(x, heads // x.shape[-2], axis=-2)


def keep(k: jax.Array, v: jax.Array, dtype: Any) -> Kept:
    """Keys and values, both `[..., S, E]`, in these numbers; int8 is rounded, with a scale for each token and head."""
    if dtype != jnp.int8:
        return Kept(k.astype(dtype), v.astype(dtype))

    def rounded(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x.astype(jnp.float32)
        scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), 1e-30) / INT8_LARGEST
        return jnp.round(x / scale[..., None]).astype(jnp.int8), scale

    (k, k_scale), (v, v_scale) = rounded(k), rounded(v)
    return Kept(k, v, k_scale, v_scale)


class _Part(NamedTuple):
    """Attention in one place, float32: the largest score, the sum of exponentials, and the weighted values."""

    largest: jax.Array
    total: jax.Array
    out: jax.Array


# Where a row asks nobody: weighed with nothing when it is merged, as is a part in which nothing is seen.
_NOTHING = (MASKED, 0.0, 0.0)


def _part(q: jax.Array, kept: Kept, seen: jax.Array, scores: Scores, keys: str = "XGSE") -> _Part:
    """What queries `[X, G, q, E]` find in X places; `seen` is bool and broadcasts to `[X, G, q, S]`."""
    E = q.shape[-1]
    z = jnp.einsum(f"XGqE,{keys}->XGqS", q, kept.k.astype(q.dtype), preferred_element_type=jnp.float32)
    z = z * (scores.scale or E**-0.5)
    if kept.k_scale is not None:
        z = z * kept.k_scale[:, :, None]
    if scores.softcap:
        z = scores.softcap * jnp.tanh(z / scores.softcap)
    z = jnp.where(seen, z, MASKED)
    largest = jnp.max(z, axis=-1)
    weights = jnp.exp(z - largest[..., None])
    total = jnp.sum(weights, axis=-1)
    if kept.v_scale is not None:
        weights = weights * kept.v_scale[:, :, None]
    v = kept.v.astype(q.dtype)
    out = jnp.einsum("XGqS,XGSE->XGqE", weights.astype(q.dtype), v, preferred_element_type=jnp.float32)
    return _Part(largest, total, out)


def _taken(x: jax.Array, at: jax.Array, none: float = 0) -> jax.Array:
    """`x[at]` along the first axis, `none` where `at` is behind the last."""
    return jnp.take(x, at, axis=0, mode="fill", fill_value=none)


def _near(distance: jax.Array, window: jax.Array | None) -> jax.Array:
    """Whether a token so many positions before is seen."""
    return distance < (jnp.iinfo(jnp.int32).max if window is None else window)


def _of_prompts(
    q: jax.Array, kept: Kept, tables: Tables, steps: jax.Array, window: jax.Array | None, scores: Scores
) -> _Part:
    """What rows find in their prompts, `[R, 1, G, Q, ...]`; all rows that answer one ask at once."""
    position_R, S = tables.position + steps, kept.v.shape[2]
    there_PS = jnp.arange(S)[None, :] < tables.prompt_tokens[:, None]
    if tables.asks is None:
        seen = there_PS & _near(position_R[:, None] - jnp.arange(S)[None, :], window)
        return _Part(*(x[:, None] for x in _part(q, kept, seen[:, None, None], scores, "XGES")))
    prompts, A = tables.asks.shape
    _, G, Q, E = q.shape
    asking = _taken(q, tables.asks).transpose(0, 2, 1, 3, 4).reshape(prompts, G, A * Q, E)
    seen = there_PS[:, None, None]
    if window is not None:
        distance = _taken(position_R, tables.asks)[:, :, None] - jnp.arange(S)[None, None, :]
        seen = jnp.repeat(there_PS[:, None] & _near(distance, window), Q, axis=1)[:, None]

    def to_rows(x: jax.Array, none: float) -> jax.Array:
        x = jnp.moveaxis(x.reshape(prompts, G, A, Q, *x.shape[3:]), 2, 1)
        return _taken(x.reshape(prompts * A, *x.shape[2:]), tables.place, none)[:, None]

    return _Part(*map(to_rows, _part(asking, kept, seen, scores, "XGES"), _NOTHING))


def _of_pages(
    q: jax.Array, kept: Kept, tables: Tables, steps: jax.Array, window: jax.Array | None, scores: Scores
) -> _Part:
    """What rows find in each of their pages, `[R, M, G, Q, ...]`."""
    column_NJ = tables.start[:, None] + jnp.arange(kept.v.shape[2])[None, :]
    in_pages_N1 = _taken(tables.kept, tables.owner)[:, None]
    seen = (column_NJ < in_pages_N1) & _near(in_pages_N1 + steps - column_NJ, window)
    found = _part(_taken(q, tables.owner), kept, seen[:, None, None], scores)
    return _Part(*(_taken(x, tables.pages, none) for x, none in zip(found, _NOTHING, strict=True)))


def _local(
    q_R1HE: jax.Array, k_R1GE: jax.Array, v_R1GE: jax.Array, cache: LayerCache, tables: Tables, steps: jax.Array,
    window: jax.Array | None, scores: Scores,
) -> jax.Array:  # fmt: skip
    """`paged_attention` on one device."""
    R, _, H, E = q_R1HE.shape
    G = k_R1GE.shape[2]
    q = q_R1HE.reshape(R, G, H // G, E)
    parts = [_of_prompts(q, cache.prompts, tables, steps, window, scores)]
    if len(cache.own.v):
        parts.append(_of_pages(q, cache.own, tables, steps, window, scores))
    ago_T = steps - jnp.arange(cache.recent.v.shape[2])
    itself = Kept(k_R1GE.reshape(R, G, 1, E), v_R1GE.reshape(R, G, 1, E))
    for kept, seen in ((cache.recent, (ago_T > 0) & _near(ago_T, window)), (itself, jnp.ones(1, bool))):
        parts.append(_Part(*(x[:, None] for x in _part(q, kept, seen[None, None, None], scores))))
    largest, total, out = (jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))
    weights = jnp.exp(largest - jnp.max(largest, axis=1, keepdims=True))
    total, out = jnp.sum(weights * total, axis=1), jnp.sum(weights[..., None] * out, axis=1)
    return (out / total[..., None]).astype(q.dtype).reshape(R, 1, H, E)


def paged_attention(
    q_R1HE: jax.Array, k_R1GE: jax.Array, v_R1GE: jax.Array, cache: LayerCache, tables: Tables, steps: jax.Array,
    *, window: jax.Array | None = None, scores: Scores = PLAIN,
) -> jax.Array:  # fmt: skip
    """Attention `[R, 1, H, E]` of every row's new token.

    Args:
      q_R1HE: its queries, rotary positions applied.
      k_R1GE, v_R1GE: its keys and values, each kv-head as often as it is kept (`for_keeping`).
      cache: of this layer.
      tables: whose what is; of all devices, each device's own numbers behind each other.
      steps: int32 scalar, how many tokens are in the buffer: column t is the token t after those in the pages.
      window: how many positions a token sees, itself included, int32 scalar; None: all.
    """
    rows, heads = mesh_axes("cache_rows"), mesh_axes("heads")
    by_row, by_head = P(rows), P(rows, heads)
    is_there = window is not None

    def local(q, k, v, cache, tables, steps, window):
        return _local(q, k, v, cache, tables, steps, window if is_there else None, scores)

    specs = (P(rows, None, heads), P(rows, None, heads), P(rows, None, heads), by_head, by_row, P(), P())
    last = window if window is not None else jnp.int32(0)
    return per_device(local, specs, P(rows, None, heads))(q_R1HE, k_R1GE, v_R1GE, cache, tables, steps, last)


def write_pages(pool: Kept, recent: Kept, targets_R2: jax.Array, kept_R: jax.Array) -> Kept:
    """One device's pages with the buffer of recent tokens written behind what they hold.

    Args:
      pool: N pages of J columns.
      recent: R rows of T columns, T at most J; it comes as it was computed, and is rounded here if the pages are.
      targets_R2: the page in which a row's next token falls, and the one after; N for none.
      kept_R: how many tokens of a row are in its pages.
    """
    J, T = pool.v.shape[2], recent.v.shape[2]
    recent = keep(recent.k, recent.v, pool.k.dtype)
    first_R2 = (kept_R // J * J)[:, None] + jnp.asarray([0, J])[None, :]
    column_R2J = first_R2[:, :, None] + jnp.arange(J)[None, None, :]
    is_old = column_R2J < kept_R[:, None, None]
    source = jnp.clip(column_R2J - kept_R[:, None, None], 0, T - 1)

    def written(pages: jax.Array, new: jax.Array) -> jax.Array:
        R, G, _, *rest = new.shape
        old = jnp.take(pages, targets_R2, axis=0, mode="clip")  # [R, 2, G, J, ...]; of no page whatever, it is dropped
        ones = (1,) * len(rest)
        moved = jnp.take_along_axis(new, source.reshape(R, 1, 2 * J, *ones), axis=2, mode="promise_in_bounds")
        moved = jnp.moveaxis(moved.reshape(R, G, 2, J, *rest), 2, 1)
        return pages.at[targets_R2].set(jnp.where(is_old.reshape(R, 2, 1, J, *ones), old, moved), mode="drop")

    return Kept(*(None if p is None else written(p, n) for p, n in zip(pool, recent, strict=True)))


def write_prompts(pool: Kept, k_TGE: jax.Array, v_TGE: jax.Array, slots_p: jax.Array, first_p: jax.Array) -> Kept:
    """One device's prompts with new ones in some slots.

    Args:
      pool: P prompts of S columns, keys as products read them.
      k_TGE, v_TGE: of packed prompts.
      slots_p: where each new prompt goes; P for none.
      first_p: the column of k_TGE with its first token. What is behind its last one is never seen.
    """
    S = pool.v.shape[2]
    columns = jnp.clip(first_p[:, None] + jnp.arange(S)[None, :], 0, k_TGE.shape[0] - 1)
    k, v = (jnp.swapaxes(x[columns], 1, 2) for x in (k_TGE, v_TGE))
    new = keep(k, v, pool.k.dtype)
    new = new._replace(k=jnp.swapaxes(new.k, -1, -2))
    return Kept(*(None if p is None else p.at[slots_p].set(n, mode="drop") for p, n in zip(pool, new, strict=True)))

"""The choice of a token: its distribution after temperature and filters, a draw from it, and log-probabilities.

A draw is two uniform numbers, which are a function of the row's key and the token's position alone: one chooses a block
of the vocabulary by the sums of its blocks, the other a token in the block. A row's answer does not depend on the rows
beside it, and no random number is made for every token of the vocabulary.

Shapes: R rows, V vocabulary, X blocks of it, Y tokens of a block, C candidates.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.sampling.params import SamplingParams

# Filters by rank look at so many most likely tokens first, and sort the vocabulary only where these are too few.
CANDIDATES = 256
MOST_BLOCKS, LARGEST_BLOCK = 512, 4096


@dataclasses.dataclass(frozen=True)
class Filters:
    """Which filters there are; static where functions are compiled. All numbers, and whether to be greedy, are not.

    Attributes:
      ranked: top_k or top_p.
      floored: min_p.
      delayed: stop tokens are not drawn before `min_tokens`.
      mixed: there is top_k or top_p in some rows, and neither in others.
    """

    ranked: bool = False
    floored: bool = False
    delayed: bool = False
    mixed: bool = False

    @classmethod
    def of(cls, *asked: SamplingParams) -> "Filters":
        """Those of rows that are asked for so; the most likely token passes all but the last."""
        choices = list(map(Choice.of, asked))
        ranked = [bool(c.top_k > 0 or c.top_p < 1) for c in choices]
        floored, delayed = any(c.min_p > 0 for c in choices), any(p.min_tokens > 0 for p in asked)
        return cls(any(ranked), floored, delayed, any(ranked) and not all(ranked))


class Choice(NamedTuple):
    """How a row's tokens are chosen: float32 and int32 numbers `[R]`, each row has its own."""

    temperature: Any
    top_p: Any
    top_k: Any
    min_p: Any

    @classmethod
    def of(cls, p: SamplingParams) -> "Choice":
        """Of one row; a greedy one has no filters."""
        if p.temperature == 0:
            return cls(np.float32(0), np.float32(1), np.int32(0), np.float32(0))
        top_k = np.int32(min(p.top_k, np.iinfo(np.int32).max))
        return cls(np.float32(p.temperature), np.float32(p.top_p), top_k, np.float32(p.min_p))

    @classmethod
    def empty(cls, rows: int) -> "Choice":
        """Of rows that have no answer: arrays of the host to be filled."""
        return cls(*(np.full(rows, x) for x in cls.of(SamplingParams(temperature=0.0))))

    def put(self, at: int, one: "Choice") -> None:
        """Write one row's numbers into arrays of the host."""
        for rows, x in zip(self, one, strict=True):
            rows[at] = x


class Numbers(NamedTuple):
    """What all rows of a call share, scalars; and stop tokens int32 `[n]`, -1 for none."""

    min_tokens: Any
    seed: Any
    round: Any
    stops: Any

    @classmethod
    def of(cls, p: SamplingParams, stops: Sequence[int]) -> "Numbers":
        """Those of `p`, as the host has them."""
        return cls(
            min_tokens=np.int32(p.min_tokens),
            seed=np.uint32(p.seed),
            round=np.uint32(p.round),
            stops=np.asarray(stops, np.int32),
        )


class Drawn(NamedTuple):
    """Tokens int32 `[R]`, and float32 `[R]` log-probabilities: under what they were drawn from, and the model's own."""

    token: jax.Array
    logprob: jax.Array
    full: jax.Array


def _uniforms(who_R3: jax.Array, index_R: jax.Array, numbers: Numbers) -> tuple[jax.Array, jax.Array]:
    """Two numbers in [0, 1) `[R]` for the token `index_R` of every row's answer."""
    base = jax.random.fold_in(jax.random.key(numbers.seed, impl="threefry2x32"), numbers.round)

    def one(who_3: jax.Array, index: jax.Array) -> jax.Array:
        key = functools.reduce(jax.random.fold_in, [*who_3, index], base)
        return jax.random.uniform(key, (2,), jnp.float32)

    u_R2 = jax.vmap(one)(who_R3, index_R)
    return u_R2[:, 0], u_R2[:, 1]


def blocks_of(vocabulary: int) -> int:
    """How many blocks the vocabulary has, a few hundred.

    A power of two where one divides it, so that blocks are whole on the devices over which it is sharded. It must not
    depend on the devices, as draws depend on it.
    """
    whole = math.gcd(vocabulary, MOST_BLOCKS)
    return whole if whole * LARGEST_BLOCK >= vocabulary else max(1, math.isqrt(vocabulary))


def _first_above(cumulative: jax.Array, target_R: jax.Array, weights: jax.Array) -> jax.Array:
    """Where `cumulative` `[R, X]` first exceeds the target: by rounding none may, then the last of any weight."""
    X = cumulative.shape[1]
    above = cumulative > target_R[:, None]
    last = X - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=1)
    return jnp.where(above.any(1), jnp.argmax(above, axis=1), last)


def _by_weight(weights_RV: jax.Array, u: tuple[jax.Array, jax.Array], blocks: int) -> jax.Array:
    """Tokens `[R]` drawn in proportion to float32 weights."""
    R, V = weights_RV.shape
    Y = -(-V // blocks)
    padded = jnp.pad(weights_RV, ((0, 0), (0, blocks * Y - V))) if blocks * Y != V else weights_RV
    w_RXY = padded.reshape(R, blocks, Y)
    sums_RX = jnp.sum(w_RXY, axis=2)
    cumulative = jnp.cumsum(sums_RX, axis=1)
    block = _first_above(cumulative, u[0] * cumulative[:, -1], sums_RX)
    inside_RY = jnp.take_along_axis(w_RXY, block[:, None, None], axis=1)[:, 0]
    cumulative = jnp.cumsum(inside_RY, axis=1)
    return (block * Y + _first_above(cumulative, u[1] * cumulative[:, -1], inside_RY)).astype(jnp.int32)


def _ranked(z_RV: jax.Array, u_R: jax.Array, choice: Choice, floored: bool) -> tuple[jax.Array, jax.Array]:
    """Tokens drawn after top_k, top_p and min_p, and their log-probabilities; anything in rows with neither."""
    V = z_RV.shape[1]
    _, top_p, top_k, min_p = (x[:, None] for x in choice)
    counts = (top_k > 0) | (top_p < 1)
    top_k = jnp.where(top_k == 0, V, top_k)
    largest_R1 = jnp.max(z_RV, axis=1, keepdims=True)
    whole_R1 = jnp.sum(jnp.exp(z_RV - largest_R1), axis=1, keepdims=True)

    def among(falling_RC: jax.Array, ids_RC: jax.Array, is_all: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Draw from candidates in falling order; also whether they were enough."""
        C = falling_RC.shape[1]
        w_RC = jnp.exp(falling_RC - largest_R1)
        cumulative_RC = jnp.cumsum(w_RC, axis=1)
        within_k = jnp.arange(C)[None, :] < top_k
        mass_R1 = jnp.where(top_k >= V, whole_R1, jnp.sum(jnp.where(within_k, w_RC, 0), axis=1, keepdims=True))
        before_RC = cumulative_RC - w_RC  # of the more likely tokens; the most likely one always belongs
        within_p = (before_RC < top_p * mass_R1) | (top_p >= 1)
        kept = within_k & within_p
        if floored:
            kept &= w_RC >= min_p
        kept = kept.at[:, 0].set(True)
        # All that may be drawn are among them, and the mass that top_p is a share of is known.
        knows_mass = (top_k >= V) | (top_p >= 1)
        enough = jnp.bool_(is_all) | jnp.all(~counts | (top_k <= C) | (knows_mass & ~kept[:, -1:]))
        w_RC = jnp.where(kept, w_RC, 0)
        cumulative_RC = jnp.cumsum(w_RC, axis=1)
        at = _first_above(cumulative_RC, u_R * cumulative_RC[:, -1], w_RC)[:, None]
        logp = jnp.log(jnp.take_along_axis(w_RC, at, axis=1)[:, 0] / cumulative_RC[:, -1])
        return jnp.take_along_axis(ids_RC, at, axis=1)[:, 0].astype(jnp.int32), logp, enough

    token, logp, enough = among(*jax.lax.top_k(z_RV, min(CANDIDATES, V)), is_all=V <= CANDIDATES)
    if V <= CANDIDATES:
        return token, logp

    def by_sorting(_: None) -> tuple[jax.Array, jax.Array]:
        ids = jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32), z_RV.shape)
        falling, ids = jax.lax.sort((-z_RV, ids), dimension=1, is_stable=True, num_keys=1)
        return among(-falling, ids, is_all=True)[:2]

    return jax.lax.cond(enough, lambda _: (token, logp), by_sorting, None)


def _unranked(
    z_RV: jax.Array, u: tuple[jax.Array, jax.Array], choice: Choice, floored: bool, blocks: int
) -> tuple[jax.Array, jax.Array]:
    """Tokens drawn from all, or after min_p alone, and their log-probabilities."""
    weights_RV = jnp.exp(z_RV - jnp.max(z_RV, axis=1, keepdims=True))
    if floored:
        weights_RV = jnp.where(weights_RV >= choice.min_p[:, None], weights_RV, 0)
    token = _by_weight(weights_RV, u, blocks)
    chosen = jnp.take_along_axis(weights_RV, token[:, None], axis=1)[:, 0]
    return token, jnp.log(chosen) - jnp.log(jnp.sum(weights_RV, axis=1))


def _most_likely(z_RV: jax.Array) -> jax.Array:
    """The most likely tokens `[R]`, of equal ones the first; two plain reductions, as argmax is ten of them on CPU."""
    ids = jnp.where(z_RV == jnp.max(z_RV, axis=1, keepdims=True), jnp.arange(z_RV.shape[1])[None, :], z_RV.shape[1])
    return jnp.min(ids, axis=1).astype(jnp.int32)


def draw(
    logits_RV: jax.Array,
    who_R3: jax.Array,
    index_R: jax.Array,
    choice: Choice,
    numbers: Numbers,
    filters: Filters,
    blocks: int,
) -> Drawn:
    """The next token of every row; it is the same whatever the rows beside it ask for.

    Args:
      logits_RV: float32.
      who_R3: uint32, what a row's draws depend on besides seed and round: two numbers of its prompt, and the sample.
      index_R: how many tokens the row's answer has.
      blocks: of the vocabulary, from `blocks_of`.
    """
    z_RV, greedy_R = logits_RV, choice.temperature == 0
    if filters.delayed:
        is_stop_V = (jnp.arange(z_RV.shape[1])[:, None] == numbers.stops[None, :]).any(1)
        z_RV = jnp.where(is_stop_V[None, :] & (index_R < numbers.min_tokens)[:, None], -jnp.inf, z_RV)
    z_RV = z_RV / jnp.where(greedy_R, 1.0, choice.temperature)[:, None]
    u = _uniforms(who_R3, index_R, numbers)
    if filters.ranked:
        token, logprob = _ranked(z_RV, u[0], choice, filters.floored)
    if filters.mixed or not filters.ranked:
        unranked = _unranked(z_RV, u, choice, filters.floored, blocks)
        if filters.mixed:
            counts_R = (choice.top_k > 0) | (choice.top_p < 1)
            token, logprob = (jnp.where(counts_R, *both) for both in zip((token, logprob), unranked, strict=True))
        else:
            token, logprob = unranked
    token = jnp.where(greedy_R, _most_likely(z_RV), token)
    full = jnp.take_along_axis(logits_RV, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits_RV, axis=1)
    return Drawn(token, jnp.where(greedy_R, 0.0, logprob), full)

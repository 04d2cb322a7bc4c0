"""Attention of rows on CPU: in tiles of queries, each of which sees the keys of its own groups and hardly any other.

Dense blocks (`dense.dense_attention`) compute scores for every key of the row and mask those of other groups: in a row
of eight groups, most of them. Groups follow each other in a slot, so the keys that a tile of queries needs are
one stretch of the prompt slot and, for completions, one of its own slot. Where they begin is data, their width must be
static: tiles are sorted by the least of a few combinations of widths that holds both stretches, and each combination
has a loop over its tiles. Loops whose length is data have no derivative of their own, so the backward pass is written
out: it makes a tile's scores again, as FlashAttention does (Dao et al. 2022, arXiv 2205.14135).

Shapes: B rows, T tokens of a row, H query heads, G kv-heads (H = G * M), E head width; Q queries of a tile, S keys that
it is shown; N tiles.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.model.attention.dense import MASKED, PLAIN, Scores, Window
from dpo_jax.model.attention.on_mesh import on_own_heads
from dpo_jax.rows.shape import RowShape

# Queries of a tile: fewer see fewer keys of other groups, but products get small (64 was fastest of 48 to 256).
TILE = 64
# Widths in keys that stretches are rounded up to: of the prompt slot for its own tiles; of the prompt slot and of its
# own for a completion's. Every entry is a loop to compile. They were chosen one after the other, each time the one that
# saves most scores over the packed rows of HH and UltraFeedback; longer ones widen by powers of two.
PROMPT_WIDTHS = (128, 192, 256, 320, 448, 640, 1024, 1536, 2048, 3072, 4096, 8192)
COMPLETION_WIDTHS = (
    *((128, 320), (192, 128), (320, 192), (448, 256), (512, 128), (640, 128), (1024, 192)),  # HH
    *((128, 576), (512, 448), (832, 576), (2048, 192), (2048, 1024), (4096, 256), (4096, 2048)),  # UltraFeedback
    *((832, 2048), (832, 4096), (2048, 4096), (8192, 512), (8192, 4096)),  # longer
)


@dataclasses.dataclass(frozen=True)
class Skipping:
    """Attention by this module; `tile` is the number of queries of a tile."""

    tile: int = TILE


@dataclasses.dataclass(frozen=True)
class _Spec:
    """What is static."""

    shape: RowShape
    tile: int
    scale: float
    softcap: float | None

    @property
    def padded(self) -> RowShape:
        """The row with each slot padded to whole tiles."""
        prompt, *completions = (-(-w // self.tile) * self.tile for w in self.shape.widths)
        return RowShape(prompt, tuple(completions))

    def pad(self, x_BT: jax.Array) -> jax.Array:
        """The slots of `[B, T, ...]` padded to whole tiles."""
        slots = zip(self.shape.starts, self.shape.widths, self.padded.widths, strict=True)
        others = [(0, 0)] * (x_BT.ndim - 2)
        parts = [jnp.pad(x_BT[:, a : a + w], [(0, 0), (0, wide - w), *others]) for a, w, wide in slots]
        return jnp.concatenate(parts, 1)

    def unpad(self, x_BT: jax.Array) -> jax.Array:
        slots = zip(self.padded.starts, self.shape.widths, strict=True)
        return jnp.concatenate([x_BT[:, a : a + w] for a, w in slots], 1)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Tiles of the prompt slot, or of all completion slots: they differ in the stretches of keys that they see.

    Attributes:
      starts, own: int `[N]` of the tiles of one row: first column, and that of its slot.
      caps: the widest stretch of prompt keys, and of keys of the own slot; 0 where there is none.
    """

    starts: np.ndarray
    own: np.ndarray
    caps: tuple[int, int]

    @property
    def widths(self) -> list[tuple[int, int]]:
        """Of prompt keys and of keys of the own slot: ascending by their sum; the last holds every stretch."""
        known = COMPLETION_WIDTHS if self.caps[1] else [(width, 0) for width in PROMPT_WIDTHS]
        cut = {(min(prompt, self.caps[0]), min(own, self.caps[1])) for prompt, own in known}
        return sorted(cut | {self.caps}, key=lambda pair: (sum(pair), pair))


def _kinds(spec: _Spec) -> list[_Kind]:
    padded = spec.padded
    P = padded.prompt
    prompt = _Kind(np.arange(0, P, spec.tile), np.zeros(P // spec.tile, int), (P, 0))
    own = np.repeat(padded.starts[1:], np.asarray(padded.completions) // spec.tile)
    completions = _Kind(np.arange(P, padded.length, spec.tile), own, (P, max(padded.completions)))
    return [k for k in (prompt, completions) if len(k.starts)]


def _stretch(wanted_BNS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first column that a tile wants, and how many from there to the last."""
    S = wanted_BNS.shape[-1]
    if not S:
        return (jnp.zeros(wanted_BNS.shape[:-1], jnp.int32),) * 2
    first = jnp.argmax(wanted_BNS, -1)
    end = S - jnp.argmax(wanted_BNS[..., ::-1], -1)
    return first, jnp.where(wanted_BNS.any(-1), end - first, 0)


def _stretches(spec: _Spec, kind: _Kind, segments_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the keys of every tile are: int `[B, N, 2]` first columns and `[B, N, 2]` sizes, of the prompt's and own.

    A stretch holds all columns whose segment is between the tile's smallest and largest: with groups in order, those
    of its groups; in any order, no fewer. Sizes are 0 for a tile without tokens.
    """
    P = spec.padded.prompt
    in_tile_BNQ = segments_BT[:, kind.starts[:, None] + np.arange(spec.tile)[None]]
    low = jnp.min(jnp.where(in_tile_BNQ != 0, in_tile_BNQ, np.iinfo(np.int32).max), -1)[..., None]
    high = jnp.max(in_tile_BNQ, -1)[..., None]
    wanted_BNT = (low <= segments_BT[:, None]) & (segments_BT[:, None] <= high)
    columns = np.arange(segments_BT.shape[1])
    seen_NT = columns[None] < kind.starts[:, None] + spec.tile
    of_prompt = _stretch((wanted_BNT & seen_NT[None])[..., :P])
    of_own = _stretch(wanted_BNT & (seen_NT & (columns[None] >= np.maximum(kind.own, P)[:, None]))[None])
    firsts, sizes = (jnp.stack(pair, -1) for pair in zip(of_prompt, of_own, strict=True))
    return firsts, sizes


def _schedule(spec: _Spec, kind: _Kind, segments_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The tiles of all rows sorted by `kind.widths`.

    Returns:
      int32 `[B*N, 4]`: row, first column, first of the prompt keys, first of the own slot's keys; and int32
      `[widths + 1]`: where the tiles of each combination of widths begin, and the end. Tiles without tokens come
      before them.
    """
    firsts_BN2, sizes_BN2 = _stretches(spec, kind, segments_BT)
    B, N, _ = sizes_BN2.shape
    widths = np.asarray([(0, 0), *kind.widths])
    rank = jnp.argmax((sizes_BN2.reshape(-1, 1, 2) <= widths[None]).all(-1), -1)
    order, row = jnp.argsort(rank), np.repeat(np.arange(B), N)
    table = jnp.concatenate([jnp.stack([row, np.tile(kind.starts, B)], 1), firsts_BN2.reshape(-1, 2)], 1)
    bounds = jnp.searchsorted(rank[order], jnp.arange(1, len(widths) + 1), side="left")
    return table[order].astype(jnp.int32), bounds.astype(jnp.int32)


def _attend(q_GRE: jax.Array, k_GSE: jax.Array, v_GSE: jax.Array, bias_QS: jax.Array, spec: _Spec) -> jax.Array:
    """Softmax attention of one tile, R = M*Q; scores and softmax in float32. Returns [G, R, E]."""
    G, R, _ = q_GRE.shape
    Q, S = bias_QS.shape
    scores = jnp.einsum("GRE,GSE->GRS", q_GRE, k_GSE, preferred_element_type=jnp.float32) * spec.scale
    if spec.softcap:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    scores = scores.reshape(G, R // Q, Q, S) + bias_QS[None, None]
    probs = jax.nn.softmax(scores, axis=-1).astype(v_GSE.dtype).reshape(G, R, S)
    return jnp.einsum("GRS,GSE->GRE", probs, v_GSE)


class _Tile:
    """One tile of the table: where its queries and keys are, and which it sees."""

    def __init__(self, spec: _Spec, widths: tuple[int, int], entry: jax.Array, segments_BT: jax.Array, window: Window):
        P, T = spec.padded.prompt, spec.padded.length
        row, self.start, in_prompt, in_own = (entry[i] for i in range(4))
        self.row, self.tile = row, spec.tile
        # Moved to the left where the stretch would pass the end; what is not wanted is masked.
        firsts = [jnp.minimum(in_prompt, P - widths[0]), jnp.minimum(in_own, T - widths[1])]
        pieces = [(first, size, i == 1) for i, (first, size) in enumerate(zip(firsts, widths, strict=True)) if size]
        self.pieces = [piece[:2] for piece in pieces]
        q_Q = self.start + jnp.arange(spec.tile)
        k_S = jnp.concatenate([first + jnp.arange(size) for first, size in self.pieces])
        segment = lambda x_BT, first, size: jax.lax.dynamic_slice(x_BT, (row, first), (1, size))[0]
        of_keys = lambda x_BT: jnp.concatenate([segment(x_BT, *piece) for piece in self.pieces])
        of_queries = lambda x_BT: segment(x_BT, self.start, spec.tile)
        queries_Q = of_queries(segments_BT)
        # The second piece may reach back over the border of its slot: into the one before, or the prompt's once more.
        is_own_S = np.concatenate([np.full(size, is_own) for *_, size, is_own in pieces])
        own: Any = P
        for border in spec.padded.borders:
            own = jnp.where(self.start < border, own, border)
        begin, end = jnp.where(is_own_S, own, 0), jnp.where(is_own_S, T, P)
        seen = (queries_Q[:, None] == of_keys(segments_BT)[None]) & (queries_Q != 0)[:, None]
        seen &= (k_S[None] <= q_Q[:, None]) & ((k_S >= begin) & (k_S < end))[None]
        if window is not None:
            seen &= of_queries(window[0])[:, None] - of_keys(window[0])[None] < window[1]
        # As numbers to add, made once for all heads: XLA would make the mask anew for each.
        self.bias_QS = jax.lax.optimization_barrier(jnp.where(seen, 0.0, MASKED).astype(jnp.float32))

    def queries(self, x_BGMTE: jax.Array) -> jax.Array:
        """`[B, G, M, T, E]` → `[G, M*Q, E]`."""
        _, G, M, _, E = x_BGMTE.shape
        x = jax.lax.dynamic_slice(x_BGMTE, (self.row, 0, 0, self.start, 0), (1, G, M, self.tile, E))
        return x.reshape(G, M * self.tile, E)

    def put_queries(self, x_BGMTE: jax.Array, value_GRE: jax.Array) -> jax.Array:
        _, G, M, _, E = x_BGMTE.shape
        value = value_GRE.reshape(1, G, M, self.tile, E).astype(x_BGMTE.dtype)
        return jax.lax.dynamic_update_slice(x_BGMTE, value, (self.row, 0, 0, self.start, 0))

    def keys(self, x_BGTE: jax.Array) -> jax.Array:
        """`[B, G, T, E]` → `[G, S, E]`."""
        _, G, _, E = x_BGTE.shape
        piece = lambda first, size: jax.lax.dynamic_slice(x_BGTE, (self.row, 0, first, 0), (1, G, size, E))[0]
        return jnp.concatenate([piece(*p) for p in self.pieces], axis=1)

    def add_keys(self, x_BGTE: jax.Array, value_GSE: jax.Array) -> jax.Array:
        _, G, _, E = x_BGTE.shape
        begin = 0
        for first, size in self.pieces:
            where = (self.row, 0, first, 0)
            value = value_GSE[None, :, begin : begin + size].astype(x_BGTE.dtype)
            before = jax.lax.dynamic_slice(x_BGTE, where, (1, G, size, E))
            x_BGTE = jax.lax.dynamic_update_slice(x_BGTE, before + value, where)
            begin += size
        return x_BGTE


def _for_each_tile(
    spec: _Spec, segments_BT: jax.Array, window: Window, do: Callable[[_Tile, Any], Any], carry: Any
) -> Any:
    """`carry = do(tile, carry)` for every tile with tokens."""
    segments_BT = spec.pad(segments_BT)
    window = None if window is None else (spec.pad(window[0]), window[1])
    for kind in _kinds(spec):
        table, bounds = _schedule(spec, kind, segments_BT)
        for i, widths in enumerate(kind.widths):

            def body(n, carry, table=table, widths=widths):
                return do(_Tile(spec, widths, table[n], segments_BT, window), carry)

            carry = jax.lax.fori_loop(bounds[i], bounds[i + 1], body, carry)
    return carry


def _queries_first(spec: _Spec, x_BTHE: jax.Array, groups: int) -> jax.Array:
    """`[B, T, G*M, E]` → `[B, G, M, T', E]`."""
    B, _, H, E = x_BTHE.shape
    return spec.pad(x_BTHE).reshape(B, -1, groups, H // groups, E).transpose(0, 2, 3, 1, 4)


def _queries_last(spec: _Spec, x_BGMTE: jax.Array, like: jax.Array) -> jax.Array:
    x = x_BGMTE.transpose(0, 3, 1, 2, 4)
    return spec.unpad(x.reshape(*x.shape[:2], *like.shape[2:])).astype(like.dtype)


def _keys_first(spec: _Spec, x_BTGE: jax.Array) -> jax.Array:
    """`[B, T, G, E]` → `[B, G, T', E]`."""
    return spec.pad(x_BTGE).transpose(0, 2, 1, 3)


def _keys_last(spec: _Spec, x_BGTE: jax.Array, like: jax.Array) -> jax.Array:
    return spec.unpad(x_BGTE.transpose(0, 2, 1, 3)).astype(like.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(spec: _Spec, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, window: Window) -> jax.Array:
    return _forward(spec, q, k, v, segments, window)[0]


def _forward(spec, q_BTHE, k_BTGE, v_BTGE, segments_BT, window):
    q = _queries_first(spec, q_BTHE, k_BTGE.shape[2])
    k, v = (_keys_first(spec, x) for x in (k_BTGE, v_BTGE))

    def do(tile: _Tile, out: jax.Array) -> jax.Array:
        return tile.put_queries(out, _attend(tile.queries(q), tile.keys(k), tile.keys(v), tile.bias_QS, spec))

    out = _for_each_tile(spec, segments_BT, window, do, jnp.zeros_like(q))
    return _queries_last(spec, out, q_BTHE), (q_BTHE, k_BTGE, v_BTGE, segments_BT, window)


def _backward(spec, kept, grad_BTHE):
    q_BTHE, k_BTGE, v_BTGE, segments_BT, window = kept
    q, grad = (_queries_first(spec, x, k_BTGE.shape[2]) for x in (q_BTHE, grad_BTHE))
    k, v = (_keys_first(spec, x) for x in (k_BTGE, v_BTGE))

    def do(tile: _Tile, grads: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        attend = lambda q, k, v: _attend(q, k, v, tile.bias_QS, spec)
        _, pull = jax.vjp(attend, tile.queries(q), tile.keys(k), tile.keys(v))
        dq, dk, dv = pull(tile.queries(grad))
        return tile.put_queries(grads[0], dq), tile.add_keys(grads[1], dk), tile.add_keys(grads[2], dv)

    # Keys gather what many tiles add: in float32.
    zeros = (jnp.zeros_like(q), *(jnp.zeros(x.shape, jnp.float32) for x in (k, v)))
    dq, dk, dv = _for_each_tile(spec, segments_BT, window, do, zeros)
    return _queries_last(spec, dq, q_BTHE), _keys_last(spec, dk, k_BTGE), _keys_last(spec, dv, v_BTGE), None, None


_tiled.defvjp(_forward, _backward)


def tiled_attention(
    q_BTHE: jax.Array,
    k_BTGE: jax.Array,
    v_BTGE: jax.Array,
    segments_BT: jax.Array,
    shape: RowShape,
    *,
    skipping: Skipping,
    window: Window = None,
    scores: Scores = PLAIN,
) -> jax.Array:
    """Attention of rows in tiles; arguments and result as in `dense.dense_attention`.

    On a mesh every device runs its own rows and heads.
    """
    # Rows that are narrower than a tile are not padded to one.
    tile = min(skipping.tile, -(-max(shape.widths) // 8) * 8)
    scale = float(scores.scale or q_BTHE.shape[-1] ** -0.5)
    spec = _Spec(RowShape(shape.prompt, shape.completions), tile, scale, scores.softcap)
    local = lambda q, k, v, segments, *window: _tiled(spec, q, k, v, segments, window or None)
    return on_own_heads(local, q_BTHE, k_BTGE, v_BTGE, segments_BT, *(window or ()))

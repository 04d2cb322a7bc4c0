"""The three programs that sampling compiles: prompts are prefilled, answers begin, and decoding goes on for a chunk.

What lies on the devices between them is the cache alone; everything else is numbers that the host gives. A device has
its own rows, prompts and pages, numbered from 0 on each: arrays of all devices hold them behind each other.

Shapes: R rows (answers), P prompts, A answers to a prompt at once, S columns of a prompt, N pages, J columns of a page,
M pages of a row, T columns of the buffer, L layers, D model, V vocabulary; B rows of packed prompts, W their width, F
prompts prefilled at once. The first axis is of all devices, the letters are of one.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax.model.attention.paged import (
    Kept,
    LayerCache,
    Tables,
    for_keeping,
    key_heads,
    write_pages,
    write_prompts,
)
from dpo_jax.model.config import Params
from dpo_jax.model.decoder import ModelOptions
from dpo_jax.model.forward import decode, layers_apart, prefill, unembedding
from dpo_jax.model.placement import Layout, axis_rules, decoding_rules
from dpo_jax.parallel.mesh import ROW_AXES, row_shards
from dpo_jax.parallel.spread import mesh_axes, per_device
from dpo_jax.rows.batch import Batch
from dpo_jax.rows.shape import RowShape
from dpo_jax.sampling.draws import Choice, Drawn, Filters, Numbers, blocks_of, draw
from dpo_jax.sampling.memory import MOVING

# Parameters of a layer from which on a CPU takes longer to copy it out of the stack than to compile every layer.
APART_FROM = 500_000


@dataclasses.dataclass(frozen=True)
class Rung:
    """The sizes of what a device holds; one step of the ladder that programs are compiled for.

    Attributes:
      rows: answers that are decoded.
      prompts: prompts that are kept.
      width: columns of a prompt.
      pages: of all rows.
      row_pages: the most pages of a row.
      answers: to a prompt at once.
    """

    rows: int
    prompts: int
    width: int
    pages: int
    row_pages: int
    answers: int

    @property
    def is_plain(self) -> bool:
        """Whether row r answers prompt r, and nothing has to be looked up."""
        return self.answers == 1 and self.rows == self.prompts


class Cache(NamedTuple):
    """What is kept of all layers: stacked, or a tuple with a `Kept` for each.

    Attributes:
      prompts: P prompts of S columns.
      pages: N pages of J columns.
      hidden: `[P, D]`, the final hidden state of every prompt's last token.
    """

    prompts: Any
    pages: Any
    hidden: jax.Array


class Going(NamedTuple):
    """The rows of a chunk, `[R]` each.

    Attributes:
      token: the last token of each answer.
      drawn: how many tokens the answer has.
      limit: the most that it may have; 0 for an empty row.
      last: the last position that it may come to.
      who: uint32 `[R, 3]`, see `draws.draw`.
      choice: how its tokens are chosen.
      targets: int32 `[R, 2]`, see `paged.write_pages`.
      tables: whose what is.
    """

    token: Any
    drawn: Any
    limit: Any
    last: Any
    who: Any
    choice: Choice
    targets: Any
    tables: Tables


class Chunk(NamedTuple):
    """What a chunk drew, `[R, T]` each, and in how many steps."""

    token: jax.Array
    logprob: jax.Array
    full: jax.Array
    steps: jax.Array


class Programs:
    """The programs of one model on one mesh.

    Args:
      layout: of the model.
      page: columns of a page, and of the buffer: the most tokens of a chunk.
      cache_dtype: int8, or the layout's own dtype where it is None.
      reach: no sequence has more tokens.
      filters: how tokens are chosen.
    """

    def __init__(self, layout: Layout, *, page: int, cache_dtype: Any, reach: int, filters: Filters):
        self.layout, self.page, self.reach, self.filters = layout, page, reach, filters
        c, mesh = layout.config, layout.mesh
        self.dtype = jnp.dtype(layout.dtype if cache_dtype is None else cache_dtype)
        self.shards = row_shards(mesh)
        self.heads = key_heads(c.num_attention_heads, c.num_key_value_heads, mesh.size // self.shards)
        layer = (c.active_parameter_count() - c.vocab_size * c.hidden_size) / c.num_hidden_layers
        self.apart = mesh.size == 1 and layout.platform == "cpu" and layer > APART_FROM
        self.model = ModelOptions(c, layout.dtype, tiling=layout.tiling)
        self.blocks = blocks_of(c.vocab_size)
        self._rules = axis_rules(c, mesh), decoding_rules(c, mesh)
        options = dict(layout.options.compiler_options)
        jit = functools.partial(jax.jit, compiler_options=options)
        self._whole = NamedSharding(mesh, P())
        self._by_row = NamedSharding(mesh, P(ROW_AXES))
        self.empty = jax.jit(self._empty, static_argnames="rung", out_shardings=None)
        self.prefill = jit(self._prefill, static_argnames=("shape",), donate_argnames="cache")
        self.begin = jit(self._begin, out_shardings=self._whole)
        self.decode = jit(self._decode, static_argnames=("rung",), donate_argnames="cache")
        self.move = jit(self._move, static_argnames=("rung",))

    def parameters(self, params: Params) -> Params:
        """Parameters as the programs take them: as they lie, each layer for itself on a CPU."""
        if not self.apart:
            return params
        return layers_apart(params, self.layout.config.num_hidden_layers, self.layout.mesh.devices.flat[0])

    def bytes_of(self, rung: Rung) -> int:
        """Bytes of a device's cache."""
        abstract = jax.tree.leaves(jax.eval_shape(functools.partial(self._empty, rung=rung)))
        whole = sum(x.size * x.dtype.itemsize for x in abstract)
        return whole // self.layout.mesh.size

    def most_pages(self, rung: Rung, free: float) -> int:
        """How many pages a device may have if its cache, also while it moves, is to take no more than `free` bytes."""
        none, one = (self.bytes_of(dataclasses.replace(rung, pages=pages)) for pages in (0, 1))
        return max(0, int((free / MOVING - none) / (one - none)))

    # -------------------------------------------------------------------------------------------------- one device's

    def _on_devices(self, fn: Any, *args: Any, by_head: tuple[int, ...] = ()) -> Any:
        """`fn` on every device's own part: arguments number `by_head` are `[X, G, ...]`, the others `[X, ...]`.

        What it returns is of the kind of its first argument.
        """
        rows, heads = mesh_axes("cache_rows"), mesh_axes("heads")
        spec = lambda i: P(rows, heads) if i in by_head else P(rows)
        return per_device(fn, tuple(map(spec, range(len(args)))), spec(0))(*args)

    def _each_layer(self, fn: Any, *trees: Any) -> Any:
        """`fn` of every layer's part of `trees`."""
        return tuple(map(fn, *trees)) if self.apart else jax.vmap(fn)(*trees)

    def _placed(self, cache: Cache) -> Cache:
        """The same, told where it lies."""
        if self.layout.mesh.size == 1:
            return cache
        with nn.logical_axis_rules(self._rules[1]):
            rows, heads = (mesh_axes(n) for n in ("cache_rows", "heads"))
        put = lambda tree, *spec: jax.lax.with_sharding_constraint(tree, NamedSharding(self.layout.mesh, P(*spec)))
        kept = lambda tree: put(tree, None, rows, heads)
        return Cache(kept(cache.prompts), kept(cache.pages), put(cache.hidden, rows))

    def _empty(self, *, rung: Rung) -> Cache:
        c, X = self.layout.config, self.shards
        lead = () if self.apart else (c.num_hidden_layers,)

        E = c.head_dim

        def zeros(count: int, *sizes: tuple[int, int]) -> Kept:
            shape = (*lead, X * count, self.heads)
            k, v = (jnp.zeros((*shape, *size), self.dtype) for size in sizes)
            columns = sizes[1][0]
            scales = (jnp.zeros((*shape, columns), jnp.float32) for _ in range(2 * (self.dtype == jnp.int8)))
            return Kept(k, v, *scales)

        def kept(*sizes: Any) -> Any:
            return tuple(zeros(*sizes) for _ in range(c.num_hidden_layers)) if self.apart else zeros(*sizes)

        prompts = kept(rung.prompts, (E, rung.width), (rung.width, E))
        pages = kept(rung.pages, (self.page, E), (self.page, E))
        hidden = jnp.zeros((X * rung.prompts, c.hidden_size), self.layout.dtype)
        return self._placed(Cache(prompts, pages, hidden))

    # ------------------------------------------------------------------------------------------------------ programs

    def _prefill(
        self,
        params: Params,
        cache: Cache,
        batch: Batch[jax.Array],
        last_BW: jax.Array,
        new: jax.Array,
        *,
        shape: RowShape,
    ) -> Cache:
        """Packed prompts into slots of the cache.

        Args:
          params: stacked.
          batch: `[B, W]` of prompts alone.
          last_BW: the last position that a token's sequence may come to.
          new: int32 `[F, 3]`: a prompt's slot (P: none), its first column among the device's B·W, and its last one.
        """
        with nn.logical_axis_rules(self._rules[0]):
            hidden, (k, v) = prefill(params, batch, shape, self.model, last_BW, self.reach)
            k, v = (for_keeping(x, self.heads) for x in (k, v))

            def last_states(states_PD, hidden_BWD, new_F3):
                flat = hidden_BWD.reshape(-1, hidden_BWD.shape[-1])
                return states_PD.at[new_F3[:, 0]].set(flat[new_F3[:, 2]], mode="drop")

            states = self._on_devices(last_states, cache.hidden, hidden, new)

            def layer(pool: Kept, k_BWGE: jax.Array, v_BWGE: jax.Array) -> Kept:
                def local(pool, k, v, new):
                    flat = lambda x: jnp.swapaxes(x, 1, 2).reshape(-1, *x.shape[1:2], x.shape[3])
                    return write_prompts(pool, flat(k), flat(v), new[:, 0], new[:, 1])

                heads_second = (jnp.swapaxes(x, 1, 2) for x in (k_BWGE, v_BWGE))
                return self._on_devices(local, pool, *heads_second, new, by_head=(0, 1, 2))

            prompts = self._each_layer(layer, cache.prompts, k, v)
        return self._placed(Cache(prompts, cache.pages, states))

    def _logits(self, params: Params, hidden_RD: jax.Array) -> jax.Array:
        table_VD = unembedding(params).astype(self.layout.dtype)
        logits = jnp.einsum("RD,VD->RV", hidden_RD, table_VD, preferred_element_type=jnp.float32)
        cap = self.layout.config.final_logit_softcapping
        return cap * jnp.tanh(logits / cap) if cap else logits

    def _begin(
        self,
        params: Params,
        hidden_PD: jax.Array,
        slots_R: jax.Array,
        who_R3: jax.Array,
        choice: Choice,
        numbers: Numbers,
    ) -> Drawn:
        """The first tokens of answers to the prompts in `slots_R` (of all devices); `hidden_PD` is the cache's."""
        with nn.logical_axis_rules(self._rules[1]):
            logits = self._logits(params, hidden_PD[slots_R])
            return draw(logits, who_R3, jnp.zeros_like(slots_R), choice, numbers, self.filters, self.blocks)

    def _decode(
        self, params: Params, cache: Cache, going: Going, numbers: Numbers, floor: jax.Array, *, rung: Rung
    ) -> tuple[Cache, Chunk]:
        """Decode until `floor` rows or fewer are left that have not ended, a page is full, or none may go on.

        Args:
          params: `parameters`.
          floor: int32 scalar.
        """
        R, T, c = len(going.token), self.page, self.layout.config
        stops, tables = numbers.stops, going.tables
        lead = () if self.apart else (c.num_hidden_layers,)
        buffer = lambda *sizes: jnp.zeros((*lead, R, self.heads, *sizes), self.layout.dtype)
        empty = lambda: Kept(buffer(T, c.head_dim), buffer(T, c.head_dim))
        recent: Any = tuple(empty() for _ in range(c.num_hidden_layers)) if self.apart else empty()
        outs = jnp.zeros((R, T), jnp.int32), jnp.zeros((R, T), jnp.float32), jnp.zeros((R, T), jnp.float32)

        def joined(recent: Any) -> Any:
            if self.apart:
                return tuple(map(LayerCache, cache.prompts, cache.pages, recent))
            return LayerCache(cache.prompts, cache.pages, recent)

        def more(carry: Any) -> jax.Array:
            t, _, done_R, _, _ = carry
            return (t < T) & (jnp.sum(~done_R) > floor)

        def one(carry: Any) -> Any:
            t, token_R, done_R, recent, outs = carry
            hidden, new = decode(params, token_R, joined(recent), tables, t, going.last, self.model, self.reach)
            put = lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), t, old.ndim - 2)
            put_both = lambda old, new: Kept(put(old.k, new[0]), put(old.v, new[1]))
            recent = tuple(map(put_both, recent, new)) if self.apart else put_both(recent, new)
            told = going.who, going.drawn + t, going.choice, numbers
            drawn = draw(self._logits(params, hidden), *told, self.filters, self.blocks)
            outs = tuple(
                jax.lax.dynamic_update_slice_in_dim(o, x[:, None], t, 1) for o, x in zip(outs, drawn, strict=True)
            )
            count = going.drawn + t + 1
            stopped = (drawn.token[:, None] == stops[None, :]).any(1) & (count > numbers.min_tokens)
            return t + 1, drawn.token, done_R | stopped | (count >= going.limit), recent, outs

        with nn.logical_axis_rules(self._rules[1]):
            start = jnp.int32(0), going.token, going.drawn >= going.limit, recent, outs
            t, _, _, recent, outs = jax.lax.while_loop(more, one, start)

            def layer(pool: Kept, new: Kept) -> Kept:
                by_row = going.targets, tables.kept
                return self._on_devices(write_pages, pool, new, *by_row, by_head=(0, 1))

            pages = self._each_layer(layer, cache.pages, recent) if rung.pages else cache.pages
        shown = [jax.lax.with_sharding_constraint(x, self._whole) for x in (*outs, t)]
        return self._placed(Cache(cache.prompts, pages, cache.hidden)), Chunk(*shown)

    def _move(self, cache: Cache, slots: jax.Array, pages: jax.Array, *, rung: Rung) -> Cache:
        """The cache on another rung, no wider: which old slots `[P]` and pages `[N]` are taken over, in order."""

        taken = lambda x, at: jnp.take(x, at, axis=0, mode="fill", fill_value=0)

        def layer(old: Kept, at: jax.Array) -> Kept:
            local = lambda old, at: jax.tree.map(lambda x: taken(x, at), old)
            return self._on_devices(local, old, at, by_head=(0,))

        def prompts_of(old: Kept) -> Kept:
            cut = lambda x, axis: None if x is None else jax.lax.slice_in_dim(x, 0, rung.width, axis=axis)
            return layer(Kept(*map(cut, old, (3, 2, 2, 2))), slots)

        with nn.logical_axis_rules(self._rules[1]):
            prompts = self._each_layer(prompts_of, cache.prompts)
            own = self._each_layer(lambda old: layer(old, pages), cache.pages)
            hidden = self._on_devices(taken, cache.hidden, slots)
        return self._placed(Cache(prompts, own, hidden))

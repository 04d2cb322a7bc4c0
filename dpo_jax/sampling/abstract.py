"""The arguments of the sampler's programs by shape, dtype and sharding: to compile them before there is anything."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax.model.config import Params
from dpo_jax.model.placement import decoding_rules
from dpo_jax.parallel.mesh import ROW_AXES
from dpo_jax.rows.batch import batch_spec
from dpo_jax.rows.shape import RowShape
from dpo_jax.sampling.board import Seats, numbers_of
from dpo_jax.sampling.draws import Numbers
from dpo_jax.sampling.params import SamplingParams
from dpo_jax.sampling.programs import Cache, Programs, Rung


def abstract_cache(programs: Programs, rung: Rung) -> Cache:
    """What `programs.empty` makes."""
    mesh = programs.layout.mesh
    rules = dict(decoding_rules(programs.layout.config, mesh))
    rows, heads = rules["cache_rows"], rules["heads"]
    with jax.set_mesh(mesh):
        cache = jax.eval_shape(functools.partial(programs._empty, rung=rung))
    kept = P() if programs.apart else P(None, rows, heads)
    on = lambda spec: lambda x: _array(programs, x.shape, x.dtype, spec)
    prompts, pages = (jax.tree.map(on(kept), tree) for tree in (cache.prompts, cache.pages))
    return Cache(prompts, pages, on(P(rows))(cache.hidden))


def decode_arguments(
    programs: Programs, params: Params, rung: Rung, asked: SamplingParams, stops: int
) -> tuple[Any, ...]:
    """Of `programs.decode`, but for the rung.

    Args:
      params: as `programs.parameters` gives them, of shapes.
      stops: how many tokens end an answer.
    """
    seats = [Seats(rung, programs.page) for _ in range(programs.shards)]
    put = lambda spec: lambda x: _array(programs, np.shape(x), np.asarray(x).dtype, spec)
    going = jax.tree.map(put(P(ROW_AXES)), numbers_of(seats, rung))
    numbers = Numbers(*map(put(P()), Numbers.of(asked, range(stops))))
    return params, abstract_cache(programs, rung), going, numbers, put(P())(np.int32(0))


def prefill_arguments(programs: Programs, params: Params, rung: Rung, shape: RowShape) -> tuple[Any, ...]:
    """Of `programs.prefill`, but for the shape: a row of prompts on every device."""
    by_row = lambda shape, dtype: _array(programs, shape, dtype, P(ROW_AXES))
    batch = batch_spec(shape, (shape.rows,)).map(lambda x: by_row(x.shape, x.dtype))
    last_BW = by_row((shape.rows, shape.length), jnp.int32)
    return params, abstract_cache(programs, rung), batch, last_BW, by_row((shape.rows * shape.places, 3), jnp.int32)


def _array(programs: Programs, shape: tuple[int, ...], dtype: Any, spec: P) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(programs.layout.mesh, spec))

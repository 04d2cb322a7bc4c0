"""The train state on a mesh: begun from parameters, or described for restoring."""

from typing import Any

import jax
import optax
from jax.sharding import Mesh

from dpo_jax.model.params import Params
from dpo_jax.model.placement import Layout, abstract_trained
from dpo_jax.parallel.mesh import host_shardings, replicated
from dpo_jax.training.step import TrainState, init_state


def start_state(params: Params, tx: optax.GradientTransformation, layout: Layout) -> TrainState:
    """A state at update 0; takes the parameters' memory over."""
    init = jax.jit(init_state, static_argnums=1, donate_argnums=0, out_shardings=_state_shardings(tx, layout))
    return init(params, tx)


def abstract_state(tx: optax.GradientTransformation, layout: Layout) -> TrainState:
    """Shapes, dtypes and shardings of a state: what restoring one needs."""
    shapes = jax.eval_shape(lambda p: init_state(p, tx), abstract_trained(layout, layout.param_dtype))
    shardings = _state_shardings(tx, layout)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _state_shardings(tx: optax.GradientTransformation, layout: Layout) -> Any:
    params = abstract_trained(layout, layout.param_dtype)
    held = host_shardings(layout.trained) if layout.optimizer_offload else layout.trained
    moments = moment_shardings(tx, params, held, layout.mesh)
    return TrainState(step=replicated(layout.mesh), params=layout.trained, opt_state=moments)  # type: ignore[arg-type]


def moment_shardings(tx: optax.GradientTransformation, params: Params, shardings: Any, mesh: Mesh) -> Any:
    """Shardings of `tx.init(params)`: every moment is sharded like its parameter, every scalar is replicated."""
    return optax.tree_map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, params),
        shardings,
        transform_non_params=lambda _: replicated(mesh),
    )

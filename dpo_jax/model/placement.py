"""A model on a mesh: how it is sharded, and in which numbers it is kept and computed."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dpo_jax.model.attention.tpu_splash import Tiling
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.forward import RowTiling, init_params
from dpo_jax.model.lora import Lora, init_adapters, on_model
from dpo_jax.model.options import LayoutOptions
from dpo_jax.model.sharding import adapter_shardings, param_shardings
from dpo_jax.model.tuning import check_compiler_options, choose_tiling, row_limits
from dpo_jax.parallel.mesh import host_shardings, row_shards
from dpo_jax.parallel.tpu import generation_of
from dpo_jax.rows.shape import RowLimits, RowShape


@dataclasses.dataclass(frozen=True)
class Layout:
    """A model on a mesh.

    Attributes:
      config, mesh: of the model and the devices.
      shardings: a `NamedSharding` for every parameter of the model.
      trained: the same for what is trained: all of them, or the adapters.
      param_dtype: of what is trained; the optimiser's moments are float32.
      dtype: of activations, products and the reference.
      base_dtype: of the frozen base under adapters.
      lora: the adapters; None where all parameters are trained.
      tiling: how attention of rows runs; None is as dense blocks.
      optimizer_offload, reference_offload: whether the optimiser's moments, or the reference, are in the host's memory.
      compiler_options: XLA's, for the steps on these devices.
      longest: no sequence of a prompt and a completion has more tokens; None: unknown.
    """

    config: ModelConfig
    mesh: Mesh
    shardings: Any
    trained: Any
    param_dtype: Any
    dtype: Any
    base_dtype: Any
    lora: Lora | None
    tiling: RowTiling = None
    optimizer_offload: bool = False
    reference_offload: bool = False
    compiler_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    longest: int | None = None

    @property
    def platform(self) -> str:
        """tpu, gpu or cpu."""
        return self.mesh.devices.flat[0].platform

    @property
    def reference_shardings(self) -> Any:
        """As `shardings`, for the reference: of one in the host's memory, norms and biases are on the devices.

        They are small, and a TPU cannot fetch a layer's row of them alone: two bfloat16 rows share a word.
        """
        if not self.reference_offload:
            return self.shardings
        small = lambda path: path[-1].key.endswith(("scale", "bias"))
        return jax.tree_util.tree_map_with_path(lambda path, s: s if small(path) else host_shardings(s), self.shardings)

    @property
    def step_options(self) -> dict[str, Any]:
        """What every jitted step of this model takes (`training/step.py`)."""
        return {"compute_dtype": self.dtype, "compiler_options": self.compiler_options}

    @property
    def trained_count(self) -> int:
        """How many parameters are trained."""
        return sum(leaf.size for leaf in jax.tree.leaves(abstract_trained(self, self.param_dtype)))

    def row_limits(self, microbatches: int) -> RowLimits:
        """What this model on these devices asks of rows."""
        return row_limits(self.config, row_shards(self.mesh) * microbatches, self.platform)

    def uses_kernel(self, shape: RowShape) -> bool:
        """Whether rows attend by the TPU kernel: windows that their sequences go beyond need dense blocks."""
        return isinstance(self.tiling, Tiling) and not self.config.slides_within(shape.reach(self.longest))


def place_model(config: ModelConfig, mesh: Mesh, options: LayoutOptions, lora: Lora | None = None) -> Layout:
    """Place a model on a mesh; with `lora` its adapters are what is trained.

    Raises:
      UserError: the model does not divide over the mesh or cannot have these adapters, attention cannot run on these
        devices as asked, or the compiler does not know an option.
    """
    if options.compiler_options:
        check_compiler_options(options.compiler_options, mesh)
    device = mesh.devices.flat[0]
    auto = "float32" if device.platform == "cpu" else "bfloat16"
    dtype = jnp.dtype(auto if options.compute_dtype == "auto" else options.compute_dtype)
    shardings = trained = param_shardings(config, mesh)
    if lora is not None:
        lora = on_model(config, lora)
        trained = adapter_shardings(config, lora, mesh)
        config = dataclasses.replace(config, lora_scale=lora.scale)
    generation = generation_of(device)
    return Layout(
        config,
        mesh,
        shardings,
        trained,
        jnp.dtype(options.param_dtype),
        dtype,
        dtype if options.base_dtype == "auto" else jnp.dtype(options.base_dtype),
        lora,
        tiling=choose_tiling(options.attention, device),
        optimizer_offload=options.optimizer_offload,
        reference_offload=options.reference_offload,
        compiler_options={**(generation.compiler_options if generation else {}), **options.compiler_options},
        longest=options.longest,
    )


def abstract_whole(layout: Layout, dtype: Any) -> Any:
    """Shapes, `dtype` and shardings of a whole model that stays as it is: a reference, or the base under adapters."""
    return _abstract(lambda: init_params(jax.random.key(0), layout.config), dtype, layout.reference_shardings)


def abstract_trained(layout: Layout, dtype: Any) -> Any:
    """Shapes, `dtype` and shardings of what is trained."""
    config, lora, key = layout.config, layout.lora, jax.random.key(0)
    init = lambda: init_params(key, config) if lora is None else init_adapters(key, config, lora)
    return _abstract(init, dtype, layout.trained)


def _abstract(init: Any, dtype: Any, shardings: Any) -> Any:
    shapes = nn.meta.unbox(jax.eval_shape(init))
    return jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, dtype, sharding=s), shapes, shardings)

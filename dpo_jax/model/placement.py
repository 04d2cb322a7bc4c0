"""A model on a mesh: how its axes are sharded, and in which numbers it is kept and computed."""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dpo_jax.errors import UserError
from dpo_jax.model.attention.tpu_splash import Tiling
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.decoder import RowTiling
from dpo_jax.model.forward import init_params
from dpo_jax.model.lora import Lora, init_adapters, on_model
from dpo_jax.model.options import LayoutOptions
from dpo_jax.model.tuning import check_compiler_options, choose_tiling, row_limits
from dpo_jax.parallel.mesh import ROW_AXES, VOCAB_AXES, host_shardings, row_shards
from dpo_jax.parallel.tpu import generation_of
from dpo_jax.rows.shape import RowLimits, RowShape


def axis_rules(config: ModelConfig, mesh: Mesh) -> tuple[tuple[str, Any], ...]:
    """Logical axis → mesh axis for one model.

    Raises:
      UserError: a dimension of the model does not divide over its mesh axis.
    """
    tensor = mesh.shape["tensor"]
    spread_experts = config.num_experts > 0 and config.num_experts % tensor == 0
    for name, size, axis in (
        ("hidden_size", config.hidden_size, "fsdp"),
        ("num_attention_heads", config.num_attention_heads, "tensor"),
        # Whole experts are spread over the tensor shards where they divide, else the ffn of every expert.
        ("intermediate_size", 0 if spread_experts else config.intermediate_size, "tensor"),
    ):
        if size % mesh.shape[axis]:
            raise UserError(f"mesh_{axis}={mesh.shape[axis]} does not divide the model's {name}={size}; use a divisor")
    vocab, table = _table_axes(config, mesh)
    return (
        ("rows", ROW_AXES),
        ("cache_rows", ROW_AXES),
        ("embed", "fsdp"),
        ("vocab", vocab),
        ("table", table),
        ("vocab_parts", VOCAB_AXES),
        ("heads", "tensor"),
        # Fewer kv-heads than tensor shards: each shard keeps them all, as it needs some of each.
        ("kv_heads", "tensor" if config.num_key_value_heads % tensor == 0 else None),
        ("mlp", "tensor"),
        ("experts", "tensor" if spread_experts else None),
        ("expert_mlp", None if spread_experts else "tensor"),
        *((name, None) for name in ("tokens", "activation", "head_dim", "router", "norm", "layers", "rank", "label")),
    )


def decoding_rules(config: ModelConfig, mesh: Mesh) -> tuple[tuple[str, Any], ...]:
    """As `axis_rules`, for one new token a row: activations go to the weights, which stay where they lie.

    Every device of the fsdp axis has the same rows of activations and its part of their width, so that a product with
    its part of a kernel is a term of a sum over devices: for a few hundred rows that is far less than the kernel.
    Attention alone has rows of its own on every device, as the cache does.
    """
    data, width = ROW_AXES
    other = {"rows": data, "activation": width}
    return tuple((name, other.get(name, axes)) for name, axes in axis_rules(config, mesh))


def _table_axes(config: ModelConfig, mesh: Mesh) -> tuple[Any, Any]:
    """How the vocabulary's tables are sharded: by tokens, as they are computed with, or else by width.

    The latter where the tokens do not divide; they are exchanged for parts of whole rows when those are needed.
    """
    parts = math.prod(mesh.shape[a] for a in VOCAB_AXES)
    if config.vocab_size % parts == 0:
        return VOCAB_AXES, None
    return None, VOCAB_AXES if config.hidden_size % parts == 0 else "fsdp"


@dataclasses.dataclass(frozen=True)
class Layout:
    """A model on a mesh.

    Attributes:
      shardings: a `NamedSharding` for every parameter of the model.
      trained: the same for what is trained: all of them, or the adapters.
      param_dtype: of what is trained; the optimiser's moments are float32.
      dtype: of activations, products and the reference.
      base_dtype: of the frozen base under adapters.
      lora: the adapters; None where all parameters are trained.
      tiling: how attention of rows runs; None is as dense blocks.
      options: what was asked for; its compiler options are all that there are for the steps on these devices.
    """

    config: ModelConfig
    mesh: Mesh
    shardings: Any
    trained: Any
    param_dtype: Any
    dtype: Any
    base_dtype: Any
    lora: Lora | None
    tiling: RowTiling
    options: LayoutOptions

    @property
    def platform(self) -> str:
        """tpu, gpu or cpu."""
        return self.mesh.devices.flat[0].platform

    @property
    def reference_shardings(self) -> Any:
        """As `shardings`, for the reference: of one in the host's memory, norms and biases are on the devices.

        They are small, and a TPU cannot fetch a layer's row of them alone: two bfloat16 rows share a word.
        """
        if not self.options.reference_offload:
            return self.shardings
        small = lambda path: path[-1].key.endswith(("scale", "bias"))
        return jax.tree_util.tree_map_with_path(lambda path, s: s if small(path) else host_shardings(s), self.shardings)

    @property
    def step_options(self) -> dict[str, Any]:
        """What every jitted step of this model takes (`training/step.py`)."""
        return {"compute_dtype": self.dtype, "compiler_options": self.options.compiler_options}

    @property
    def trained_count(self) -> int:
        """How many parameters are trained."""
        return sum(leaf.size for leaf in jax.tree.leaves(abstract_trained(self, self.param_dtype)))

    def row_limits(self, microbatches: int) -> RowLimits:
        """What this model on these devices asks of rows."""
        return row_limits(self.config, row_shards(self.mesh) * microbatches, self.platform)

    def uses_kernel(self, shape: RowShape) -> bool:
        """Whether rows attend by the TPU kernel: windows that their sequences go beyond need dense blocks."""
        return isinstance(self.tiling, Tiling) and not self.config.slides_within(shape.reach(self.options.longest))


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
    base_dtype = dtype if options.base_dtype == "auto" else jnp.dtype(options.base_dtype)
    shardings = trained = param_shardings(config, mesh)
    if lora is not None:
        lora = on_model(config, lora)
        trained = param_shardings(config, mesh, lora)
        config = dataclasses.replace(config, lora_scale=lora.scale)
    generation = generation_of(device)
    compiler = {**(generation.compiler_options if generation else {}), **options.compiler_options}
    options = dataclasses.replace(options, compiler_options=compiler)
    tiling = choose_tiling(options.attention, device)
    return Layout(
        config, mesh, shardings, trained, jnp.dtype(options.param_dtype), dtype, base_dtype, lora, tiling, options
    )


def param_shardings(config: ModelConfig, mesh: Mesh, lora: Lora | None = None) -> Any:
    """A tree of `NamedSharding` shaped like the parameters; with `lora` like its adapters.

    A and B of an adapter are sharded as their kernel is, whole along the rank.
    """
    specs = nn.get_partition_spec(_fresh(config, lora))
    return nn.logical_to_mesh_sharding(specs, mesh, axis_rules(config, mesh))


def abstract_whole(layout: Layout, dtype: Any) -> Any:
    """Shapes, `dtype` and shardings of a whole model that stays as it is: a reference, or the base under adapters."""
    return _abstract(_fresh(layout.config, None), dtype, layout.reference_shardings)


def abstract_trained(layout: Layout, dtype: Any) -> Any:
    """Shapes, `dtype` and shardings of what is trained."""
    return _abstract(_fresh(layout.config, layout.lora), dtype, layout.trained)


@functools.lru_cache(maxsize=8)  # tracing it takes most of a second, and a run asks several times
def _fresh(config: ModelConfig, lora: Lora | None) -> Any:
    """Shapes and logical axes of a model's parameters, or of its adapters."""
    init = init_params if lora is None else functools.partial(init_adapters, lora=lora)
    return jax.eval_shape(lambda: init(jax.random.key(0), config))


def _abstract(fresh: Any, dtype: Any, shardings: Any) -> Any:
    shape_of = lambda p, s: jax.ShapeDtypeStruct(p.shape, dtype, sharding=s)
    return jax.tree.map(shape_of, nn.meta.unbox(fresh), shardings)

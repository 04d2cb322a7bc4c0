"""The policy and its reference: where they come from, and how they lie on the mesh."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import transformers
from jax.sharding import Mesh

from dpo_jax.errors import UserError
from dpo_jax.model.attention.cpu_tiles import Skipping
from dpo_jax.model.attention.dense import Slots
from dpo_jax.model.attention.tpu_splash import Tiling
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.families import hf_config
from dpo_jax.model.forward import RowTiling, init_params
from dpo_jax.model.lora import Lora, init_adapters
from dpo_jax.model.params import Params
from dpo_jax.parallel.mesh import (
    adapter_shardings,
    host_shardings,
    param_shardings,
    replicated,
    row_shards,
    state_shardings,
)
from dpo_jax.parallel.tpu import generation_of, quiet
from dpo_jax.rows.schedule import RowLimits
from dpo_jax.training import checkpoint
from dpo_jax.training.step import TrainState, init_state
from dpo_jax.weights import hub, tiny
from dpo_jax.weights import huggingface as weights

ATTENTION = ("auto", "splash", "tiles", "dense")
# A reference that follows the policy (TR-DPO): small changes would be lost in bfloat16.
MOVING = jnp.dtype("float32")


@dataclasses.dataclass(frozen=True)
class Policy:
    """The model to train: its numbers, where its files lie (None: made from scratch), and its tokenizer."""

    config: ModelConfig
    directory: Path | None
    tokenizer_directory: Path
    tokenizer: Any

    def hf_config(self) -> dict[str, Any]:
        """What its Hugging Face `config.json` holds."""
        if self.directory is not None:
            return weights.read_config(self.directory)[1]
        tokens = {f"{name}_token_id": getattr(self.tokenizer, f"{name}_token_id") for name in ("bos", "eos")}
        return hf_config(self.config, **tokens)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a model lies on a mesh and in which numbers it is kept and computed.

    Attributes:
      config, mesh: of the model and the devices.
      shardings: a `NamedSharding` for every parameter of the model.
      trained: the same for what is trained: all of them, or the adapters.
      param_dtype: of what is trained; the optimiser's moments are float32.
      dtype: of activations, products and the reference.
      base_dtype: of the frozen base under adapters.
      lora: the adapters; None where all parameters are trained.
      tiling: how attention of pair rows runs; None is as dense blocks.
      optimizer_offload, reference_offload: whether the optimiser's moments, or the reference, lie in the host's memory.
      compiler_options: XLA's, for the steps on these devices.
      longest: no sequence of a pair has more tokens; None: nobody says so.
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
        """As `shardings`, where the reference lies: of one in the host's memory, norms and biases are on the devices.

        They are small, and a TPU cannot fetch a layer's row of them alone: two bfloat16 rows share a word.
        """
        if not self.reference_offload:
            return self.shardings
        small = lambda path: path[-1].key.endswith(("scale", "bias"))
        return jax.tree_util.tree_map_with_path(lambda path, s: s if small(path) else host_shardings(s), self.shardings)


def find(model: str, workdir: Path, seed: int, *, with_weights: bool = True) -> Policy:
    """Find the model's files, or make the tokenizer of the model that starts from scratch (`tiny`).

    Without weights, a model of the hub has only its config and tokenizer downloaded.

    Raises:
      UserError: there is no such model, or it is not supported, or its tokenizer does not belong to it.
    """
    if model == "tiny":
        dialogues = tiny.write_dialogues(workdir, seed)
        directory = tiny.write_tokenizer(workdir / f"tokenizer-{seed}", dialogues)
        tokenizer = _tokenizer(directory)
        return Policy(tiny.model_config(len(tokenizer)), None, directory, tokenizer)
    directory = hub.resolve_model(model, with_weights=with_weights)
    config, _ = weights.read_config(directory)
    policy = Policy(config, directory, directory, _tokenizer(directory))
    if len(policy.tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer in {directory} has {len(policy.tokenizer)} tokens and its model only {config.vocab_size}; "
            "put the tokenizer there that the model was trained with"
        )
    return policy


def _tokenizer(directory: Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as e:  # transformers and huggingface_hub validate the files with errors of many kinds
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(f"no tokenizer can be read from {directory} ({first}); put its tokenizer.json there") from None


def lay_out(
    config: ModelConfig,
    mesh: Mesh,
    *,
    param_dtype: str,
    compute_dtype: str,
    lora: Lora | None = None,
    base_dtype: str = "auto",
    attention: str = "auto",
    optimizer_offload: bool = False,
    reference_offload: bool = False,
    compiler_options: Mapping[str, str] | None = None,
    longest: int | None = None,
) -> Layout:
    """Place a model on a mesh. `compute_dtype` auto is bfloat16, and float32 on CPU, where it is the faster one.

    `base_dtype` auto is the compute dtype; `attention` is one of `ATTENTION`;
    `compiler_options` come on top of those of the generation; the others as in `Layout`.

    Raises:
      UserError: the model does not divide over the mesh.
    """
    auto = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    dtype = jnp.dtype(auto if compute_dtype == "auto" else compute_dtype)
    base = dtype if base_dtype == "auto" else jnp.dtype(base_dtype)
    shardings = trained = param_shardings(config, mesh)
    if lora is not None:
        trained = adapter_shardings(config, lora, mesh)
        config = dataclasses.replace(config, lora_scale=lora.scale)
    device = mesh.devices.flat[0]
    generation = generation_of(device)
    return Layout(
        config,
        mesh,
        shardings,
        trained,
        jnp.dtype(param_dtype),
        dtype,
        base,
        lora,
        tiling=_tiling(attention, device),
        optimizer_offload=optimizer_offload,
        reference_offload=reference_offload,
        compiler_options={**(generation.compiler_options if generation else {}), **(compiler_options or {})},
        longest=longest,
    )


def _tiling(attention: str, device: jax.Device) -> RowTiling:
    """How attention of pair rows runs on this device.

    Raises:
      UserError: tiles were asked for elsewhere than on CPU. Their loops are as long as the data says, of which an
        accelerator would ask the host before every tile.
    """
    platform = device.platform
    if attention == "auto":
        attention = {"tpu": "splash", "cpu": "tiles"}.get(platform, "dense")
    if attention == "tiles":
        if platform != "cpu":
            raise UserError(f"attention=tiles is for CPU, and this is {platform}; use auto, splash or dense")
        return Skipping()
    if attention == "dense":
        return None
    generation = generation_of(device)
    return Tiling(generation.largest_tile if generation else 512, interpret=platform != "tpu")


def check_compiler_options(options: Mapping[str, str], mesh: Mesh) -> None:
    """Refuse options that the compiler for these devices does not know, before anything is loaded for them.

    Raises:
      UserError: with the compiler's own words.
    """
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    try:
        with quiet():
            jax.jit(jnp.negative, compiler_options=dict(options)).lower(number).compile()
    except Exception as e:  # XLA's errors are of one class, whatever the cause
        raise UserError(f"compiler_options: {str(e).strip().splitlines()[0]}; correct it or leave it out") from None


def row_limits(layout: Layout, microbatches: int) -> RowLimits:
    """What this model on these devices asks of pair rows."""
    return limits_on(layout.config, row_shards(layout.mesh) * microbatches, layout.platform)


def limits_on(config: ModelConfig, row_multiple: int, platform: str) -> RowLimits:
    """What this model asks of pair rows on cpu, gpu or tpu, where rows divide by `row_multiple`."""
    c = config
    # One key costs 4·H·E operations (scores and values), a token 2 per weight that it meets in a layer. On CPU softmax
    # and small products make a key about 2.5 times as dear, but tiles see about half of the keys (measured on
    # SmolLM2-135M).
    layer = (c.active_parameter_count() - c.vocab_size * c.hidden_size) / c.num_hidden_layers
    key_cost = 4 * c.num_attention_heads * c.head_dim / (2 * layer)
    return RowLimits(
        row_multiple=row_multiple,
        # Sublanes of a bfloat16 register on TPU. Not its 128 lanes: only the attention kernel wants them, and pads for
        # itself; rows that wide would compute up to a fifth more.
        width_multiple=16 if platform == "tpu" else 8,
        key_cost=key_cost,
    )


def uses_kernel(layout: Layout, slots: Slots) -> bool:
    """Whether rows attend by the TPU kernel: windows that their sequences go beyond need dense blocks."""
    return isinstance(layout.tiling, Tiling) and not layout.config.slides_within(slots.reach(layout.longest))


def exact_products(layout: Layout) -> contextlib.AbstractContextManager[Any]:
    """A context in which matrix products of float32 are those of float32.

    Left to themselves TPUs round the operands to bfloat16, and GPUs to TensorFloat-32. On CPU nothing is rounded.
    """
    rounds = layout.dtype == jnp.float32 and layout.platform != "cpu"
    return jax.default_matmul_precision("float32") if rounds else contextlib.nullcontext()


def passes(layout: Layout) -> int:
    """How many bfloat16 products a TPU makes of one of the model's: six of a float32 one, whose operands are divided
    into three bfloat16 numbers each (XLA's `BF16_BF16_F32_X6`, which the precision "highest" names)."""
    return 6 if layout.dtype == jnp.float32 and layout.platform == "tpu" else 1


def load_base(policy: Policy, layout: Layout, seed: int) -> Params:
    """What is under the adapters and never trained, from the policy's files or fresh; {} if all parameters are trained.

    Nobody saves it: the same files or the same seed bring it back.
    """
    return {} if layout.lora is None else _load(policy, layout, seed, layout.base_dtype)


def load_params(policy: Policy, layout: Layout, seed: int) -> Params:
    """What is trained, before any training: the policy's parameters from its files or fresh, or fresh adapters."""
    lora = layout.lora
    if lora is None:
        return _load(policy, layout, seed, layout.param_dtype)
    key = jax.random.fold_in(jax.random.key(seed), 1)  # not the one that fresh parameters are drawn with
    return _fresh(lambda: init_adapters(key, layout.config, lora), layout.param_dtype, layout.trained)


def _load(policy: Policy, layout: Layout, seed: int, dtype: Any) -> Params:
    if policy.directory is not None:
        return weights.load_weights(policy.directory, policy.config, layout.shardings, dtype)
    return _fresh(lambda: init_params(jax.random.key(seed), policy.config), dtype, layout.shardings)


def _fresh(init: Callable[[], Any], dtype: Any, shardings: Any) -> Params:
    cast = lambda: jax.tree.map(lambda p: p.astype(dtype), nn.meta.unbox(init()))
    return jax.jit(cast, out_shardings=shardings)()


def check_reference(reference: ModelConfig, layout: Layout, name: str) -> None:
    """Refuse a reference of another architecture than the policy's.

    Raises:
      UserError: with the numbers that differ; `name` says which reference it is.
    """
    theirs, ours = dataclasses.asdict(reference), dataclasses.asdict(layout.config)
    irrelevant = ("model_type", "lora_scale", "max_position_embeddings", "router_aux_loss_coef")
    changed = [f"{k}: {theirs[k]!r}, policy {ours[k]!r}" for k in ours if k not in irrelevant and theirs[k] != ours[k]]
    if changed:
        raise UserError(f"reference {name} is another architecture than the policy ({'; '.join(changed)})")


def load_reference(directory: Path, layout: Layout, *, moves: bool) -> Params:
    """A named model as the reference, in the compute dtype (see `check_reference`); one that `moves` in `MOVING`."""
    return weights.load_weights(directory, layout.config, layout.reference_shardings, MOVING if moves else layout.dtype)


def moving_reference(params: Params) -> Params:
    """A copy of the policy as a reference that will move; every checkpoint holds it, see `abstract_reference`."""
    return _copied(params, MOVING)


def abstract_whole(layout: Layout, dtype: Any) -> Any:
    """Shapes, `dtype` and shardings of a whole model that stays as it is: a reference, or the base under adapters."""
    shapes = nn.meta.unbox(jax.eval_shape(lambda: init_params(jax.random.key(0), layout.config)))
    shardings = layout.reference_shardings
    return jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, dtype, sharding=s), shapes, shardings)


def abstract_reference(layout: Layout) -> Any:
    """Shapes, dtype and shardings of a reference that moves: what restoring one needs."""
    return abstract_trained(layout, MOVING)


@functools.partial(jax.jit, static_argnames="dtype")
def _copied(params: Params, dtype: Any) -> Params:
    """A copy in another dtype; a real one even in the same dtype, as the original is donated later."""
    return jax.tree.map(lambda p: jnp.array(p, dtype, copy=True), params)


def own_reference(saved: Path, params: Params | None, layout: Layout) -> Params:
    """The reference that the run made itself: kept in `saved`, as nobody else can bring it back.

    Under adapters it is those after the SFT phase, over the same base.

    Args:
      saved: its directory.
      params: what is trained when DPO starts, to be saved; None in a run that goes on.
      layout: of the model.

    Raises:
      UserError: it is not there any more.
    """
    if params is not None:
        checkpoint.save_tree(saved, _copied(params, layout.dtype))
    if not saved.exists():
        raise UserError(f"{saved}, the reference that this run made, is gone; start again in a new workdir")
    whole = layout.lora is None
    return checkpoint.restore_tree(saved, (abstract_whole if whole else abstract_trained)(layout, layout.dtype))


def start_state(params: Params, tx: optax.GradientTransformation, layout: Layout) -> TrainState:
    """A state at update 0; takes the parameters' memory over."""
    init = jax.jit(init_state, static_argnums=1, donate_argnums=0, out_shardings=_state_shardings(tx, layout))
    return init(params, tx)


def abstract_state(tx: optax.GradientTransformation, layout: Layout) -> TrainState:
    """Shapes, dtypes and shardings of a state: what restoring one needs."""
    shapes = jax.eval_shape(lambda p: init_state(p, tx), abstract_trained(layout, layout.param_dtype))
    return checkpoint.abstract(shapes, _state_shardings(tx, layout))


def trained_count(layout: Layout) -> int:
    """How many parameters are trained."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_trained(layout, layout.param_dtype)))


def abstract_trained(layout: Layout, dtype: Any) -> Any:
    """Shapes, `dtype` and shardings of what is trained."""
    config, lora = layout.config, layout.lora
    key = jax.random.key(0)
    boxed = jax.eval_shape(lambda: init_params(key, config) if lora is None else init_adapters(key, config, lora))
    shapes = nn.meta.unbox(boxed)
    return jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, dtype, sharding=s), shapes, layout.trained)


def _state_shardings(tx: optax.GradientTransformation, layout: Layout) -> Any:
    params = abstract_trained(layout, layout.param_dtype)
    held = host_shardings(layout.trained) if layout.optimizer_offload else layout.trained
    moments = state_shardings(tx, params, held, layout.mesh)
    return TrainState(step=replicated(layout.mesh), params=layout.trained, opt_state=moments)  # type: ignore[arg-type]

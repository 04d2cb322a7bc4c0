"""What suits a model on the devices it runs on: rows, attention's tiles, exact products, the compiler's options."""

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dpo_jax.errors import UserError
from dpo_jax.model.attention.cpu_tiles import Skipping
from dpo_jax.model.attention.tpu_splash import Tiling
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.decoder import RowTiling
from dpo_jax.parallel.mesh import replicated
from dpo_jax.parallel.tpu import generation_of, quiet
from dpo_jax.rows.shape import RowLimits


def row_limits(config: ModelConfig, row_multiple: int, platform: str) -> RowLimits:
    """What this model asks of rows on cpu, gpu or tpu, where the rows of a step divide by `row_multiple`."""
    c = config
    # One key costs 4·H·E operations (scores and values), a token 2 per weight that it meets in a layer. On CPU softmax
    # and small products make a key about 2.5 times as dear, but tiles see about half of the keys (measured on
    # SmolLM2-135M).
    layer = (c.active_parameter_count() - c.vocab_size * c.hidden_size) / c.num_hidden_layers
    return RowLimits(
        row_multiple=row_multiple,
        # Sublanes of a bfloat16 register on TPU. Not its 128 lanes: only the attention kernel wants them, and pads for
        # itself; rows that wide would compute up to a fifth more.
        width_multiple=16 if platform == "tpu" else 8,
        key_cost=4 * c.num_attention_heads * c.head_dim / (2 * layer),
    )


def choose_tiling(attention: str, device: jax.Device) -> RowTiling:
    """How attention of rows runs on this device; None is as dense blocks.

    Raises:
      UserError: tiles were asked for elsewhere than on CPU. The lengths of their loops depend on the data, and
        an accelerator would ask the host before every tile.
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


def exact_products(dtype: Any, platform: str) -> contextlib.AbstractContextManager[Any]:
    """A context in which matrix products of float32 are those of float32.

    Left to themselves TPUs round the operands to bfloat16, and GPUs to TensorFloat-32. On CPU nothing is rounded.
    """
    rounds = dtype == jnp.float32 and platform != "cpu"
    return jax.default_matmul_precision("float32") if rounds else contextlib.nullcontext()


def passes(dtype: Any, platform: str) -> int:
    """How many bfloat16 products a TPU makes of one of the model's: six of a float32 one, whose operands are divided
    into three bfloat16 numbers each (XLA's `BF16_BF16_F32_X6`, which the precision "highest" names)."""
    return 6 if dtype == jnp.float32 and platform == "tpu" else 1

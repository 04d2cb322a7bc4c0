"""What the backward pass keeps of a layer (everything else is computed again), and moves to and from host memory."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import Offloadable


def _keeps_product(primitive: Any, *operands: Any, **params: Any) -> bool:
    """Matrix products are kept, except those that make many numbers from few, such as an adapter's second product.

    That one is as large as the product of the projection it belongs to, and cheap to compute again (as many operations
    a number as the rank). If it were kept, adapters would take more memory than full fine-tuning: 3.4 against 2.7 GB of
    temporaries on SmolLM2-135M.
    """
    if not jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *operands, **params):
        return False
    left, right = operands
    contracted = math.prod(left.shape[axis] for axis in params["dimension_numbers"][0][0])
    return right.size < 8 * contracted**2


ATTENTION_NAMES = ("q", "k", "v", "attention_out")

_keeps_attention = jax.checkpoint_policies.save_only_these_names(*ATTENTION_NAMES)


def _moves_attention(primitive: Any, *operands: Any, **params: Any) -> Any:
    """q, k, v and attention's output go to the host's memory; the kernel's log-sum-exps, which are small, stay.

    The log-sum-exps have the output's name, but one number where the output has a head's width. Moving them too can end
    in an internal error of the TPU compiler (jaxlib 0.10): it may choose another memory layout for one layer's than for
    the stack of all layers in the host's memory.
    """
    if not _keeps_attention(primitive, *operands, **params):
        return False
    has_head_width = operands[0].ndim == 4  # beside rows, tokens and heads
    return Offloadable(src="device", dst="pinned_host") if has_head_width else True


REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    # matrix products and attention are kept, the cheap element-wise work between them is not
    "dots": jax.checkpoint_policies.save_from_both_policies(
        _keeps_product, jax.checkpoint_policies.save_only_these_names("attention_out")
    ),
    "attention": _keeps_attention,
    "attention_offload": _moves_attention,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def to_device(tree: Any) -> Any:
    """Arrays in the device's memory, inside a jitted function."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), tree)


def to_host(tree: Any) -> Any:
    """Arrays in the host's memory, inside a jitted function; scalars stay where they are."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host) if x.ndim else x, tree)

"""What the backward pass keeps of a layer (everything else is computed again), and moves to and from host memory."""

import math
from collections.abc import Callable
from typing import Any

import jax


def _keeps_product(primitive: Any, *operands: Any, **params: Any) -> bool:
    """Matrix products are kept, but those that make many numbers from few: an adapter's second one, say.

    It is as large as the projection's own product beside it and costs a rank's worth of operations a number. Were it
    kept, adapters would take more memory than full fine-tuning (3.4 against 2.7 GB of temporaries on SmolLM2-135M).
    """
    if not jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *operands, **params):
        return False
    left, right = operands
    contracted = math.prod(left.shape[axis] for axis in params["dimension_numbers"][0][0])
    return right.size < 8 * contracted**2


ATTENTION_NAMES = ("q", "k", "v", "attention_out")

REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    # matrix products and attention are kept, the cheap element-wise work between them is not
    "dots": jax.checkpoint_policies.save_from_both_policies(
        _keeps_product, jax.checkpoint_policies.save_only_these_names("attention_out")
    ),
    "attention": jax.checkpoint_policies.save_only_these_names(*ATTENTION_NAMES),
    "attention_offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(ATTENTION_NAMES),
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def to_device(tree: Any) -> Any:
    """Arrays in the device's memory, inside a jitted function."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), tree)


def to_host(tree: Any) -> Any:
    """Arrays in the host's memory, inside a jitted function; scalars stay where they are."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host) if x.ndim else x, tree)

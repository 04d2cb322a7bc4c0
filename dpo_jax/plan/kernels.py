"""FLOPs of custom kernels, which HLO does not tell: attention by its tiles, products of experts by their rows."""

import math
from collections.abc import Sequence
from typing import Any

from dpo_jax.model.attention.tpu_splash import Tiling, tile, tiles_run
from dpo_jax.plan.hlo.count import KernelCall, KernelFlops
from dpo_jax.rows.shape import RowShape


def kernel_formula(shape: RowShape, tiling: Any, experts_share: float) -> KernelFlops:
    """FLOPs of the kernels in a step, for `count_costs`.

    Args:
      shape: of the rows.
      tiling: how attention runs (`Layout.tiling`).
      experts_share: the share of the rows given to a grouped product that belong to the device's own experts.
    """

    def flops(call: KernelCall) -> float | None:
        if call.name == "ragged-dot-metadata":  # sorts the rows of a grouped product, multiplies nothing
            return 0.0
        if isinstance(tiling, Tiling):
            attention = attention_flops(call.name, query_shape(call.operands), shape, tiling)
            if attention is not None:
                return attention
        if call.cost_estimate is None:
            return None
        grouped = call.name.startswith("ragged-dot") or "tgmm" in call.name
        return call.cost_estimate * (experts_share if grouped else 1)

    return flops


def query_shape(operands: Sequence[Any]) -> tuple[int, ...]:
    """The shape of an attention kernel's queries: its first operand of real numbers (mask tables and ids are integers).

    `[rows, heads, tokens, head width]`; a single row has no axis of its own. Operands of HLO, or JAX's abstract arrays.
    """
    real = (x for x in operands if str(x.dtype) in ("bf16", "f32", "bfloat16", "float32"))
    return next((tuple(x.shape if hasattr(x, "shape") else x.dims) for x in real), ())


def attention_flops(name: str, query: tuple[int, ...], shape: RowShape, tiling: Tiling) -> float | None:
    """FLOPs of one call of the splash kernel: its tiles that are not skipped; None if it is another kernel.

    Two products a score forward (scores, values), five backward (scores again, gradients of probabilities, values, keys
    and queries); 2·E operations a score and product.
    """
    products = 2 if "_fwd" in name else 5 if "_dkv" in name else 0
    if not name.startswith("splash") or not products:
        return None
    *rows_and_heads, _, width = query
    side, _ = tile(shape, tiling.largest)
    return float(math.prod(rows_and_heads) * tiles_run(shape, side) * side**2 * 2 * width * products)

"""FLOPs of HLO's matrix products and convolutions, 2 a multiply-add."""

import functools
import math
import re

import numpy as np

from dpo_jax.plan.hlo.text import Computation, Instruction, Shape, leaves


def _array(inside: Computation, it: Instruction, operand: int) -> Shape:
    shape = inside.shape(it.operands[operand], it)
    if not isinstance(shape, Shape):
        raise it.error(f"operand {operand} is a tuple")
    return shape


def _numbers(it: Instruction, key: str) -> list[int]:
    return [int(n) for n in (it.braced(key) or "").split(",") if n]


def _dot(inside: Computation, it: Instruction) -> float:
    left = _array(inside, it, 0)
    contracted = math.prod(left.dims[axis] for axis in _numbers(it, "lhs_contracting_dims"))
    return 2.0 * sum(leaf.elements for leaf in leaves(it.shape)) * contracted


def _ragged_dot(inside: Computation, it: Instruction) -> float:
    """Every row belongs to one group; where rows are contracted, each adds to its own group's result only."""
    total = _dot(inside, it)
    ragged = set(_numbers(it, "lhs_ragged_dims")) & set(_numbers(it, "lhs_contracting_dims"))
    return total / _array(inside, it, 2).dims[-1] if ragged else total


def _convolution(inside: Computation, it: Instruction) -> float:
    """Counts the places of the window that hold an input, as XLA's own analysis does.

    On TPU matrix products are convolutions; a batch of them is one over a dilated input, of which most places are none.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", it.attributes)
    if not labels:
        raise it.error("a convolution without dim_labels")
    left, right = (_array(inside, it, i).dims for i in (0, 1))
    (out,) = (shape.dims for shape in leaves(it.shape))
    window = dict(part.split("=") for part in (it.braced("window") or "").split())
    spatial = sorted(c for c in labels[3] if c.isdigit())
    places = 1
    for i, c in enumerate(spatial):
        size = lambda key, default="1": window.get(key, "x".join([default] * len(spatial))).split("x")[i]  # noqa: B023
        places *= _window_places(
            left[labels[1].index(c)],
            right[labels[2].index(c)],
            out[labels[3].index(c)],
            *(int(size(key)) for key in ("stride", "lhs_dilate", "rhs_dilate")),
            int(size("pad", "0_0").split("_")[0]),
        )
    groups = re.search(r"batch_group_count=(\d+)", it.attributes)
    batch = left[labels[1].index("b")] // (int(groups[1]) if groups else 1)
    return 2.0 * places * batch * right[labels[2].index("i")] * right[labels[2].index("o")]


@functools.lru_cache(maxsize=4096)
def _window_places(size: int, kernel: int, out: int, stride: int, dilate: int, kernel_dilate: int, pad: int) -> int:
    """How many (output, kernel) positions of one spatial dimension meet an input."""
    begins = np.arange(out) * stride - pad
    total = 0
    for k in range(kernel):
        at = begins + k * kernel_dilate
        total += int(np.count_nonzero((at % dilate == 0) & (at >= 0) & (at // dilate < size)))
    return total


FLOPS = {"dot": _dot, "convolution": _convolution, "ragged-dot": _ragged_dot}

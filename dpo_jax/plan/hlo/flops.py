"""FLOPs of HLO's matrix products and convolutions, 2 a multiply-add."""

import functools
import math

import numpy as np

from dpo_jax.plan.hlo.text import Computation, Instruction, Shape, arrays, numbers


def _dims(inside: Computation, it: Instruction, operand: int) -> tuple[int, ...]:
    shape = inside.operand_shapes(it)[operand]
    if not isinstance(shape, Shape):
        raise it.error(f"operand {operand} is a tuple")
    return shape.dims


def _dot(inside: Computation, it: Instruction) -> float:
    left = _dims(inside, it, 0)
    contracted = math.prod(left[axis] for axis in numbers(it.braced("lhs_contracting_dims")))
    return 2.0 * sum(array.elements for array in arrays(it.shape)) * contracted


def _ragged_dot(inside: Computation, it: Instruction) -> float:
    """Every row belongs to one group; where rows are contracted, each adds to its own group's result only."""
    ragged, contracted = (set(numbers(it.braced(f"lhs_{which}_dims"))) for which in ("ragged", "contracting"))
    return _dot(inside, it) / (_dims(inside, it, 2)[-1] if ragged & contracted else 1)


def _convolution(inside: Computation, it: Instruction) -> float:
    """Counts the places of the window that hold an input, as XLA's own analysis does.

    On TPU matrix products are convolutions; a batch of them is one over a dilated input, of which most places are none.
    """
    labels = it.find(r"dim_labels=(\w+)_(\w+)->(\w+)")
    if not labels:
        raise it.error("a convolution without dim_labels")
    left, right, (out,) = _dims(inside, it, 0), _dims(inside, it, 1), (shape.dims for shape in arrays(it.shape))
    window = dict(part.split("=") for part in (it.braced("window") or "").split())
    places = 1
    for i, axis in enumerate(sorted(label for label in labels[3] if label.isdigit())):
        sizes = (left[labels[1].index(axis)], right[labels[2].index(axis)], out[labels[3].index(axis)])
        steps = (
            int(window[key].split("x")[i]) if key in window else 1 for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        pad = int(window["pad"].split("x")[i].split("_")[0]) if "pad" in window else 0
        places *= _window_places(*sizes, *steps, pad)
    groups = it.find(r"batch_group_count=(\d+)")
    batch = left[labels[1].index("b")] // (int(groups[1]) if groups else 1)
    return 2.0 * places * batch * right[labels[2].index("i")] * right[labels[2].index("o")]


@functools.lru_cache(maxsize=4096)
def _window_places(size: int, kernel: int, out: int, stride: int, dilate: int, kernel_dilate: int, pad: int) -> int:
    """How many (output, kernel) positions of one spatial dimension meet an input."""
    at = np.arange(out)[:, None] * stride - pad + np.arange(kernel) * kernel_dilate
    return int(np.count_nonzero((at % dilate == 0) & (at >= 0) & (at // dilate < size)))


FLOPS = {"dot": _dot, "convolution": _convolution, "ragged-dot": _ragged_dot}

"""FLOPs of a traced program, counted in its jaxpr: what was asked for, before XLA changes or divides it.

Independent of `plan/hlo/`, to check it. They differ by what XLA removes (a recomputation that it finds to be the same
as the first one, work on values that nobody uses) and adds (padding, work that every device repeats).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# FLOPs of one run of a kernel from its name and the shapes of its operands and results; None if it is not known.
KernelFlops = Callable[[str, tuple[Any, ...], tuple[Any, ...]], float | None]


class UncountableError(ValueError):
    """A program whose FLOPs its jaxpr does not tell."""


@dataclasses.dataclass(frozen=True)
class _Formulas:
    """What a jaxpr does not tell."""

    kernel_flops: KernelFlops
    grouped_share: float


def flops(jaxpr: Any, kernel_flops: KernelFlops | None = None, *, grouped_share: float = 1.0) -> float:
    """FLOPs of matrix products, convolutions and kernels of the whole program on all devices, 2 a multiply-add.

    Args:
      jaxpr: `jax.make_jaxpr(f)(...)` or `jax.jit(f).trace(...).jaxpr`.
      kernel_flops: a Pallas kernel's FLOPs from (its name, its operands, its results); inside a `shard_map` the arrays
        are those of one device and so is the answer.
      grouped_share: the share of a grouped product's rows that belong to one of its groups, on average: below 1 where
        groups are spread over devices and each is given all rows.

    Raises:
      UncountableError: a `while` loop that does products, whose trip count a jaxpr does not tell, or a kernel that the
        formula does not know; its name and place are said.
    """
    return _jaxpr(getattr(jaxpr, "jaxpr", jaxpr), _Formulas(kernel_flops or (lambda *_: None), grouped_share))


def _jaxpr(jaxpr: Any, formulas: _Formulas) -> float:
    return sum(_equation(equation, formulas) for equation in jaxpr.eqns)


def _equation(equation: Any, formulas: _Formulas) -> float:
    name, params = equation.primitive.name, equation.params
    if name in PRODUCTS:
        return PRODUCTS[name](equation)
    if name in GROUPED:
        return formulas.grouped_share * _ragged_dot(equation)
    if name == "pallas_call":
        return _kernel(equation, formulas.kernel_flops)
    inside = [_jaxpr(sub, formulas) for sub in _inner(params.values())]
    if name == "scan":
        return params["length"] * inside[0]
    if name == "cond":
        return max(inside)
    if name == "while":
        if any(inside):
            raise UncountableError(
                f"a while loop with matrix products{_place(equation)}: its jaxpr does not tell how often it runs; use "
                "jax.lax.scan, or fori_loop with bounds that are Python numbers and reverse-mode differentiation"
            )
        return 0.0
    if name == "shard_map":
        return _shards(params) * sum(inside)
    return sum(inside)  # jit, remat, custom derivatives: their rules are no jaxprs until they are used


def _inner(values: Iterable[Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _inner(value)
        elif hasattr(getattr(value, "jaxpr", value), "eqns"):
            yield getattr(value, "jaxpr", value)


def _shards(params: Any) -> int:
    """How many devices run the body of a `shard_map`: those over the axes that it is manual in."""
    return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])


def _kernel(equation: Any, kernel_flops: KernelFlops) -> float:
    name = equation.params["name"] or "pallas_call"
    avals = (tuple(v.aval for v in values) for values in (equation.invars, equation.outvars))
    found = kernel_flops(name, *avals)
    if found is None:
        raise UncountableError(f"kernel {name!r}{_place(equation)}: no formula tells its FLOPs; give one by this name")
    return found


def _place(equation: Any) -> str:
    stack = str(equation.source_info.name_stack)
    return f" in {stack}" if stack else ""


def _dot_general(equation: Any) -> float:
    ((contracted, _), _) = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval, equation.outvars[0].aval
    return 2.0 * out.size * math.prod(left.shape[axis] for axis in contracted)


def _convolution(equation: Any) -> float:
    """With every place of the window, those that meet padding too."""
    numbers = equation.params["dimension_numbers"]
    kernel, out = equation.invars[1].aval, equation.outvars[0].aval
    features_out = kernel.shape[numbers.rhs_spec[0]]
    return 2.0 * out.size * kernel.size / features_out / equation.params["batch_group_count"]


def _ragged_dot(equation: Any) -> float:
    """As if every row belonged to one group: tokens x K x N multiply-adds, whichever is contracted or ragged."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    ((contracted, _), _) = numbers.dot_dimension_numbers
    left, out = equation.invars[0].aval, equation.outvars[0].aval
    total = 2.0 * out.size * math.prod(left.shape[axis] for axis in contracted)
    groups = equation.invars[2].aval.shape[-1]
    return total / groups if set(numbers.lhs_ragged_dimensions) & set(contracted) else total


PRODUCTS: dict[str, Callable[[Any], float]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
}
GROUPED = ("ragged_dot_general", "ragged_dot")

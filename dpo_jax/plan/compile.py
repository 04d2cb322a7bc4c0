"""A run's own programs, compiled for devices that are not there: what they hold in memory and what they do."""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax

from dpo_jax.errors import UserError
from dpo_jax.model.placement import Layout, abstract_trained, abstract_whole, axis_rules
from dpo_jax.model.tuning import exact_products
from dpo_jax.parallel.mesh import batch_sharding
from dpo_jax.parallel.tpu import quiet
from dpo_jax.plan.draft import Draft
from dpo_jax.plan.hlo.count import Costs, count_costs
from dpo_jax.plan.kernels import kernel_formula
from dpo_jax.rows.batch import Batch, batch_spec
from dpo_jax.rows.shape import RowShape
from dpo_jax.training.reference import abstract_reference
from dpo_jax.training.setup import abstract_state, eval_step_on, make_models, train_step_on


class TooLargeError(Exception):
    """The compiler refused a program that does not fit the memory."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program; bytes are per device.

    Attributes:
      costs: what it does.
      total_bytes: arguments, results and temporaries together, what is donated once.
      host_bytes: in the host's memory.
      seconds: that compiling took.
    """

    costs: Costs
    total_bytes: float
    host_bytes: float
    seconds: float


def abstract_batch(
    shape: RowShape, layout: Layout, microbatches: int, given: int = 0, *, rewarded: bool = False
) -> Batch[jax.ShapeDtypeStruct]:
    """A batch as `pipeline.StepSource` makes it, by shape and sharding; `given` and `rewarded` as in `batch_spec`."""
    rows = (microbatches, shape.rows // microbatches)
    spec, sharding = batch_spec(shape, rows, given, rewarded=rewarded), batch_sharding(layout.mesh)
    return spec.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding))


def _frozen(draft: Draft) -> tuple[Any, Any, int]:
    """Abstract reference parameters and base, and how many of the reference's values come with the batch."""
    s, layout = draft.settings, draft.layout
    base = abstract_whole(layout, layout.base_dtype) if layout.lora is not None else None
    if not draft.objective.needs_reference:
        return None, base, 0
    if s.reference.cache:
        return None, base, _given(draft)
    if s.reference.moves:
        return abstract_reference(layout), base, 0
    if base is None or s.reference.name:
        return abstract_whole(layout, layout.dtype), base, 0
    # Over a frozen base, only what differs from it: nothing, or the adapters after the SFT phase.
    return abstract_trained(layout, layout.dtype) if s.sft_steps else {}, base, 0


def _given(draft: Draft) -> int:
    """How many values of a reference that was computed before come with the batch."""
    return 2 if draft.settings.objective.ld_alpha != 1 else 1


def held_by(draft: Draft) -> dict[str, float]:
    """Bytes per device of what the run holds all the time: parameters, optimizer, reference (and base)."""
    state = abstract_state(draft.optimizer[0], draft.layout)
    parts = {"parameters": state.params, "optimizer": state.opt_state, "reference": _frozen(draft)[:2]}
    return {name: local_bytes(tree) for name, tree in parts.items()}


def train_step_of(draft: Draft, shape: RowShape) -> tuple[Any, tuple[Any, ...]]:
    """The run's training step, and its abstract arguments for rows of one shape."""
    layout, (tx, rate) = draft.layout, draft.optimizer
    step = train_step_on(layout, make_models(draft.settings, layout), draft.objective, tx, rate)
    reference, base, given = _frozen(draft)
    rewarded = draft.settings.task == "rl"
    batch = abstract_batch(shape, layout, draft.settings.batch.microbatches, given, rewarded=rewarded)
    return step, (abstract_state(tx, layout), reference, batch, shape, base)


def train_program(draft: Draft, shape: RowShape) -> Program:
    """The training step for rows of one shape.

    Raises:
      TooLargeError: it needs more memory than a device has.
      UserError: a part of it needs more of the memory on the chip than there is.
    """
    return _compile("step", *train_step_of(draft, shape), shape, draft.layout)


def eval_program(draft: Draft, shape: RowShape) -> Program:
    """The evaluation for rows of one shape: the policy alone, as the reference's values are known."""
    layout, batch = draft.layout, draft.settings.batch
    step = eval_step_on(layout, make_models(draft.settings, layout)[0], draft.objective)
    reference, base, given = _frozen(draft)
    if draft.objective.needs_reference and not draft.settings.reference.moves:
        reference, given = None, _given(draft)
    arguments = abstract_batch(shape, layout, batch.microbatches, given), shape, base
    params = abstract_trained(layout, layout.param_dtype)
    return _compile("evaluation", step, (params, reference, *arguments), shape, layout)


def _compile(what: str, step: Any, arguments: tuple[Any, ...], shape: RowShape, layout: Layout) -> Program:
    what = f"{what} with rows of [{'|'.join(map(str, shape.widths))}]"
    compiled, seconds = compile_for(layout, what, lambda: step.trace(*arguments))
    formula = kernel_formula(shape, layout.tiling, experts_share(layout))
    return program_of(compiled, count_costs(compiled.as_text(), formula), seconds)


def compile_for(layout: Layout, what: str, trace: Callable[[], Any]) -> tuple[Any, float]:
    """Compile what `trace` traces on the layout's mesh; and how long that took.

    Raises:
      TooLargeError, UserError: as `train_program`; `what` names the program.
    """
    began = time.perf_counter()
    try:
        with jax.set_mesh(layout.mesh), exact_products(layout.dtype, layout.platform), quiet():
            compiled = trace().lower().compile()
    except Exception as e:  # XLA's errors have no class of their own for this
        message = str(e)
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        if on_chip := re.search(r"memory space (?!hbm)(\w+)", message):
            raise UserError(
                f"{what} does not compile: one operation {_needed(message)} of the chip's {on_chip[1]}; "
                "attention=dense has no kernel, and compiler_options may give it more"
            ) from None
        raise TooLargeError(f"{what}: {_needed(message)}") from None
    return compiled, time.perf_counter() - began


def program_of(compiled: Any, costs: Costs, seconds: float) -> Program:
    """A compiled program, by its own analysis of memory."""
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return Program(
        costs=costs,
        total_bytes=total - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes,
        host_bytes=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        seconds=seconds,
    )


def experts_share(layout: Layout) -> float:
    """The share of (token, expert) rows that a device's own experts have, on average; it sorts those of all of them."""
    if not layout.config.num_experts:
        return 1.0
    axis = dict(axis_rules(layout.config, layout.mesh))["experts"]
    return 1 / layout.mesh.shape[axis] if axis else 1.0


def _needed(message: str) -> str:
    """The compiler's own numbers, in one line."""
    for pattern in (r"[Uu]sed ([\d.]+[KMGT]) of ([\d.]+[KMGT])", r"\(([\d.]+[KMGT])\) exceeds .*?\(([\d.]+[KMGT])\)"):
        if numbers := re.search(pattern, message):
            return f"needs {numbers[1]} of {numbers[2]}"
    return message.strip().splitlines()[0][:200]


def local_bytes(tree: Any) -> float:
    """Bytes of abstract arrays in the memory of one device; what is kept in the host's memory does not count."""
    leaves = [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind != "pinned_host"]
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))

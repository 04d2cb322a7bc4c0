"""Plan a run for TPU slices without having one: compile its own programs, and say what they need and could do.

    python -m dpo_jax.plan --config=configs/hhh.py:llama3.1-8b --topology=v6e:2x4,v5p:2x2x4 [--json=FILE] [--search]

Needs the `tpu` extra (the compiler, not a TPU). No weights are read. Exit codes: 0 planned, fitting or not; 2 bad
input.
"""

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from dpo_jax.config.command_line import Command, read_flags
from dpo_jax.config.settings import Settings, read_settings
from dpo_jax.errors import UserError
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.families import config_from_hf
from dpo_jax.model.placement import Layout
from dpo_jax.model.tuning import passes
from dpo_jax.objective.objective import Objective
from dpo_jax.parallel.mesh import make_mesh, row_shards
from dpo_jax.parallel.tpu import Topology, parse_topology
from dpo_jax.plan.bounds import bounds, by_kind
from dpo_jax.plan.compile import Held, Program, TooLargeError, eval_program, held_by, train_program
from dpo_jax.plan.known import MODELS
from dpo_jax.plan.lengths import Lengths, find_lengths
from dpo_jax.plan.search import largest_batch
from dpo_jax.plan.text import lines, search_line, tried_line
from dpo_jax.rows.pipeline import Schedule, make_schedule
from dpo_jax.rows.schedule import RowShape, efficiency
from dpo_jax.training import inputs
from dpo_jax.training.batches import slots_of
from dpo_jax.training.setup import make_layout, make_objective, make_optimizer
from dpo_jax.weights import hub
from dpo_jax.weights import huggingface as weights
from dpo_jax.weights.find import check_reference, find_policy


def _flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("topology", None, "Slices to plan for, v6e:2x4,v5p:2x2x4,v6e:16x16*2.", flag_values=values)
    flags.DEFINE_string("json", "", "File to write everything to.", flag_values=values)
    flags.DEFINE_string("lengths", "", "lengths.npy of prepared pairs, int [n, 3].", flag_values=values)
    flags.DEFINE_bool("search", False, "Look for the largest batch that fits.", flag_values=values)


COMMAND = Command(
    "python -m dpo_jax.plan --config=configs/hhh.py[:PRESET] --topology=v6e:2x4[,...] [--json=FILE] "
    "[--lengths=FILE.npy] [--search] [--config.KEY=VALUE ...]",
    "Compiles the run's step and evaluation for TPU slices on a machine without a TPU. Topologies: v5e:4x8,\n"
    "v5p:2x2x4, v6e:2x4, tpu7x:2x2x1, two slices as v6e:2x4*2, or Cloud's names: v6e-8, v5litepod-16, v5p-16.",
    _flags,
)


@dataclasses.dataclass(frozen=True)
class Draft:
    """A run on a topology, before anything is compiled.

    Attributes:
      settings: of the run.
      topology: where it would run.
      layout: the model on the topology's mesh.
      schedule: every step of an epoch, in rows that it takes.
      steps: updates of the run.
    """

    settings: Settings
    topology: Topology
    layout: Layout
    schedule: Schedule
    steps: int

    @property
    def objective(self) -> Objective:
        return make_objective(self.settings.objective)

    @property
    def optimizer(self) -> tuple[Any, Any]:
        return make_optimizer(self.settings.optimizer, self.steps)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    jax.config.update("jax_platforms", "cpu")
    try:
        config, values = read_flags(sys.argv if argv is None else argv, COMMAND)
        if not values["topology"]:
            raise UserError(f"--topology is missing; usage: {COMMAND.usage}")
        topologies = [parse_topology(name) for name in values["topology"].split(",")]
        file = values["json"]
        s = read_settings(config)
        _check_file(file)
        model, lengths = find_model(s.model, seed=s.seed), find_lengths(s, values["lengths"])
        drafts = [draft(s, model, lengths, topology) for topology in topologies]  # all, before minutes go to compiling
        print(f"{s.model}: {model.parameter_count():,} parameters; {lengths.source}", flush=True)
        reports: list[dict[str, Any]] = []
        for it in drafts:
            reports.append(plan(it, lengths))
            print("\n" + "\n".join(lines(reports[-1])), flush=True)
            whole = {"config": s.whole, "lengths": lengths.source, "topologies": reports}
            _keep(file, whole)
            if values["search"]:
                reports[-1]["largest_batch"] = search(it, model, lengths, reports[-1])
                print(search_line(reports[-1], lengths.pairs), flush=True)
                _keep(file, whole)
    except (UserError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


def _check_file(file: str) -> None:
    path = Path(file).absolute()
    if file and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
        raise UserError(f"--json={file} cannot be written; choose a file in a directory that is there and writable")


def _keep(file: str, whole: Any) -> None:
    if file:
        Path(file).write_text(json.dumps(whole, indent=1) + "\n")


def find_model(name: str, key: str = "model", seed: int = 0) -> ModelConfig:
    """A model's numbers: of a directory, of a published model by name, or of the hub; no weights.

    Args:
      settings: of the run.
      key: where it names the model: `model` or `reference`.

    Raises:
      UserError: there is no such model.
    """
    if name in MODELS and not Path(name).is_dir():
        return config_from_hf(MODELS[name], name)
    if name != "tiny" or key != "model":
        return weights.read_config(hub.resolve_model(name, what=key, with_weights=False))[0]
    with tempfile.TemporaryDirectory() as work:  # as large as the vocabulary that its tokenizer learns
        return find_policy(name, Path(work), seed).config


def draft(s: Settings, model: ModelConfig, lengths: Lengths, topology: Topology) -> Draft:
    """What training would refuse is refused here too.

    Raises:
      UserError: the config does not fit the topology, the model or the pairs, or the compiler is not installed.
    """
    mesh = make_mesh(*s.mesh, topology.devices())
    inputs.check_division(s.batch, row_shards(mesh))
    inputs.check_experts(s, model.num_experts)
    inputs.check_enough(s.batch, len(lengths))
    layout = make_layout(s, model, mesh)
    if s.reference.name:
        check_reference(find_model(s.reference.name, "reference"), layout.config, s.reference.name)
    whole, rest = divmod(lengths.pairs, s.batch.size)
    steps = inputs.run_steps(s, whole if s.batch.order.drop_remainder else whole + bool(rest))
    limits = layout.row_limits(s.batch.microbatches)
    schedule = make_schedule(lengths, s.batch.size, limits, s.batch.order, lengths.mixture)
    return Draft(s, topology, layout, schedule, steps)


def plan(it: Draft, lengths: Lengths) -> dict[str, Any]:
    """Compile for one topology and report; see `plan_text.lines` for what the keys mean."""
    s, topology, layout, schedule = it.settings, it.topology, it.layout, it.schedule
    shapes = shares(schedule)
    report: dict[str, Any] = {
        "topology": topology.name,
        "accelerator_type": topology.accelerator_type,
        "chips": topology.chips,
        "devices_per_chip": topology.generation.devices,
        "mesh": dict(layout.mesh.shape),
        "batch_size": s.batch.size,
        "microbatches": s.batch.microbatches,
        "rows": [
            {
                **dataclasses.asdict(shape),
                "share": share,
                "attention": "splash" if layout.uses_kernel(slots_of(shape)) else "dense",
            }
            for shape, share in shapes.items()
        ],
        "useful_token_fraction": efficiency(schedule.epoch(0), lengths.lengths),
        "compute_dtype": str(layout.dtype),
        "remat": s.remat,
        "hbm_available": topology.generation.hbm_bytes,
    }
    try:
        return report | _measured(it, shapes, lengths)
    except TooLargeError as e:
        held = held_by(s, layout, it.objective, it.optimizer[0])
        return report | {"fits": False, "why": str(e), "memory": dataclasses.asdict(held)}


def _measured(it: Draft, shapes: Mapping[RowShape, float], lengths: Lengths) -> dict[str, Any]:
    s, layout, schedule, topology, objective = it.settings, it.layout, it.schedule, it.topology, it.objective
    main = max(shapes, key=lambda shape: shapes[shape])
    program = train_program(s, layout, objective, it.optimizer, main)
    held = held_by(s, layout, objective, it.optimizer[0])
    widest = max(shapes, key=lambda shape: shape.tokens)
    largest = program if widest == main else train_program(s, layout, objective, it.optimizer, widest)
    evaluation = eval_program(s, layout, objective, main)
    devices = list(layout.mesh.devices.flat)
    train, held_out = (
        bounds(p.costs, topology, devices, passes=passes(layout.dtype, layout.platform)) for p in (program, evaluation)
    )
    inside, between = by_kind(program.costs, devices)
    # The other shapes take time as they have tokens.
    scale = sum(share * shape.tokens for shape, share in shapes.items()) / main.tokens
    seconds = train.step * scale
    speed, evaluation_speed = s.batch.size / seconds, s.batch.size / (held_out.step * scale)
    epochs = s.length.steps * s.batch.size / lengths.pairs if s.length.steps else s.length.epochs
    hours = epochs * lengths.pairs / speed / 3600
    if objective.needs_reference and s.reference.cache:
        hours += min(epochs, 1) * lengths.pairs / evaluation_speed / 3600
    a_token = layout.config.active_parameter_count()
    real = a_token * float(schedule.lengths[schedule.members(0)].sum(1).mean()) * s.batch.size
    needed = operations(s, layout, objective)
    peak = topology.generation.peak_flops * len(devices)
    total, largest_total = program.total_bytes, largest.total_bytes
    flops = (program.costs.flops + program.costs.kernel_flops) * len(devices) * scale
    return {
        "fits": True,
        "memory": _memory(program, held) | {"largest_shape_total": largest_total},
        "headroom": topology.generation.hbm_bytes - max(total, largest_total),
        "evaluation_memory": evaluation.total_bytes,
        "flops": flops,
        "flops_per_8N": flops / (8 * real),
        "needed_per_parameter_and_token": needed,
        "hbm_bytes": program.costs.hbm_bytes * scale,
        "interconnect_bytes": {kind: n * scale for kind, n in inside.items()},
        "network_bytes": {kind: n * scale for kind, n in between.items()},
        "kernels": program.costs.kernels,
        "not_counted": [*program.costs.unknown_kernels, *program.costs.unknown_loops],
        "seconds": {name: s * scale for name, s in dataclasses.asdict(train).items()},
        "binds": train.binding,
        "pairs_per_second": speed,
        "pairs_per_second_per_chip": speed / topology.chips,
        "share_of_peak": {
            "at_the_bound": needed * real / (peak * seconds),
            "if_compute_bound": needed * real / (peak * train.compute * scale),
        },
        "evaluation_pairs_per_second": evaluation_speed,
        "epochs": epochs,
        "hours": hours,
        "compile_seconds": {"train": program.seconds, "evaluation": evaluation.seconds},
    }


def operations(s: Settings, layout: Layout, objective: Objective) -> int:
    """What a step needs at least for each parameter that a token meets.

    The policy's forward pass 2, its backward pass 2 for what flows on and, unless they are frozen, 2 for the
    parameters; the reference's forward pass 2 if the step has one.
    """
    in_step = objective.needs_reference and not s.reference.cache
    return (6 if layout.lora is None else 4) + (2 if in_step else 0)


def _memory(program: Program, held: Held) -> dict[str, float]:
    return dataclasses.asdict(held) | {
        "activations": program.total_bytes - held.parameters - held.optimizer - held.reference,
        "total": program.total_bytes,
        "host": program.host_bytes,
    }


def shares(schedule: Schedule) -> dict[RowShape, float]:
    """The row shapes that an epoch uses, and the share of steps that each has."""
    epoch = schedule.epoch(0)
    used, counts = np.unique(epoch.shape, return_counts=True)
    return {epoch.shapes[i]: float(n) / len(epoch) for i, n in zip(used, counts, strict=True)}


def search(it: Draft, model: ModelConfig, lengths: Lengths, first: Mapping[str, Any]) -> int:
    """The largest batch that fits, in steps of what rows divide by, up to all pairs of an epoch; 0 if none does.

    Args:
      it, first: what was planned, and its report.
      model, lengths: what it was planned for.
    """

    def need(batch: int) -> float | None:
        if batch == it.settings.batch.size:
            return first["memory"]["largest_shape_total"] if first["fits"] else None
        s = it.settings.with_batch_size(batch)
        other = draft(s, model, find_lengths(s) if lengths.drawn else lengths, it.topology)
        widest = max(shares(other.schedule), key=lambda shape: shape.tokens)
        try:
            found = train_program(other.settings, other.layout, other.objective, other.optimizer, widest).total_bytes
        except TooLargeError:
            found = None
        # As a plan's headroom: parts that are never alive together make the sum more than what the compiler needs.
        found = None if found is None or found > room else found
        print(tried_line(batch, found), flush=True)
        return found

    room, unit = it.topology.generation.hbm_bytes, row_shards(it.layout.mesh) * it.settings.batch.microbatches
    return largest_batch(need, it.settings.batch.size, unit, lengths.pairs, room)

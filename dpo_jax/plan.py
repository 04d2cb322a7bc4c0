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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from dpo_jax import inputs, policy
from dpo_jax.architecture import ModelConfig, config_from_hf
from dpo_jax.bounds import bounds, by_kind
from dpo_jax.compile_only import Held, Program, TooLargeError, eval_program, held_by, train_program
from dpo_jax.config import Command, check, read_flags
from dpo_jax.data.packing import Order, RowShape, efficiency
from dpo_jax.data.pipeline import Schedule, make_schedule
from dpo_jax.errors import UserError
from dpo_jax.known import LENGTHS, MODELS, draw_lengths
from dpo_jax.phases import Config, lay_out, make_objective, transformation
from dpo_jax.policy import Layout
from dpo_jax.sharding import make_mesh, row_shards
from dpo_jax.tpu import GIB, Topology, parse_topology

DRAWN_PAIRS = 20_480  # of a dataset that is known by its quantiles only; enough for the plan of row shapes


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
class Lengths:
    """Token lengths of the training pairs.

    Attributes:
      lengths: int `[n, 3]`: prompt, chosen, rejected.
      pairs: how many pairs an epoch has; more than `lengths` where those are a sample.
      source: where they come from, in words.
    """

    lengths: np.ndarray
    pairs: int
    source: str

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        raise AssertionError("a plan reads no tokens")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    # Compiling only: no TPU is looked for, and other programs on this machine may do the same.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    jax.config.update("jax_platforms", "cpu")
    try:
        config, values = read_flags(sys.argv if argv is None else argv, COMMAND)
        if not values["topology"]:
            raise UserError(f"--topology is missing; usage: {COMMAND.usage}")
        topologies = [parse_topology(name) for name in values["topology"].split(",")]
        c = dict(config)
        check(c)
        model, lengths = find_model(c), find_lengths(c, values["lengths"])
        print(f"{c['model']}: {model.parameter_count():,} parameters; {lengths.source}", flush=True)
        reports = []
        for topology in topologies:
            report = plan(c, model, lengths, topology)
            if values["search"]:
                report["largest_batch"] = largest_batch(c, model, lengths, topology, report)
            reports.append(report)
            print("\n" + "\n".join(lines(report)), flush=True)
        if values["json"]:
            whole = {"config": c, "lengths": lengths.source, "topologies": reports}
            Path(values["json"]).write_text(json.dumps(whole, indent=1) + "\n")
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"error: --json={values['json']} cannot be written ({e.strerror})", file=sys.stderr)
        return 2
    return 0


def find_model(c: Config) -> ModelConfig:
    """The model's numbers: of a directory, of a published model by name, or of the hub; no weights.

    Raises:
      UserError: there is no such model.
    """
    if c["model"] in MODELS and not Path(c["model"]).is_dir():
        return config_from_hf(MODELS[c["model"]], c["model"])
    with tempfile.TemporaryDirectory() as work:
        return policy.find(c["model"], Path(work), c["seed"], with_weights=False).config


def find_lengths(c: Config, file: str) -> Lengths:
    """Lengths of the training pairs: of a file, of data on this machine, or as published data has them.

    Raises:
      UserError: nothing tells them.
    """
    if file:
        return _read_lengths(file)
    dataset = c["dataset"].split("/")[0]
    if not c["dataset_path"] and dataset in LENGTHS:
        limits = (c["max_prompt_length"], c["max_completion_length"])
        pairs = LENGTHS[dataset][0]
        drawn = draw_lengths(dataset, limits, min(pairs, DRAWN_PAIRS), c["seed"])
        means = " + ".join(f"{mean:.0f}" for mean in drawn.mean(0))
        return Lengths(drawn, pairs, f"{pairs:,} pairs of {dataset} with lengths as published ({means} tokens)")
    with tempfile.TemporaryDirectory() as work:
        found = policy.find(c["model"], Path(work), c["seed"], with_weights=False)
        data = inputs.prepare_pairs(c, found.tokenizer, Path(work), None)
        lengths = np.asarray(data.train.lengths)
    return Lengths(lengths, len(lengths), f"{len(lengths):,} pairs of {c['dataset']} by the model's tokenizer")


def _read_lengths(file: str) -> Lengths:
    try:
        lengths = np.load(file)
    except (OSError, ValueError) as e:
        raise UserError(f"--lengths={file} cannot be read ({e}); give the lengths.npy of a cache") from None
    if lengths.ndim != 2 or lengths.shape[1] != 3 or lengths.dtype.kind not in "iu" or len(lengths) == 0:
        raise UserError(f"--lengths={file} holds {lengths.dtype} {lengths.shape}; needed are integers [pairs, 3]")
    return Lengths(lengths, len(lengths), f"{len(lengths):,} pairs of {file}")


def plan(c: Config, model: ModelConfig, lengths: Lengths, topology: Topology) -> dict[str, Any]:
    """Compile for one topology and report; see `lines` for what the keys mean."""
    layout, schedule = _planned(c, model, lengths, topology)
    mesh, shapes = layout.mesh, shares(schedule)
    report: dict[str, Any] = {
        "topology": topology.name,
        "accelerator_type": topology.accelerator_type,
        "chips": topology.chips,
        "mesh": dict(mesh.shape),
        "batch_size": c["batch_size"],
        "microbatches": c["microbatches"],
        "rows": [{**dataclasses.asdict(s), "share": share} for s, share in shapes.items()],
        "useful_token_fraction": efficiency(schedule.epoch(0), lengths.lengths),
        "compute_dtype": str(layout.dtype),
        "remat": c["remat"],
        "attention": "splash" if layout.tiling is not None else "dense",
        "hbm_available": topology.generation.hbm_bytes,
    }
    try:
        return report | _measured(c, layout, schedule, topology, shapes, lengths)
    except TooLargeError as e:
        return report | _too_large(c, layout, str(e))


def _planned(c: Config, model: ModelConfig, lengths: Lengths, topology: Topology) -> tuple[Layout, Schedule]:
    """The model on the topology's mesh, and every step of an epoch in rows that it takes."""
    mesh = make_mesh(c["mesh_data"], c["mesh_fsdp"], c["mesh_tensor"], topology.devices())
    inputs.check_division(c["batch_size"], row_shards(mesh), c["microbatches"])
    layout = lay_out(c, model, mesh)
    order = Order(c["seed"], c["shuffle"], c["drop_remainder"])
    return layout, make_schedule(lengths, c["batch_size"], policy.row_limits(layout, c["microbatches"]), order)


def _measured(
    c: Config,
    layout: Layout,
    schedule: Schedule,
    topology: Topology,
    shapes: Mapping[RowShape, float],
    lengths: Lengths,
) -> dict[str, Any]:
    objective = make_objective(c)
    tx = transformation(c, c["learning_rate"], c["lr_schedule"], max(1, schedule.steps_per_epoch))
    main = max(shapes, key=lambda s: shapes[s])
    program, held = train_program(c, layout, objective, tx, main), held_by(c, layout, objective, tx[0])
    widest = max(shapes, key=lambda s: s.tokens)
    largest = program if widest == main else train_program(c, layout, objective, tx, widest)
    evaluation = eval_program(c, layout, objective, main)
    devices = list(layout.mesh.devices.flat)
    train, held_out = bounds(program.costs, topology, devices), bounds(evaluation.costs, topology, devices)
    # The other shapes take time as they have tokens.
    scale = sum(share * shape.tokens for shape, share in shapes.items()) / main.tokens
    seconds = train.step * scale
    speed = c["batch_size"] / seconds
    real = float(lengths.lengths.sum(1).mean()) * c["batch_size"]
    epochs = c["num_steps"] * c["batch_size"] / lengths.pairs if c["num_steps"] else c["num_epochs"]
    useful = 8 * layout.config.parameter_count() * real
    peak = topology.generation.peak_flops * len(devices)
    flops = (program.costs.flops + program.costs.kernel_flops) * len(devices) * scale
    return {
        "fits": True,
        "memory": _memory(program, held) | {"largest_shape_total": largest.total_bytes},
        "evaluation_memory": evaluation.total_bytes,
        "flops": flops,
        "flops_traced": program.asked_flops * scale,
        "flops_per_8N": flops / useful,
        "hbm_bytes": program.costs.hbm_bytes * scale,
        "interconnect_bytes": {kind: n * scale for kind, n in by_kind(program.costs).items()},
        "kernels": program.costs.kernels,
        "not_counted": [*program.costs.unknown_kernels, *program.costs.unknown_loops],
        "seconds": {name: s * scale for name, s in dataclasses.asdict(train).items()},
        "binds": train.binding,
        "pairs_per_second": speed,
        "pairs_per_second_per_chip": speed / topology.chips,
        "share_of_peak": {
            "at_the_bound": useful / (peak * seconds),
            "if_compute_bound": useful / (peak * train.compute * scale),
        },
        "evaluation_pairs_per_second": c["batch_size"] / held_out.step,
        "epochs": epochs,
        "hours": epochs * lengths.pairs / speed / 3600,
        "compile_seconds": {"train": program.seconds, "evaluation": evaluation.seconds},
    }


def _memory(program: Program, held: Held) -> dict[str, float]:
    return dataclasses.asdict(held) | {
        "activations": program.total_bytes - held.parameters - held.optimizer - held.reference,
        "total": program.total_bytes,
        "host": program.host_bytes,
    }


def _too_large(c: Config, layout: Layout, words: str) -> dict[str, Any]:
    """What is known of a program that the compiler refused."""
    tx, _ = transformation(c, c["learning_rate"], c["lr_schedule"], 1)
    return {"fits": False, "why": words, "memory": dataclasses.asdict(held_by(c, layout, make_objective(c), tx))}


def shares(schedule: Schedule) -> dict[RowShape, float]:
    """The row shapes that an epoch uses, and the share of steps that each has."""
    epoch = schedule.epoch(0)
    used, counts = np.unique(epoch.shape, return_counts=True)
    return {epoch.shapes[i]: float(n) / len(epoch) for i, n in zip(used, counts, strict=True)}


def largest_batch(c: Config, model: ModelConfig, lengths: Lengths, topology: Topology, first: Mapping[str, Any]) -> int:
    """The largest batch that fits, in steps of what rows divide by; 0 if none does.

    Memory grows by the pair evenly, so a few compiles tell it: what two batches need gives the next one to try.
    """
    unit = first["mesh"]["data"] * first["mesh"]["fsdp"] * c["microbatches"]
    room = topology.generation.hbm_bytes

    def need(batch: int) -> float | None:
        if batch == c["batch_size"]:
            return first["memory"]["largest_shape_total"] if first["fits"] else None
        asked = {**c, "batch_size": batch}
        layout, schedule = _planned(asked, model, lengths, topology)
        widest = max(shares(schedule), key=lambda s: s.tokens)
        tx = transformation(asked, c["learning_rate"], c["lr_schedule"], 1)
        try:
            return train_program(asked, layout, make_objective(asked), tx, widest).total_bytes
        except TooLargeError:
            return None

    fitting, too_large = _bracket(need, c["batch_size"], unit, lengths.pairs)
    for _ in range(4):
        known = sorted(fitting)
        if not known or too_large - known[-1] <= unit:
            break
        if len(known) > 1:
            slope = (fitting[known[-1]] - fitting[known[-2]]) / (known[-1] - known[-2])
            guess = known[-1] + (room - fitting[known[-1]]) / max(slope, 1.0)
        else:
            guess = (known[-1] + too_large) / 2
        guess = int(min(max(guess, known[-1] + unit), too_large - unit) // unit * unit)
        found = need(guess)
        if found is None:
            too_large = guess
        else:
            fitting[guess] = found
    return max(fitting, default=0)


def _bracket(need: Callable[[int], float | None], start: int, unit: int, most: int) -> tuple[dict[int, float], int]:
    """Batches that fit with what they need, and the smallest known one that does not (or there are no more pairs)."""
    fitting: dict[int, float] = {}
    batch, limit = start, most // unit * unit + unit
    while batch >= unit:
        found = need(batch)
        if found is not None:
            fitting[batch] = found
            break
        limit, batch = batch, batch // 2 // unit * unit
    while fitting and len(fitting) < 3 and 2 * max(fitting) < limit:
        batch = 2 * max(fitting)
        found = need(batch)
        if found is None:
            limit = batch
            break
        fitting[batch] = found
    return fitting, limit


def lines(r: Mapping[str, Any]) -> list[str]:
    """A report as text."""
    mesh = " x ".join(f"{name} {size}" for name, size in r["mesh"].items())
    rows = "; ".join(
        f"{s['rows']} x [{s['prompt']}|{s['chosen']}|{s['rejected']}] ({s['share']:.0%} of steps)" for s in r["rows"]
    )
    memory = {name: size / GIB for name, size in r["memory"].items()}
    available = r["hbm_available"] / GIB
    held = ", ".join(f"{name} {memory[name]:.2f}" for name in ("parameters", "optimizer", "reference"))
    head = f"{r['topology']} ({r['accelerator_type']}, {r['chips']} chips, {mesh})"
    said = [
        f"{head}: {'fits' if r['fits'] else 'DOES NOT FIT'}",
        f"  rows          {rows}; {r['batch_size']} pairs, {r['useful_token_fraction']:.1%} of tokens real",
    ]
    if not r["fits"]:
        largest = max(("parameters", "optimizer", "reference"), key=lambda name: memory[name])
        alone = "more than there is before any activation" if sum(memory.values()) > available else "with activations"
        return [
            *said,
            f"  too large     {r['why']} ({alone})",
            f"  held          {held} GiB a chip of {available:.2f}; {largest} most",
            "  to mend       more chips, remat=full, microbatches, optimizer_offload, reference_offload, lora_rank",
            *_largest(r),
        ]
    seconds, share = r["seconds"], r["share_of_peak"]
    moved = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in sorted(r["interconnect_bytes"].items()))
    used = max(memory["total"], memory["largest_shape_total"])
    clocks = ", ".join(f"{name} {s:.3f} s" for name, s in seconds.items() if s)
    compiled = r["compile_seconds"]
    said += [
        f"  HBM a chip    {held}, activations {memory['activations']:.2f}, total {memory['total']:.2f} (widest rows "
        f"{memory['largest_shape_total']:.2f}) of {available:.2f} GiB, headroom {available - used:.2f}"
        + (f"; host {memory['host']:.2f}" if memory["host"] else ""),
        f"  FLOPs a step  {r['flops']:.3e} ({r['flops_traced']:.3e} in the traced program), {r['flops_per_8N']:.2f}x "
        f"of 8N a real token; remat {r['remat']}, attention {r['attention']}",
        f"  bytes a chip  HBM {r['hbm_bytes'] / 1e9:.1f} GB; interconnect, received: {moved or 'none'} GB",
        f"  time bounds   {clocks}; {r['binds']} binds",
        f"  at the bound  {r['pairs_per_second']:.1f} pairs/s ({r['pairs_per_second_per_chip']:.2f} a chip), "
        f"{share['at_the_bound']:.0%} of peak at 8N a real token ({share['if_compute_bound']:.0%} if compute bound it)",
        f"  run           {r['epochs']:g} epochs in {r['hours']:.2f} h at the bound; evaluation "
        f"{r['evaluation_pairs_per_second']:.0f} pairs/s",
        f"  compiled in   {compiled['train']:.0f} s (step), {compiled['evaluation']:.0f} s (evaluation)",
    ]
    if r["not_counted"]:
        said.append(f"  not counted   {', '.join(r['not_counted'])}: FLOPs and times above are too low")
    return [*said, *_largest(r)]


def _largest(r: Mapping[str, Any]) -> list[str]:
    return [f"  largest batch {r['largest_batch']} pairs fit"] if "largest_batch" in r else []


if __name__ == "__main__":
    sys.exit(main())

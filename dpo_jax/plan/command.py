"""Plan a run for TPU slices without having one: compile its own programs, print what they need and could do.

    python -m dpo_jax.plan --config=configs/hhh.py:llama3.1-8b --topology=v6e:2x4,v5p:2x2x4 [--json=FILE] [--search]
    python -m dpo_jax.plan --sample --config=configs/hhh.py:llama3.1-8b --topology=v6e:2x4 [--sample_rows=256]

Needs the `tpu` extra (the compiler, not a TPU). No weights are read. Exit codes: 0 planned, fitting or not; 2 bad
input; 74 the disk is full, or takes no file; 130 interrupted.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from dpo_jax.config.command_line import Command, read_flags
from dpo_jax.config.settings import Settings, read_settings
from dpo_jax.config.stages import has_stages, planned, read_stages
from dpo_jax.disk import write_json
from dpo_jax.entry import EntryPoint, run_entry_point
from dpo_jax.errors import UserError
from dpo_jax.parallel.tpu import Topology, parse_topology
from dpo_jax.plan.lengths import find_lengths
from dpo_jax.plan.request import read_request
from dpo_jax.plan.text import iteration_lines, report_lines, rows_line, sampling_lines, search_line

Keep = Callable[[Mapping[str, Any]], None]  # writes everything to the file that was asked for


def _flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("topology", None, "Slices to plan for, v6e:2x4,v5p:2x2x4,v6e:16x16*2.", flag_values=values)
    flags.DEFINE_string("json", "", "File to write everything to.", flag_values=values)
    flags.DEFINE_string("lengths", "", "lengths.npy of prepared pairs, int [n, 3].", flag_values=values)
    flags.DEFINE_bool("search", False, "Look for the largest batch that fits.", flag_values=values)
    flags.DEFINE_bool("sample", False, "Plan the sampler: its own programs.", flag_values=values)
    flags.DEFINE_integer("sample_rows", 0, "Answers at once on all devices; 0: what suits them.", flag_values=values)
    flags.DEFINE_integer("sample_n", 8, "Answers to a prompt.", flag_values=values)
    flags.DEFINE_integer("sample_prompt", 256, "Tokens of a prompt.", flag_values=values)
    flags.DEFINE_integer("sample_tokens", 256, "Tokens of an answer.", flag_values=values)
    flags.DEFINE_string("sample_params", "export", "export, or training: as a run has them.", flag_values=values)
    flags.DEFINE_string("cache_dtype", "", "int8; empty: the compute dtype.", flag_values=values)


COMMAND = Command(
    "python -m dpo_jax.plan --config=configs/hhh.py[:PRESET] --topology=v6e:2x4[,...] [--json=FILE] "
    "[--lengths=FILE.npy] [--search] [--sample ...] [--config.KEY=VALUE ...]",
    "Compiles the run's step and evaluation for TPU slices on a machine without a TPU; with --sample those that draw\n"
    "answers: [--sample_rows=N (0: what suits)] [--sample_n=8] [--sample_prompt=256] [--sample_tokens=256]\n"
    "[--sample_params=export|training] [--cache_dtype=int8]. Topologies: v5e:4x8, v5p:2x2x4, v6e:2x4, tpu7x:2x2x1,\n"
    "two slices as v6e:2x4*2, or Cloud's names: v6e-8, v5litepod-16, v5p-16.",
    _flags,
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = sys.argv if argv is None else argv

    def plan(entry: EntryPoint) -> None:
        entry.afterwards = "the same command begins anew"
        _run(given)

    return run_entry_point(plan)


def _run(argv: Sequence[str]) -> None:
    config, values = read_flags(argv, COMMAND)
    if not values["topology"]:
        raise UserError(f"--topology is missing; usage: {COMMAND.usage}")
    topologies = [parse_topology(name) for name in values["topology"].split(",")]
    file = Path(values["json"]) if values["json"] else None
    if file and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
        raise UserError(f"--json={file} cannot be written; choose a file in a directory that is there and writable")
    keep = lambda whole: write_json(file, whole) if file else None
    if has_stages(config):
        if values["sample"] or values["lengths"]:
            raise UserError("--sample and --lengths are of one run; plan a stage by its own config")
        _plan_stages(config, topologies, values, keep)
        return
    plan = _plan_sampling if values["sample"] else _plan_training
    plan(read_settings(config), topologies, values, keep)


def _plan_stages(config: Mapping[str, Any], topologies: list[Topology], values: Mapping[str, Any], keep: Keep) -> None:
    """Each stage of RLHF; those that train what an earlier one made have its model's size."""
    whole: dict[str, Any] = {}
    for stage in read_stages(config, Path("DIR")):
        print(f"stage {stage.name}", flush=True)

        def kept(part: Mapping[str, Any], name: str = stage.name) -> None:
            whole[name] = part
            keep(whole)

        _plan_training(read_settings(planned(stage, config)), topologies, values, kept)
        print(flush=True)


def _plan_training(s: Settings, topologies: list[Topology], values: Mapping[str, Any], keep: Keep) -> None:
    lengths = find_lengths(s, values["lengths"])

    import jax  # takes seconds, as what follows does: the command line is right before it is imported

    from dpo_jax.plan.draft import find_model, make_draft
    from dpo_jax.plan.estimate import estimate
    from dpo_jax.plan.iteration import estimate_iteration
    from dpo_jax.plan.search import search_batches

    jax.config.update("jax_platforms", "cpu")
    model = find_model(s.model, seed=s.seed, revision=s.revision)
    model = dataclasses.replace(model, scalar_head=s.task == "reward")
    drafts = [make_draft(s, model, lengths, topology) for topology in topologies]  # before minutes of compiling
    print(f"{s.model}: {model.parameter_count():,} parameters; {lengths.source}", flush=True)
    reports: list[dict[str, Any]] = []
    whole = {"config": s.whole, "lengths": lengths.source, "topologies": reports}
    for draft in drafts:
        reports.append(estimate(draft, lengths))
        print("\n" + "\n".join(report_lines(reports[-1])), flush=True)
        keep(whole)
        if iteration := estimate_iteration(s, model, draft, lengths, reports[-1]):
            reports[-1][iteration["name"]] = iteration
            print("\n".join(iteration_lines(iteration)), flush=True)
            keep(whole)
        if values["search"]:
            reports[-1]["largest_batch"] = search_batches(draft, model, lengths, reports[-1])
            print(search_line(reports[-1], lengths.pairs), flush=True)
            keep(whole)


def _plan_sampling(s: Settings, topologies: list[Topology], values: Mapping[str, Any], keep: Keep) -> None:
    request = read_request(values)
    if not s.trains_policy:
        raise UserError(f"--sample: task={s.task} is of a model that draws no answers; leave one of them out")

    import jax  # as above

    from dpo_jax.plan.draft import find_model
    from dpo_jax.plan.sampling import draft_sampling, estimate_sampling, other_mesh, search_rows

    jax.config.update("jax_platforms", "cpu")
    model = find_model(s.model, seed=s.seed, revision=s.revision)
    drafts = [draft_sampling(s, model, topology, request) for topology in topologies]
    print(f"{s.model}: {model.parameter_count():,} parameters; answers to prompts", flush=True)
    reports: list[dict[str, Any]] = []
    whole = {"config": s.whole, "request": dataclasses.asdict(request), "topologies": reports}
    for draft in drafts:
        report = estimate_sampling(draft)
        if report.get("binds") == "interconnect":
            report["other_mesh"] = other_mesh(s, model, draft)
        reports.append(report)
        print("\n" + "\n".join(sampling_lines(report)), flush=True)
        keep(whole)
        if values["search"]:
            tried = lambda rows, said: print(f"  tried         {rows} rows: {said}", flush=True)
            report["largest_rows"] = search_rows(draft, tried) * draft.programs.shards
            print(rows_line(report), flush=True)
            keep(whole)

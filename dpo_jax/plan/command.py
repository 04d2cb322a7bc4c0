"""Plan a run for TPU slices without having one: compile its own programs, print what they need and could do.

    python -m dpo_jax.plan --config=configs/hhh.py:llama3.1-8b --topology=v6e:2x4,v5p:2x2x4 [--json=FILE] [--search]

Needs the `tpu` extra (the compiler, not a TPU). No weights are read. Exit codes: 0 planned, fitting or not; 2 bad
input.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from dpo_jax.config.command_line import Command, read_flags
from dpo_jax.config.settings import read_settings
from dpo_jax.disk import write_json
from dpo_jax.errors import UserError
from dpo_jax.parallel.tpu import parse_topology
from dpo_jax.plan.lengths import find_lengths
from dpo_jax.plan.text import report_lines, search_line


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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        config, values = read_flags(sys.argv if argv is None else argv, COMMAND)
        if not values["topology"]:
            raise UserError(f"--topology is missing; usage: {COMMAND.usage}")
        topologies = [parse_topology(name) for name in values["topology"].split(",")]
        file = Path(values["json"]) if values["json"] else None
        if file and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
            raise UserError(f"--json={file} cannot be written; choose a file in a directory that is there and writable")
        s = read_settings(config)
        lengths = find_lengths(s, values["lengths"])

        import jax  # takes seconds, as what follows does: the command line is right before it is imported

        from dpo_jax.plan.draft import find_model, make_draft
        from dpo_jax.plan.estimate import estimate
        from dpo_jax.plan.search import search_batches

        jax.config.update("jax_platforms", "cpu")
        model = find_model(s.model, seed=s.seed, revision=s.revision)
        drafts = [make_draft(s, model, lengths, topology) for topology in topologies]  # before minutes of compiling
        print(f"{s.model}: {model.parameter_count():,} parameters; {lengths.source}", flush=True)
        reports: list[dict[str, Any]] = []
        whole = {"config": s.whole, "lengths": lengths.source, "topologies": reports}
        for draft in drafts:
            reports.append(estimate(draft, lengths))
            print("\n" + "\n".join(report_lines(reports[-1])), flush=True)
            if file:
                write_json(file, whole)
            if values["search"]:
                reports[-1]["largest_batch"] = search_batches(draft, model, lengths, reports[-1])
                print(search_line(reports[-1], lengths.pairs), flush=True)
                if file:
                    write_json(file, whole)
    except (UserError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0

"""FLOPs and HBM a pair on TPU, by compilation: pair rows, and the same model with padded rows of one sequence each.

    python -m benchmarks.tpu [--config configs/hhh.py:llama3.1-8b] [--topology v6e:2x4,v5p:2x2x2] [--remat dots,full]
        [--pairs 64] [--padded-pairs 16] [--json FILE]

Needs the `tpu` extra, no TPU. Both are this project's own step on the same mesh with the same optimiser; the padded one
has rows [prompt 512 | completion 512], two a pair, each with a copy of the prompt, as trainers without packing and
sharing lay batches out. (Its rows hold half a pair, so what it computes means nothing; what it costs does.)
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax

from benchmarks import tables
from dpo_jax.config.command_line import read_flags
from dpo_jax.config.settings import Settings, read_settings
from dpo_jax.errors import UserError
from dpo_jax.parallel.tpu import GIB, Topology, parse_topology
from dpo_jax.plan.command import COMMAND
from dpo_jax.plan.compile import TooLargeError, train_program
from dpo_jax.plan.draft import find_model, make_draft
from dpo_jax.plan.lengths import find_lengths
from dpo_jax.rows.shape import RowShape

LAYOUTS = ("pair rows", "padded 512+512, prompt twice")


def measure(s: Settings, topology: Topology, layout_name: str) -> dict[str, Any]:
    """One compiled step; `error` in place of what it costs where it does not fit.

    Args:
      s: of the run, its batch size and `remat` those to compile with.
      topology: the slice.
      layout_name: one of `LAYOUTS`.
    """
    model, lengths, pairs = find_model(s.model), find_lengths(s), s.batch.size
    draft = make_draft(s, model, lengths, topology)
    shape = draft.main_shape if layout_name == LAYOUTS[0] else RowShape(512, (512, 0), 2 * pairs)
    row = {"topology": f"{topology.name} ({topology.accelerator_type})", "layout": layout_name, "remat": s.remat}
    row |= {"pairs": pairs}
    try:
        program = train_program(draft, shape)
    except TooLargeError as e:
        return row | {"error": str(e)}
    flops = (program.costs.flops + program.costs.kernel_flops) * draft.layout.mesh.size / pairs
    return row | {
        "flops": flops,
        "of_8n": flops / (8 * model.active_parameter_count() * lengths.lengths.sum(1).mean()),
        "hbm_bytes": program.costs.hbm_bytes * draft.layout.mesh.size / pairs,
        "gib": program.total_bytes / GIB,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/hhh.py:llama3.1-8b")
    parser.add_argument("--topology", default="v6e:2x4,v5p:2x2x2", help="slices, as plan's")
    parser.add_argument("--remat", default="dots,full", help="policies")
    parser.add_argument("--pairs", type=int, default=64, help="pairs a step in pair rows")
    parser.add_argument("--padded-pairs", type=int, default=16, help="pairs a step in padded rows")
    parser.add_argument("--json", type=Path, help="where the rows go too")
    a = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    rows = []
    try:
        config, _ = read_flags(["tpu", f"--config={a.config}"], COMMAND)
        for topology in (parse_topology(name) for name in a.topology.split(",")):
            for remat in a.remat.split(","):
                for name, pairs in zip(LAYOUTS, (a.pairs, a.padded_pairs), strict=True):
                    s = read_settings(dict(config) | {"remat": remat, "batch_size": pairs})
                    rows.append(measure(s, topology, name) | {"config": a.config})
                    print(tables.tpu_line(rows[-1]), flush=True)
    except UserError as e:
        parser.error(str(e))
    print(f"\n{tables.tpu({'tpu': rows})}")
    if a.json:
        a.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

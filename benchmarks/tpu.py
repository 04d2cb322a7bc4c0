"""FLOPs and HBM a pair on TPU, by compilation: pair rows, and the same model with padded rows of one sequence each.

    python benchmarks/tpu.py [--config configs/hhh.py:llama3.1-8b] [--topology v6e:2x4] [--pairs 64] [--padded-pairs 16]

Needs the `tpu` extra, no TPU. Both are this project's own step on the same mesh with the same optimiser; the padded one
has rows [prompt 512 | completion 512], two a pair, each with a copy of the prompt, as trainers without packing and
sharing lay batches out. (Its rows hold half a pair, so what it computes means nothing; what it costs does.)
"""

import argparse
import os
import sys
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/hhh.py:llama3.1-8b")
    parser.add_argument("--topology", default="v6e:2x4")
    parser.add_argument("--pairs", type=int, default=64, help="pairs a step in pair rows")
    parser.add_argument("--padded-pairs", type=int, default=16, help="pairs a step in padded rows")
    parser.add_argument("--remat", default="dots,full", help="policies, one table row each")
    a = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    jax.config.update("jax_platforms", "cpu")
    from dpo_jax import plan, policy
    from dpo_jax.compile_only import TooLargeError, train_program
    from dpo_jax.config import read_flags
    from dpo_jax.data.packing import Order, RowShape
    from dpo_jax.data.pipeline import make_schedule
    from dpo_jax.phases import lay_out, make_objective, transformation
    from dpo_jax.sharding import make_mesh
    from dpo_jax.tpu import GIB, parse_topology

    config, _ = read_flags(["tpu", f"--config={a.config}"], plan.COMMAND)
    topology = parse_topology(a.topology)
    devices = topology.devices()
    print(f"{a.config} on {topology.name}, by compilation\n")
    print(f"{'layout':34} {'pairs':>5} {'TFLOP/pair':>10} {'of 8N':>6} {'GiB/chip':>9}")
    for remat in a.remat.split(","):
        for name, pairs in (("pair rows", a.pairs), ("padded 512+512, prompt twice", a.padded_pairs)):
            c = dict(config) | {"remat": remat, "batch_size": pairs}
            model, lengths = plan.find_model(c), plan.find_lengths(c, "")
            mesh = make_mesh(c["mesh_data"], c["mesh_fsdp"], c["mesh_tensor"], devices)
            layout = lay_out(c, model, mesh)
            schedule = make_schedule(lengths, pairs, policy.row_limits(layout, c["microbatches"]), Order())
            shapes = plan.shares(schedule)
            shape = max(shapes, key=lambda s: shapes[s]) if name == "pair rows" else RowShape(2 * pairs, 512, 512, 0, 1)
            needed = 8 * model.parameter_count() * lengths.lengths.sum(1).mean()
            tx = transformation(c, c["learning_rate"], c["lr_schedule"], 10)
            try:
                program = train_program(c, layout, make_objective(c), tx, shape)
            except TooLargeError as e:
                print(f"{name + ', remat ' + remat:34} {pairs:5} does not fit: {e}", flush=True)
                continue
            flops = (program.costs.flops + program.costs.kernel_flops) * len(devices) / pairs
            print(
                f"{name + ', remat ' + remat:34} {pairs:5} {flops / 1e12:10.1f} {flops / needed:5.2f}x "
                f"{program.total_bytes / GIB:9.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

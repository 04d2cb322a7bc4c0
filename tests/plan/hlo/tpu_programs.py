"""Compiles programs for TPUs that are not there: `python -m tests.plan.hlo.tpu_programs TOPOLOGY DIRECTORY [NAME ...]`.

Writes for each NAME.txt, the optimized HLO, and NAME.json: XLA's own `flops` and `bytes accessed`, and the FLOPs of its
jaxpr. A process of its own, as libtpu puts handlers on signals.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

from tests.processes import of_a_user

ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
LAYERS, WIDTH, TOKENS = 5, 2048, 8192


def compile_all(topology: str, directory: Path, names: tuple[str, ...] = ()) -> dict[str, tuple[str, dict]]:
    """Compile in a process of its own; returns (HLO, what is in the JSON) by name."""
    command = [sys.executable, "-m", "tests.plan.hlo.tpu_programs", topology, str(directory), *names]
    done = subprocess.run(command, env=of_a_user() | ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return {p.stem: (p.read_text(), json.loads(p.with_suffix(".json").read_text())) for p in directory.glob("*.txt")}


def _programs(mesh):
    """Name → (function, abstract arguments), all over a mesh of one axis `x`."""
    import jax
    import jax.numpy as jnp
    from jax import P

    from dpo_jax.model.experts import Grouped, _product

    def array(*dims, spec=(), dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=jax.NamedSharding(mesh, P(*spec)))

    def layers(w, x, keep=lambda body: body):
        return jax.lax.scan(keep(lambda x, w: (jnp.tanh(x @ w), None)), x, w)[0].astype(jnp.float32).sum()

    def attention(q, k, v):
        probs = jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", q, k), axis=-1)
        return jnp.einsum("bhqk,bkhe->bqhe", probs, v)

    def experts(x, w, sizes):
        return jnp.sin(_product(x, w, sizes, Grouped()).astype(jnp.float32)).sum()

    def gradient(**options):
        spread = jax.NamedSharding(mesh, P(None, "x"))
        return lambda w, x: jax.lax.with_sharding_constraint(jax.grad(layers)(w, x, **options), spread)

    recomputed = gradient(keep=lambda body: jax.checkpoint(body, prevent_cse=False))
    weights = array(LAYERS, WIDTH, WIDTH, spec=(None, "x"))
    rows = array(TOKENS, WIDTH, spec=("x",))
    heads = array(8, 512, 16, 128, spec=("x",))
    return {
        "matmul": (lambda a, b: a @ b, (array(1024, 2048), array(2048, 512))),
        "scan": (layers, (array(LAYERS, WIDTH, WIDTH), rows)),
        "fsdp": (gradient(), (weights, rows)),
        "remat": (recomputed, (weights, rows)),
        "tensor": (
            lambda x, w, v: jnp.tanh(x @ w) @ v,
            (array(TOKENS, WIDTH), array(WIDTH, 8192, spec=(None, "x")), array(8192, WIDTH, spec=("x",))),
        ),
        "attention": (attention, (heads, heads, heads)),
        "ragged": (
            jax.lax.ragged_dot,
            (array(1024, 512), array(8, 512, 256), array(8, dtype=jnp.int32)),
        ),
        "experts": (
            jax.shard_map(jax.grad(experts, (0, 1)), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False),
            (array(1000, 512), array(8, 512, 256), array(8, dtype=jnp.int32)),
        ),
        "splash": (_splash_gradient(mesh), (array(8, 2, 1024, 128, spec=("x",)),) * 3),
    }


def _splash_gradient(mesh):
    import jax
    import jax.numpy as jnp
    from jax import P
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    def attend(q, k, v):
        mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((1024, 1024))] * 2)
        kernel = jax.vmap(splash_attention_kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1))
        spread = jax.shard_map(kernel, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
        return spread(q, k, v).astype(jnp.float32).sum()

    return jax.grad(attend, (0, 1, 2))


def splash_flops(name: str, q) -> float | None:
    """Of one run of a splash kernel on queries `[..., T, E]`, as if no block were skipped; None for other kernels."""
    products = {"splash_mha_fwd_residuals": 2, "splash_mha_dq_no_residuals": 3, "splash_mha_dkv_no_residuals": 4}
    (tokens, width), lead = q[-2:], q[:-2]
    each = 2.0 * tokens * tokens * width
    for size in lead:
        each *= size
    return products[name] * each if name in products else None


def main(topology_name: str, directory: Path, names: tuple[str, ...]) -> None:
    import jax
    import numpy as np
    from jax.experimental import topologies

    from tests.oracles import jaxpr_costs
    from tests.plan.traced import grouped_flops

    topology = topologies.get_topology_desc(platform="tpu", topology_name=topology_name)
    mesh = jax.sharding.Mesh(np.array(topology.devices), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    programs = [(name, mesh, jax.jit(f), args) for name, (f, args) in _programs(mesh).items()]
    directory.mkdir(parents=True, exist_ok=True)

    def formula(name, operands, results):
        if name == "pallas_call":
            return grouped_flops(operands)
        return splash_flops(name, max((x.shape for x in operands), key=math.prod))

    for name, mesh, f, args in programs:
        if names and name not in names:
            continue
        with jax.set_mesh(mesh):
            traced = f.trace(*args)
            compiled = traced.lower().compile()
        costs = compiled.cost_analysis()
        numbers = {key: costs[key] for key in ("flops", "bytes accessed") if key in costs}
        numbers |= {"devices": len(topology.devices), "jaxpr": jaxpr_costs.flops(traced.jaxpr, formula)}
        (directory / f"{name}.json").write_text(json.dumps(numbers))
        (directory / f"{name}.txt").write_text(compiled.as_text())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), tuple(sys.argv[3:]))

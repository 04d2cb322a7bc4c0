"""Compiles programs for TPUs that are not there: `python -m tests.tpu_programs TOPOLOGY DIRECTORY [NAME ...]`.

Writes for each NAME.txt, the optimized HLO, and NAME.json: XLA's own `flops` and `bytes accessed`, and the FLOPs of its
jaxpr. A process of its own, as libtpu puts handlers on signals.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
LAYERS, WIDTH, TOKENS = 5, 2048, 8192


def compile_all(topology: str, directory: Path, names: tuple[str, ...] = ()) -> dict[str, tuple[str, dict]]:
    """Compile in a process of its own; returns (HLO, what is in the JSON) by name."""
    command = [sys.executable, "-m", "tests.tpu_programs", topology, str(directory), *names]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return {p.stem: (p.read_text(), json.loads(p.with_suffix(".json").read_text())) for p in directory.glob("*.txt")}


def _programs(mesh):
    """Name → (function, abstract arguments), all over a mesh of one axis `x`."""
    import jax
    import jax.numpy as jnp
    from jax import P

    def array(*dims, spec=(), dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=jax.NamedSharding(mesh, P(*spec)))

    def layers(w, x, keep=lambda body: body):
        return jax.lax.scan(keep(lambda x, w: (jnp.tanh(x @ w), None)), x, w)[0].astype(jnp.float32).sum()

    def attention(q, k, v):
        probs = jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", q, k), axis=-1)
        return jnp.einsum("bhqk,bkhe->bqhe", probs, v)

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


def _steps(topology):
    """The training step of a small Llama on two meshes: name → (mesh, jitted step, its arguments)."""
    import jax
    import jax.numpy as jnp

    from dpo_jax import policy, sharding, step
    from dpo_jax.architecture import ModelConfig
    from dpo_jax.attention import Slots
    from dpo_jax.objective import preference_objective
    from dpo_jax.optim import optimizer, schedule

    config = ModelConfig(
        model_type="llama",
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=10000.0,
    )
    rate = schedule("constant", peak=1e-2, warmup_steps=0, total_steps=10)
    tx = optimizer("adamw", rate, weight_decay=0.01, max_grad_norm=1.0)
    slots, pairs = Slots(256, 128, 128), 4
    for name, sizes, microbatches, remat in (
        ("step_1x8x1", (1, 8, 1), 1, "dots"),
        ("step_1x4x2", (1, 4, 2), 2, "full"),
    ):
        mesh = sharding.make_mesh(*sizes, devices=topology.devices)
        layout = policy.lay_out(config, mesh, param_dtype="float32", compute_dtype="bfloat16")
        objective = preference_objective({"sigmoid": 1.0}, beta=0.1)
        logps = policy.logps_fn(layout, remat=remat)
        train_step = step.make_train_step(logps, objective, tx, rate, compute_dtype=jnp.bfloat16)
        state = policy.abstract_state(tx, layout)
        reference = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16, sharding=p.sharding), state.params
        )
        sizes_of = {"tokens": slots.total, "segments": slots.total, "positions": slots.total}
        shapes = {name: ((width,), jnp.int32) for name, width in (sizes_of | {"source": slots.completions}).items()}
        shapes |= {"is_pair": ((pairs,), jnp.bool_), "completion_tokens": ((pairs, 2), jnp.int32)}
        spread = sharding.batch_sharding(mesh)
        batch = {
            name: jax.ShapeDtypeStruct((microbatches, 16 // microbatches, *dims), dtype, sharding=spread)
            for name, (dims, dtype) in shapes.items()
        }
        yield name, mesh, train_step, (state, reference, batch, slots)


def main(topology_name: str, directory: Path, names: tuple[str, ...]) -> None:
    import jax
    import numpy as np
    from jax.experimental import topologies

    from dpo_jax import jaxpr_costs

    topology = topologies.get_topology_desc(platform="tpu", topology_name=topology_name)
    if any(name.startswith("step") for name in names):
        programs = [program for program in _steps(topology) if program[0] in names]
    else:
        mesh = jax.sharding.Mesh(np.array(topology.devices), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        programs = [(name, mesh, jax.jit(f), args) for name, (f, args) in _programs(mesh).items()]
    directory.mkdir(parents=True, exist_ok=True)
    formula = lambda name, operands, results: splash_flops(name, max((x.shape for x in operands), key=math.prod))
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

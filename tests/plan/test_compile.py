"""A run's programs: what they hold and need, without the TPU compiler but for one."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import pytest

from dpo_jax.model.families import config_from_hf
from dpo_jax.model.options import LayoutOptions
from dpo_jax.model.placement import abstract_whole, place_model
from dpo_jax.objective.policy_logps import logps_fn
from dpo_jax.parallel.mesh import make_mesh, replicated
from dpo_jax.parallel.tpu import parse_topology, quiet
from dpo_jax.plan.compile import abstract_batch, experts_share, held_by
from dpo_jax.plan.draft import Draft, find_model
from dpo_jax.plan.estimate import least_operations
from dpo_jax.plan.lengths import find_lengths
from dpo_jax.rows.schedule import make_schedule
from dpo_jax.rows.shape import Order, RowLimits, RowShape
from dpo_jax.training.setup import make_models
from dpo_jax.training.step import make_logps_step
from tests import processes
from tests.oracles import oracle
from tests.plan.runs import COUNT, LORA, SMALL, compiler, settings


@compiler
def test_a_pass_of_a_reference_in_host_memory_compiles():
    """The one that is made once over the held-out pairs."""
    processes.run_all(_compile_a_pass, [()])  # of its own: libtpu puts handlers on signals


def _compile_a_pass():
    c = settings(reference_offload=True, batch_size=8, compute_dtype="bfloat16")
    mesh = make_mesh(1, -1, 1, parse_topology("v5e:2x2").devices())
    layout = place_model(config_from_hf(SMALL, "small"), mesh, c.layout, c.lora)
    step = make_logps_step(
        make_models(c, layout)[1],
        compute_dtype=layout.dtype,
        out_shardings=replicated(mesh),
        compiler_options=layout.options.compiler_options,
    )
    batch = abstract_batch(RowShape(128, (64, 64), 4, 2), layout, 1)
    with jax.set_mesh(mesh), quiet():
        compiled = step.trace(abstract_whole(layout, layout.dtype), batch, RowShape(128, (64, 64))).lower().compile()
    assert compiled.memory_analysis().host_argument_size_in_bytes > 0


def _draft(**changed):
    """A run on this machine's first device, of ten updates."""
    s = settings(**changed)
    layout = place_model(find_model(s.model), make_mesh(1, 1, 1, jax.devices()[:1]), s.layout, s.lora)
    return Draft(s, parse_topology("v6e:1x1"), layout, schedule=None, steps=10)


ADAPTERS = 4_884_480  # of rank 16, as PEFT counts them


@pytest.mark.parametrize(
    ("changed", "parameters", "optimizer", "reference"),
    [
        ({}, 4 * COUNT, 8 * COUNT, 4 * COUNT),
        ({"param_dtype": "bfloat16"}, 2 * COUNT, 8 * COUNT, 4 * COUNT),
        ({"compute_dtype": "bfloat16"}, 4 * COUNT, 8 * COUNT, 2 * COUNT),
        ({"reference_cache": True}, 4 * COUNT, 8 * COUNT, 0),
        ({"loss": "simpo"}, 4 * COUNT, 8 * COUNT, 0),
        (LORA, 4 * ADAPTERS, 8 * ADAPTERS, 4 * COUNT),
        (LORA | {"sft_steps": 5}, 4 * ADAPTERS, 8 * ADAPTERS, 4 * (COUNT + ADAPTERS)),
        (LORA | {"reference": "owner/other"}, 4 * ADAPTERS, 8 * ADAPTERS, 2 * 4 * COUNT),
    ],
)
def test_what_a_run_holds_all_the_time(changed, parameters, optimizer, reference):
    held = held_by(_draft(**{"sft_steps": 0} | changed))
    assert (held["parameters"], held["reference"]) == (parameters, reference)
    assert held["optimizer"] == pytest.approx(optimizer, abs=16)  # and a count or two


@pytest.mark.parametrize(
    ("changed", "needed"),
    [({}, 8), ({"reference_cache": True}, 6), ({"loss": "simpo"}, 6), (LORA, 6), (LORA | {"reference_cache": True}, 4)],
)
def test_what_a_step_needs_at_least(changed, needed):
    assert least_operations(_draft(**changed)) == needed


@pytest.mark.parametrize(("experts", "tensor", "share"), [(8, 4, 1 / 4), (6, 4, 1.0), (8, 1, 1.0), (0, 4, 1.0)])
def test_a_device_has_its_share_of_the_experts_rows(experts, tensor, share):
    """Whole experts are spread where their number divides, else a part of each: then every device has all rows."""
    config = dataclasses.replace(oracle.CONFIG, num_attention_heads=4, intermediate_size=32, num_experts=experts)
    mesh = make_mesh(1, 8 // tensor, tensor)
    layout = place_model(config, mesh, LayoutOptions(compute_dtype="float32"))
    assert experts_share(layout) == share


@pytest.mark.sweep
@pytest.mark.parametrize("n", [1, 4])
def test_batches_of_groups_of_any_size(n):
    """Lengths are drawn, rows are chosen and a batch is spelled out for n completions, as for pairs."""
    lengths = find_lengths(settings(), completions=n)
    schedule = make_schedule(lengths, 32, RowLimits(row_multiple=4, width_multiple=16), Order())
    layout = _draft().layout
    for shape in schedule.epoch(0).shapes:
        batch = abstract_batch(shape, layout, microbatches=2, given=1)
        M, B, K, T = 2, shape.rows // 2, shape.places, shape.length
        assert (shape.n, batch.tokens.shape) == (n, (M, B, T))
        assert batch.completion_tokens.shape == batch.ref_logps.shape == (M, B, K, n)
        assert batch.source.shape == (M, B, T - shape.prompt)
        assert batch.ref_whole is None


@compiler
@pytest.mark.parametrize("n", [1, 3, 4, 8] if os.environ.get("DPO_JAX_SWEEP") else [8])
def test_rows_of_any_number_of_completions_compile(n):
    processes.run_all(_compile_groups, [(n,)])


def _compile_groups(n):
    """The gradient of a loss of groups, on eight chips."""
    c = settings(batch_size=8, attention="splash")
    mesh = make_mesh(1, -1, 1, parse_topology("v6e:2x4").devices())
    layout = place_model(config_from_hf(SMALL, "small"), mesh, c.layout, c.lora)
    logps, shape = logps_fn(layout, remat="dots"), RowShape(256, (128,) * n, rows=8, places=4)

    def loss(params, batch):
        return jnp.sum(logps(params, jax.tree.map(lambda x: x[0], batch), shape).logps ** 2)

    params = abstract_whole(layout, layout.dtype)
    with jax.set_mesh(mesh), quiet():
        traced = jax.jit(jax.grad(loss), compiler_options=layout.options.compiler_options).trace(
            params, abstract_batch(shape, layout, 1)
        )
        text = traced.lower().compile().as_text()
    assert "splash_mha_fwd" in text

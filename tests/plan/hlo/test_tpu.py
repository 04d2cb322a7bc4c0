"""Costs of programs compiled for TPUs, which need not be here: against formulas, jaxprs and XLA's own count."""

import importlib.util
import math

import pytest

from dpo_jax.plan.hlo.count import count_costs
from tests.plan.hlo import tpu_programs
from tests.plan.hlo.tpu_programs import LAYERS, TOKENS, WIDTH

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed (extra `tpu`)"
    ),
]
DEVICES = 8
PRODUCT = 2 * TOKENS * WIDTH * WIDTH


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return tpu_programs.compile_all("v6e:2x4", tmp_path_factory.mktemp("v6e"))


def _formula(call):
    return tpu_programs.splash_flops(call.name, max((x.dims for x in call.operands), key=math.prod))


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("matmul", 2 * 1024 * 2048 * 512 * DEVICES),
        ("scan", LAYERS * PRODUCT),
        ("fsdp", 3 * LAYERS * PRODUCT),
        ("remat", 4 * LAYERS * PRODUCT),
        ("tensor", 2 * 2 * TOKENS * WIDTH * 8192),
        ("attention", 2 * 2 * 8 * 16 * 512 * 512 * 128),
    ],
)
def test_products(programs, name, flops):
    text, numbers = programs[name]
    costs = count_costs(text)
    assert costs.flops * DEVICES == flops
    assert costs.unknown_loops == costs.unknown_kernels == ()
    # What every device repeats is once in the jaxpr; XLA's own count has element-wise work too, and bodies once.
    assert numbers["jaxpr"] == (flops / DEVICES if name == "matmul" else flops)
    once = count_costs(text, once=True)
    assert once.flops == pytest.approx(numbers["flops"], rel=0.03)
    # XLA counts a copy at its start and at its end.
    assert 0.6 < (once.read + once.written).total() / numbers["bytes accessed"] < 1.05


@pytest.mark.parametrize("name", ["fsdp", "remat"])
def test_fsdp_gathers_weights_twice_and_scatters_gradients(programs, name):
    found = count_costs(programs[name][0]).collectives
    weight = WIDTH * WIDTH * 2
    assert sorted(c.kind for c in found) == ["all-gather", "all-gather", "reduce-scatter"]
    for c in found:
        assert (c.times, c.payload_bytes, c.group_size) == (LAYERS, weight, DEVICES)
        assert c.received_bytes == weight * (DEVICES - 1) / DEVICES


def test_tensor_parallel_products_are_summed(programs):
    (found,) = count_costs(programs["tensor"][0]).collectives
    assert (found.kind, found.payload_bytes) == ("all-reduce", TOKENS * WIDTH * 2)
    assert found.received_bytes == 2 * TOKENS * WIDTH * 2 * (DEVICES - 1) / DEVICES


def test_a_grouped_product_is_a_kernel_that_states_its_flops(programs):
    costs = count_costs(programs["ragged"][0])
    assert costs.kernel_flops == 2 * 1024 * 512 * 256 == programs["ragged"][1]["jaxpr"]
    assert costs.unknown_kernels == ("ragged-dot-metadata",)  # sorts rows into tiles


def test_the_gradient_of_experts_is_two_more_products_and_no_more(programs):
    """XLA's own would multiply every row for each of the eight experts; rows are padded to the kernel's tiles."""
    text, numbers = programs["experts"]
    costs = count_costs(text)
    product = 2 * 1000 * 512 * 256
    assert costs.flops + costs.kernel_flops == pytest.approx(3 * product, rel=0.02)
    assert numbers["jaxpr"] == pytest.approx(DEVICES * 3 * product, rel=0.02)


def test_splash_kernels_have_their_names(programs):
    text, numbers = programs["splash"]
    costs = count_costs(text, _formula)
    names = {"splash_mha_fwd_residuals": 1, "splash_mha_dq_no_residuals": 1, "splash_mha_dkv_no_residuals": 1}
    assert (costs.kernels, costs.unknown_kernels) == (names, ())
    assert costs.kernel_flops * DEVICES == (2 + 3 + 4) * 2 * 8 * 2 * 1024 * 1024 * 128
    # The gradient's sum over output times its gradient is a product in the jaxpr, and element-wise to XLA.
    assert numbers["jaxpr"] == costs.kernel_flops * DEVICES + 2 * 8 * 2 * 1024 * 128
    assert set(count_costs(text).unknown_kernels) == set(names)

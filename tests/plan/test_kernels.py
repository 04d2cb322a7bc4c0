"""FLOPs of kernels by formula."""

import jax
import jax.numpy as jnp

from dpo_jax.model.attention.tpu_splash import Tiling
from dpo_jax.plan.hlo.count import KernelCall
from dpo_jax.plan.hlo.text import Shape
from dpo_jax.plan.kernels import attention_flops, kernel_formula, query_shape
from dpo_jax.rows.shape import RowShape

SHAPE, TILING = RowShape(256, (128, 128)), Tiling(128)


def test_attention_counts_the_products_of_the_tiles():
    query = jax.ShapeDtypeStruct((3, 8, 512, 64), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((1, 4, 4), jnp.int32)
    assert query_shape([table, query]) == (3, 8, 512, 64)
    # Prompt 3 tiles of 4, chosen 2 + 1, rejected 2 + 1 (the other completion is not seen).
    forward = 3 * 8 * 9 * 128**2 * 64 * 2 * 2
    count = lambda name: attention_flops(name, query.shape, SHAPE, TILING)
    assert count("splash_mha_fwd_segmented_residuals") == forward
    assert count("splash_mha_dkv_segmented_no_residuals") == forward * 5 / 2
    assert count("another_kernel") is None


def _call(name, *operands, estimate=None):
    return KernelCall(name, "tpu_custom_call", operands, (), estimate)


def test_a_kernel_of_the_step_by_its_name():
    formula = kernel_formula(SHAPE, TILING, experts_share=1 / 4)
    table, query = Shape("s32", (1, 4, 4)), Shape("bf16", (3, 8, 512, 64))
    assert formula(_call("splash_mha_fwd", table, query)) == 3 * 8 * 9 * 128**2 * 64 * 2 * 2
    assert kernel_formula(SHAPE, None, 1.0)(_call("splash_mha_fwd", table, query)) is None
    # Of a grouped product a device has its share of the rows; what its author states is for all of them.
    assert formula(_call("ragged-dot-convolution", estimate=100.0)) == 25
    assert formula(_call("tgmm", estimate=100.0)) == 25
    assert formula(_call("ragged-dot-metadata")) == 0
    assert formula(_call("another", estimate=100.0)) == 100
    assert formula(_call("another")) is None

"""FLOPs counted in a jaxpr: every way to nest a product, against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import P
from jax.experimental import pallas as pl

from tests.oracles import jaxpr_costs
from tests.oracles.jaxpr_costs import UncountableError, flops

X, W = jnp.ones((16, 32)), jnp.ones((32, 8))
PRODUCT = 2 * 16 * 32 * 8
SQUARE = jnp.ones((8, 8))


def _count(f, *args, **options):
    return flops(jax.make_jaxpr(f)(*args), **options)


def test_products_with_batches_and_several_contracted_axes():
    assert _count(jnp.dot, X, W) == PRODUCT
    assert _count(lambda x, y: jnp.einsum("bqhe,bkhe->bhqk", x, y), *[jnp.ones((2, 3, 4, 5))] * 2) == 2 * 2 * 4 * 9 * 5
    assert _count(lambda x, w: jnp.einsum("the,hed->td", x, w), jnp.ones((7, 2, 3)), jnp.ones((2, 3, 5))) == 2 * 7 * 30


def test_a_gradient_costs_twice_and_recomputation_once_more():
    loss = lambda x, w: jnp.sum(jnp.sin(x @ w))
    assert _count(jax.grad(loss, (0, 1)), X, W) == 3 * PRODUCT
    assert _count(jax.grad(jax.checkpoint(loss), (0, 1)), X, W) == 4 * PRODUCT


def test_scan_multiplies_also_in_a_scan_and_cond_takes_the_dearest():
    inner = lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=3)[0]
    outer = lambda x: jax.lax.fori_loop(0, 5, lambda _, x: inner(x), x)
    assert _count(jax.grad(lambda x: inner(x).sum()), SQUARE) == 3 * 3 * 2 * 8**3
    assert _count(lambda x: jax.lax.scan(lambda x, _: (inner(x), None), x, length=5)[0], SQUARE) == 15 * 2 * 8**3
    assert _count(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x), SQUARE) == 4 * 8**3
    assert _count(outer, SQUARE) == 15 * 2 * 8**3


def test_a_loop_that_is_no_scan_is_named():
    def loop(x):
        with jax.named_scope("search"):
            return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x)

    with pytest.raises(UncountableError, match="a while loop with matrix products in search"):
        _count(loop, SQUARE)
    assert _count(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x + 1, x), SQUARE) == 0


def test_functions_in_functions():
    @jax.custom_vjp
    def square(x):
        return x @ x

    square.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))
    assert _count(square, SQUARE) == 2 * 8**3
    assert _count(jax.grad(lambda x: square(x).sum()), SQUARE) == 3 * 2 * 8**3
    assert _count(jax.jit(jax.jit(jax.nn.relu)), SQUARE) == 0

    @jax.custom_jvp
    def cube(x):
        return x @ x @ x

    cube.defjvp(lambda primals, tangents: (cube(*primals), tangents[0]))
    assert _count(jax.jit(cube), SQUARE) == 2 * 2 * 8**3


def test_a_shard_map_runs_on_the_devices_of_its_axes():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    both = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(P(("a", "b")), P()), out_specs=P(("a", "b")))
    assert _count(both, X, W) == PRODUCT
    one = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(P("b"), P()), out_specs=P("b"), axis_names={"b"})
    assert _count(jax.jit(one), X, W) == PRODUCT
    # Work that is not spread is done by all.
    repeated = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(P(), P()), out_specs=P())
    assert _count(repeated, X, W) == 8 * PRODUCT


@pytest.mark.parametrize("groups", [2, 8])
def test_a_grouped_product_and_its_gradients_count_every_row_once(groups):
    x, w, sizes = jnp.ones((16, 32)), jnp.ones((groups, 32, 8)), jnp.full(groups, 16 // groups)
    product = lambda x, w: jax.lax.ragged_dot(x, w, sizes)
    assert _count(product, x, w) == PRODUCT
    assert _count(jax.grad(lambda x, w: jnp.sin(product(x, w)).sum(), (0, 1)), x, w) == 3 * PRODUCT


def test_groups_of_other_devices_are_not_counted():
    """Four devices with two of eight groups each: all rows come to each of them, a quarter belongs there."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w = jnp.ones((16, 32)), jnp.ones((8, 32, 8))
    local = lambda x, w: jax.lax.ragged_dot(x, w, jnp.full(2, 2))
    spread = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("x")), out_specs=P(), check_vma=False)
    assert _count(spread, x, w) == 4 * PRODUCT
    assert jaxpr_costs.flops(jax.make_jaxpr(spread)(x, w), grouped_share=1 / 4) == PRODUCT


def test_convolutions_with_groups():
    image, kernel = jnp.ones((2, 8, 10, 10)), jnp.ones((6, 4, 3, 3))
    convolve = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", feature_group_count=2)
    assert _count(convolve, image, kernel) == 2 * 2 * 6 * 10 * 10 * 4 * 9


def test_kernels_count_by_the_callers_formula():
    def double(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    shape = jax.ShapeDtypeStruct((16, 32), jnp.float32)
    kernel = lambda x: jax.lax.scan(
        lambda x, _: (pl.pallas_call(double, out_shape=shape, name="doubles", interpret=True)(x), None), x, length=3
    )[0]

    def formula(name, operands, results):
        return operands[0].size + results[0].size if name == "doubles" else None

    assert _count(kernel, X, kernel_flops=formula) == 3 * 2 * 16 * 32
    with pytest.raises(UncountableError, match=r"kernel 'doubles'.*no formula"):
        _count(kernel, X)

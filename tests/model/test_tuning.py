"""What suits a model on its devices."""

import jax
import jax.numpy as jnp

from dpo_jax.model.tuning import exact_products, passes


def test_float32_products_are_not_rounded_on_accelerators():
    product = jax.make_jaxpr(lambda x: x @ x)
    for platform, dtype, exact in (("tpu", "float32", True), ("tpu", "bfloat16", False), ("cpu", "float32", False)):
        with exact_products(jnp.dtype(dtype), platform):
            assert ("HIGHEST" in str(product(jnp.ones((2, 2))))) is exact
        assert passes(jnp.dtype(dtype), platform) == (6 if exact else 1)

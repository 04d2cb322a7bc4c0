"""The cached sampler against the whole model run again for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dpo_jax.model.forward import ModelOptions, init_params
from dpo_jax.sampling.engine import Choice, generate, pick
from tests.oracles import oracle
from tests.oracles.oracle import CONFIG

PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 60, 11]]


@pytest.fixture(scope="module")
def params():
    fresh = nn.meta.unbox(init_params(jax.random.key(0), CONFIG))
    return jax.tree.map(lambda p: p * 8 if p.ndim > 2 else p, fresh)


def _greedy(params, prompt, n, stop):
    ids, out = list(prompt), []
    for _ in range(n):
        token = int(oracle.logits(params, np.array(ids), CONFIG)[-1].argmax())
        if token in stop:
            break
        ids.append(token)
        out.append(token)
    return out


def test_greedy_is_the_most_likely_token_every_time(params):
    ours = generate(params, PROMPTS, ModelOptions(CONFIG), stop=[61], new_tokens=6)
    assert ours == [_greedy(params, p, 6, [61]) for p in PROMPTS]


def test_an_answer_ends_before_its_stop_token(params):
    free = _greedy(params, PROMPTS[0], 6, [61])
    stop = [free[3]]
    ours = generate(params, PROMPTS, ModelOptions(CONFIG), stop=stop, new_tokens=6)
    assert ours == [_greedy(params, p, 6, stop) for p in PROMPTS]
    assert len(ours[0]) <= 3


def test_a_seed_decides_the_draws(params):
    draw = lambda seed: generate(
        params, PROMPTS, ModelOptions(CONFIG), stop=[61], new_tokens=8, choice=Choice(1.0, 0.9), seed=seed
    )
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_temperature_and_nucleus_give_their_distribution():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    keys = jax.random.split(jax.random.key(0), 4000)
    count = lambda **kw: (
        np.bincount(jax.vmap(lambda k: pick(k, logits[None], Choice(**kw))[0])(keys), minlength=4) / 4000
    )
    np.testing.assert_allclose(count(temperature=1.0, top_p=1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    # 0.5 is short of 0.6, so the second token is in, and no other.
    np.testing.assert_allclose(count(temperature=1.0, top_p=0.6), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(count(temperature=1.0, top_p=0.01), [1, 0, 0, 0])
    sharp = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(count(temperature=0.5, top_p=1.0), sharp / sharp.sum(), atol=0.03)
    assert int(pick(keys[0], logits[None], Choice())[0]) == 0

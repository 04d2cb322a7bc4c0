"""The on-policy KL divergence: each answer's is the float64 oracle's, and its mean over draws is the whole one's."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import linen as nn

from dpo_jax.model.forward import init_params
from dpo_jax.model.options import LayoutOptions
from dpo_jax.model.placement import place_model
from dpo_jax.parallel.mesh import make_mesh
from dpo_jax.sampling.divergence import kl_request, make_divergence, make_on_policy_kl
from dpo_jax.sampling.engine import Sampler
from tests.oracles import oracle

CONFIG = dataclasses.replace(oracle.CONFIG, vocab_size=16)
ANSWERS = oracle.RandomGroups([[3, 2, 5], [1, 7, 1], [6, 4, 4]], vocab=16).ids


def _fresh(seed):
    fresh = nn.meta.unbox(init_params(jax.random.key(seed), CONFIG))
    return jax.device_get(jax.tree.map(lambda p: p * 8 if p.ndim > 2 else p * 3, fresh))


POLICY, REFERENCE = _fresh(0), _fresh(1)


def _layout(sizes=(1, 1, 1), config=CONFIG):
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    return place_model(config, mesh, LayoutOptions(compute_dtype="float32"))


def _sampler(stop):
    return Sampler(_layout(), None, [stop])


def _kl_of(stop, prompts, new_tokens, seed):
    """`estimate(params, ref_params)` of answers that are drawn for it."""
    sampler, request = _sampler(stop), kl_request(prompts, new_tokens=new_tokens, seed=seed)
    estimate = make_on_policy_kl(sampler.layout, request)
    return lambda params, ref_params: estimate(params, ref_params, sampler.together(params, [request])[0])


def _log_probs(params, ids):
    """log p of the next token after `ids`, float64 `[V]`."""
    z = oracle.logits(params, np.asarray(ids), CONFIG)[-1]
    return z - z.max() - np.log(np.exp(z - z.max()).sum())


def _token_kl(ids):
    ours, theirs = (_log_probs(params, ids) for params in (POLICY, REFERENCE))
    return (np.exp(ours) * (ours - theirs)).sum()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_an_answers_divergence_is_the_float64_oracles(sizes):
    layout = _layout(sizes)
    with jax.set_mesh(layout.mesh):
        found = make_divergence(layout, 7)(POLICY, REFERENCE, ANSWERS)
    expected = [
        [sum(_token_kl([*prompt, *answer[:t]]) for t in range(len(answer))) for answer in answers]
        for prompt, *answers in ANSWERS
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found.min() > 0.01  # these two models differ


@pytest.mark.slow
def test_chunks_and_softcapping_change_what_they_should(monkeypatch):
    layout = _layout()
    whole = make_divergence(layout, 7)(POLICY, REFERENCE, ANSWERS)
    monkeypatch.setattr("dpo_jax.objective.token_logps.CHUNK_TOKENS", 6)
    np.testing.assert_allclose(make_divergence(layout, 7)(POLICY, REFERENCE, ANSWERS), whole, rtol=1e-6)
    capped = _layout(config=dataclasses.replace(CONFIG, final_logit_softcapping=0.01))
    assert make_divergence(capped, 7)(POLICY, REFERENCE, ANSWERS).max() < 1e-2  # logits that are nearly equal


def test_the_estimate_is_the_divergence_of_all_answers():
    """Of up to two tokens: the sum over every first token, and over every second one where the first is not the end."""
    prompt, stop = [5, 9, 2], 3
    first = np.exp(_log_probs(POLICY, prompt))
    going_on = [token for token in range(16) if token != stop]
    exact = _token_kl(prompt) + sum(first[token] * _token_kl([*prompt, token]) for token in going_on)
    # By the definition, Σ_y π(y) log π(y)/π_ref(y), it is the same.
    by_answer = 0.0
    ours, theirs = _log_probs(POLICY, prompt), _log_probs(REFERENCE, prompt)
    by_answer += first[stop] * (ours - theirs)[stop]
    for token in going_on:
        next_ours, next_theirs = (_log_probs(params, [*prompt, token]) for params in (POLICY, REFERENCE))
        probs = first[token] * np.exp(next_ours)
        by_answer += (probs * (ours[token] + next_ours - theirs[token] - next_theirs)).sum()
    assert exact == pytest.approx(by_answer)

    estimate = _kl_of(stop, [prompt] * 300, new_tokens=2, seed=1)
    values = estimate(POLICY, REFERENCE)
    assert values["kl"] == pytest.approx(exact, abs=4 * values["kl_error"])
    assert values["kl_error"] < 0.1 * exact  # so that the line before says something
    tokens = 2 - first[stop]
    assert values["kl_per_token"] == pytest.approx(exact / tokens, rel=0.1)
    assert estimate(POLICY, REFERENCE) == values  # the same draws


def test_a_policy_that_is_its_reference_has_none():
    estimate = _kl_of(3, [[5, 9, 2], [7]], new_tokens=4, seed=0)
    assert estimate(POLICY, POLICY) == {"kl": 0.0, "kl_per_token": 0.0, "kl_error": 0.0}
    alone = _kl_of(3, [[5]], new_tokens=4, seed=0)(POLICY, REFERENCE)
    assert set(alone) == {"kl", "kl_per_token"}
    assert alone["kl"] > 0

"""Losses and every gradient of RL on given answers: those of TRL's GRPOTrainer and RLOOTrainer, whatever the rows.

Golden numbers come from `tests/golden/record_rl.py`, which says what its model, answers and cases are.
"""

import functools
import importlib.util
import json
import shutil
import tempfile
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from dpo_jax.batches import on_mesh, step_source
from dpo_jax.model.options import LayoutOptions
from dpo_jax.objective.policy_logps import logps_fn
from dpo_jax.objective.rl_table import RlOptions
from dpo_jax.parallel.mesh import make_mesh
from dpo_jax.rl.estimators import ADVANTAGES
from dpo_jax.rl.objective import rl_objective
from dpo_jax.rl.rollouts import Rollout
from dpo_jax.rows.schedule import make_schedule
from dpo_jax.rows.shape import Order, RowLimits
from dpo_jax.training.setup import start_state
from dpo_jax.training.step import make_eval_step, make_train_step
from dpo_jax.weights.find import find_policy
from dpo_jax.weights.huggingface import save_weights
from dpo_jax.weights.load import load_whole
from tests import places

GOLDEN = places.GOLDEN / "rl"
TINY = places.GOLDEN / "trl" / "tiny"
GIVEN = json.loads((GOLDEN / "answers.json").read_text())
CASES = json.loads((GOLDEN / "cases.json").read_text())["cases"]
LONGEST, TOLERANCE = 12, 2e-5
ONE = (1, 1, 1)


@functools.cache
def loaded(sizes=ONE):
    policy = find_policy(str(TINY), TINY, 0)
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    return policy, *load_whole(policy, mesh, LayoutOptions(compute_dtype="float32"))


def by_name(params, policy):
    """A tree by the names of the exported tensors."""
    with tempfile.TemporaryDirectory() as directory:
        save_weights(params, policy.hf_config(), Path(directory) / "x", dtype="float32")
        return load_file(Path(directory) / "x" / "model.safetensors")


@functools.cache
def reference_params(sizes):
    """The policy's parameters with the recorder's noise."""
    _, layout, _ = loaded(sizes)
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(TINY, directory, dirs_exist_ok=True)
        tensors = load_file(TINY / "model.safetensors")
        for name, x in tensors.items():
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            tensors[name] = x + (0.05 * rng.normal(size=x.shape)).astype(np.float32)
        save_file(tensors, Path(directory) / "model.safetensors", metadata={"format": "pt"})
        noisy = find_policy(directory, Path(directory), 0)
        return load_whole(noisy, layout.mesh, LayoutOptions(compute_dtype="float32"))[1]


def arrays(rows):
    return [[np.asarray(x, np.float32) for x in row] for row in rows]


@functools.cache
def own_logps(temperature):
    """The policy's log-probabilities of the given answers, answer by answer."""
    item, layout, params, logps = batch_of(ONE, 1, temperature, arrays(GIVEN["old_noise"]))
    step = make_eval_step(logps, rl_objective(RlOptions(temperature=temperature)), compute_dtype=jnp.float32)
    with jax.set_mesh(layout.mesh):
        found, _ = jax.device_get(step(params, None, item.batch, item.shape))
    return ragged(found.of_tokens, item)


def ragged(values, item):
    """Values `[M, B, N]` as those of each answer to each prompt."""
    owner, K, n = np.asarray(item.batch.owner), item.examples.shape[-1], len(GIVEN["answers"][0])
    out = [[None] * n for _ in GIVEN["prompts"]]
    for m, b, k in np.argwhere(item.examples >= 0):
        for j in range(n):
            out[item.examples[m, b, k]][j] = np.asarray(values)[m, b][owner[m, b] == k * n + j]
    assert K * n > owner.max()
    return out


def batch_of(sizes, microbatches, temperature, drawn, shift=0):
    """The given answers in rows; `shift` turns the order of each prompt's answers, which then take other slots."""
    _, layout, params = loaded(sizes)
    turned = lambda row: [*row[shift:], *row[:shift]]
    groups = [
        (np.asarray(p, np.int32), *(np.asarray(a, np.int32) for a in turned(answers)))
        for p, answers in zip(GIVEN["prompts"], GIVEN["answers"], strict=True)
    ]
    rewards = np.array([turned([np.nan if r is None else r for r in row]) for row in GIVEN["rewards"]])
    rollout = Rollout(groups, [turned(row) for row in drawn], rewards, {})
    shards = sizes[0] * sizes[1]
    limits = RowLimits(row_multiple=shards * microbatches, width_multiple=8)
    schedule = make_schedule(rollout, len(groups), limits, Order(shuffle=False))
    given = {"rewards": rewards.astype(np.float32)}
    source = step_source(schedule, layout.mesh, 1, microbatches, given, rollout.drawn_logps)
    item = on_mesh(source[0], microbatches, layout.mesh)
    return item, layout, params, logps_fn(layout, remat="none", per_token=True, temperature=temperature)


def run(case, sizes=ONE, microbatches=1, shift=0):
    """Metrics and gradients of an update; an update of SGD at rate 1 takes the gradient from the parameters."""
    settings = dict(CASES[case]["settings"])
    off_policy = settings.pop("off_policy", False)
    temperature = settings.get("temperature", 1.0)
    now = own_logps(temperature)
    plus = lambda a, b: [[x + y for x, y in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]
    old = plus(now, arrays(GIVEN["old_noise"])) if off_policy else now
    drawn = plus(old, arrays(GIVEN["drawn_noise"])) if settings.get("correction_cap") else old
    item, layout, params, logps = batch_of(sizes, microbatches, temperature, drawn, shift)
    batch = item.batch
    if off_policy:
        held, *_ = batch_of(sizes, microbatches, temperature, old, shift)
        batch = batch._replace(old_logps=held.batch.drawn_logps)
    objective = rl_objective(RlOptions(max_tokens=LONGEST, **settings))
    step = make_train_step(logps, objective, optax.sgd(1.0), lambda _: 1.0, compute_dtype=jnp.float32)
    with jax.set_mesh(layout.mesh):
        reference = reference_params(sizes) if objective.needs_reference else None
        state = start_state(jax.tree.map(jnp.array, params), optax.sgd(1.0), layout)
        state, metrics = step(state, reference, batch, item.shape)
        gradients = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b), params, state.params)
    return jax.device_get(metrics), by_name(gradients, loaded(ONE)[0])


def direction(name, shape):
    return np.random.default_rng(zlib.crc32(name.encode()) + 1).normal(size=shape).astype(np.float32)


def compare(metrics, gradients, theirs):
    assert float(metrics["loss"]) == pytest.approx(theirs["loss"], abs=TOLERANCE)
    assert float(metrics["entropy"]) == pytest.approx(theirs["entropy"], abs=TOLERANCE)
    assert float(metrics["clip_ratio"]) == pytest.approx(theirs["clip_ratio"], abs=1e-6)
    assert set(gradients) == set(theirs["gradients"])
    largest = max(norm for norm, _ in theirs["gradients"].values())
    for name, (norm, product) in theirs["gradients"].items():
        ours = gradients[name].astype(np.float64)
        close = functools.partial(pytest.approx, rel=TOLERANCE, abs=TOLERANCE * largest)
        assert np.linalg.norm(ours) == close(norm), name
        assert (ours * direction(name, ours.shape)).sum() == close(product), name


@pytest.mark.sweep
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_trls(case):
    compare(*run(case), CASES[case])


@pytest.mark.slow
def test_every_gradient_of_one_case_is_trls():
    _, ours = run("grpo")
    theirs = load_file(GOLDEN / "gradients.safetensors")
    largest = max(np.abs(g).max() for g in theirs.values())
    for name, gradient in theirs.items():
        np.testing.assert_allclose(ours[name], gradient, rtol=1e-4, atol=TOLERANCE * largest, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "sizes", "microbatches", "shift"),
    [
        ("grpo", (2, 2, 2), 1, 0),
        ("rloo_whitened", ONE, 2, 1),
        ("dapo", (1, 4, 2), 1, 1),
        ("gspo", (1, 2, 1), 2, 3),
        ("grpo_corrected", (4, 1, 2), 1, 2),
        ("cispo", (1, 2, 4), 2, 0),
    ],
)
def test_neither_meshes_nor_microbatches_nor_slots_change_anything(case, sizes, microbatches, shift):
    compare(*run(case, sizes, microbatches, shift), CASES[case])


@pytest.mark.parametrize("case", ["grpo", "dapo", "dr_grpo"])
def test_advantages_are_trls(case):
    settings, theirs = CASES[case]["settings"], np.array(CASES[case]["advantages"])
    rewards = np.array([[np.nan if r is None else r for r in row] for row in GIVEN["rewards"]])
    scored = np.isfinite(rewards)
    ours = ADVANTAGES[settings.get("advantage", "group")](jnp.asarray(np.nan_to_num(rewards)), jnp.asarray(scored))
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.extras
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs torch and trl, which are not here")
@pytest.mark.parametrize("case", ["grpo", "rloo"])
def test_live_trl_says_what_was_recorded(case):
    from tests.golden.record_rl import run_case, summed

    theirs = summed(run_case(CASES[case]["settings"], GIVEN))
    compare(*run(case), theirs)

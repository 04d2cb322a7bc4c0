"""Held-out values: those of one batch of all held-out pairs, whatever batches, rows and devices compute them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.batches import step_source
from dpo_jax.objective.logps import sum_groups
from dpo_jax.objective.objective import Objective, ld_weights, make_set_values, preference_objective, sft_objective
from dpo_jax.objective.table import LOSS_FACTS
from dpo_jax.objective.token_logps import TokenValues
from dpo_jax.parallel.mesh import make_mesh, replicated, row_shards
from dpo_jax.records.records import METRICS
from dpo_jax.rows.build import FirstOnly
from dpo_jax.rows.schedule import make_schedule
from dpo_jax.rows.shape import Order, RowLimits
from dpo_jax.training.phases import evaluate
from dpo_jax.training.step import make_eval_step
from tests.objective.test_losses import EXPECTED
from tests.oracles import oracle

# Lengths far apart: a mean over pairs and one over tokens differ in the first digit.
PAIRS = oracle.RandomGroups(np.random.default_rng(0).choice([1, 2, 3, 24], (23, 3)))
BETA = 0.3
SMOOTHED = {"label_smoothing": 0.1}
# Log-probabilities of tokens, of the policy and the reference: what a model would give, but for its context.
TABLES = [-np.abs(np.random.default_rng(seed).normal(1, 0.7, oracle.CONFIG.vocab_size)) for seed in (1, 2)]
SOURCES = {name: np.arange(len(PAIRS)) % 3 == i for i, name in enumerate(("one", "two", "three"))}


def _objective(loss, **more):
    names = [part.split(":")[0] for part in loss.split(",")]
    taken = {key for name in names for key in LOSS_FACTS[name].hyperparameters}
    given = {"beta": BETA, **(SMOOTHED if "label_smoothing" in taken else {})} | more
    return preference_objective(dict.fromkeys(names, 1.0), **given)


def _logps(weights, squares, params, micro, shape):
    values = params["table"][micro.tokens[:, shape.prompt :]]
    return sum_groups(TokenValues(values, 2 * values if squares else None), micro, shape, weights)


@functools.cache
def _step(needs_reference, sizes, alpha, wpo):
    """The evaluation's step, which reads of the objective only whether it needs a reference."""
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    objective = Objective(None, "dpo_loss", needs_reference)
    logps = functools.partial(_logps, ld_weights(alpha), wpo)
    return mesh, make_eval_step(logps, objective, compute_dtype=jnp.float32, out_shardings=replicated(mesh))


def _evaluated(objective, batch_size=23, *, microbatches=1, sizes=(1, 1, 1), groups=None, alpha=1.0, wpo=False):
    mesh, step = _step(objective.needs_reference, sizes, alpha, wpo)
    of, shards = PAIRS if groups is None else groups, row_shards(mesh)
    order, limits = Order(drop_remainder=False), RowLimits(shards * microbatches)
    schedule = make_schedule(of, min(batch_size, len(of)), limits, order)
    source = step_source(schedule, mesh, schedule.steps_per_epoch, microbatches)
    with jax.set_mesh(mesh):
        params = [{"table": jax.device_put(np.float32(table), replicated(mesh))} for table in TABLES]
        sources = SOURCES if len(of) == len(PAIRS) else None
        return evaluate(lambda *rows: step(*params, *rows), make_set_values(objective), source, mesh, sources)


@functools.cache
def _truth():
    """The pairs' log-probabilities and lengths in float64, as `test_losses.EXPECTED` takes them, N of them."""
    sums = [np.array([[table[x].sum() for x in completions] for _, *completions in PAIRS.ids]) for table in TABLES]
    pairs = type("Pairs", (), {"p": sums[0], "r": sums[1], "n": PAIRS.lengths[:, 1:].astype(np.float64)})()
    pairs.w, pairs.l = (pairs.p - pairs.r).T
    return pairs


def _ranks(loss, x):
    """AOT's two, which `EXPECTED` has for its own number of pairs: the mean needs no order."""
    left, right = (x.p[:, 0] - x.p[:, 1], x.r[:, 0] - x.r[:, 1]) if loss == "aot" else (x.w, x.l)
    z = BETA * (np.sort(left) - np.sort(right))
    return 0.9 * np.logaddexp(0, -z) + 0.1 * np.logaddexp(0, z)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSS_FACTS)
def test_every_loss_is_the_float64_oracles_over_the_whole_set_at_any_batch_size(loss):
    x = _truth()
    smoothing = 0.1 if "label_smoothing" in LOSS_FACTS[loss].hyperparameters else 0.0
    values = _ranks(loss, x) if LOSS_FACTS[loss].across else EXPECTED[loss](x, BETA, smoothing)
    for batch_size in (1, 4, 16):
        found = _evaluated(_objective(loss), batch_size)
        assert found["dpo_loss"] == pytest.approx(values.mean(), rel=2e-5), batch_size
        assert found["pairs"] == len(PAIRS)


EVERY = ("sigmoid,sft,aot,ipo", "orpo,cpo,simpo,sft", "sigmoid wpo", "sigmoid ld_alpha", "SFT")


def _case(name):
    loss, _, option = name.partition(" ")
    if loss == "SFT":
        return sft_objective(), {"groups": FirstOnly(PAIRS)}
    more, given = {"wpo": ({"wpo": True}, {"wpo": True}), "ld_alpha": ({}, {"alpha": 0.4})}.get(option, ({}, {}))
    return _objective(loss, **more), given


@functools.cache
def _whole(name):
    objective, given = _case(name)
    return _evaluated(objective, **given)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("sizes", "microbatches"), [((2, 4, 1), 1), ((1, 2, 4), 2)])
def test_no_value_depends_on_the_mesh_and_the_microbatches(name, sizes, microbatches):
    objective, given = _case(name)
    found = _evaluated(objective, 16, microbatches=microbatches, sizes=sizes, **given)
    assert found == pytest.approx(_whole(name), rel=1e-5, abs=1e-6)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 30), st.sampled_from(EVERY))
def test_no_value_depends_on_the_batch_size(batch_size, name):
    objective, given = _case(name)
    assert _evaluated(objective, batch_size, **given) == pytest.approx(_whole(name), rel=1e-5, abs=1e-6)


def test_a_mean_is_over_what_the_tables_say():
    """Values of the parts of a set, weighted by what is counted there, are those of the whole."""
    halves = [_Part(PAIRS, (PAIRS.lengths[:, 1] > 2) == i) for i in (0, 1)]
    whole, *parts = (_evaluated(_objective("sigmoid,hinge,sft"), groups=of) for of in (PAIRS, *halves))
    counts = {"pairs": [len(half) for half in halves], "chosen tokens": [half.lengths[:, 1].sum() for half in halves]}
    checked = {}
    for name in whole:
        loss, metric = LOSS_FACTS.get(name.removeprefix("loss_")), METRICS.get(name)
        over = loss.over if loss else metric.over if metric else ""
        if over in counts:
            mean = np.average([part[name] for part in parts], weights=counts[over])
            assert whole[name] == pytest.approx(mean, rel=1e-5, abs=1e-6), name
            checked[name] = over
    assert checked["loss_sft"] == "chosen tokens"
    others = ("loss_sigmoid", "loss_hinge", "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logp")
    assert {checked[name] for name in others} == {"pairs"}
    sft, weights = [part["loss_sft"] for part in parts], counts["pairs"]
    assert abs(np.average(sft, weights=weights) - whole["loss_sft"]) > 5e-3  # another mean is another number


@dataclasses.dataclass(frozen=True)
class _Part:
    """Some of the groups."""

    whole: oracle.RandomGroups
    members: np.ndarray

    @property
    def lengths(self):
        return self.whole.lengths[self.members]

    def __len__(self):
        return int(self.members.sum())

    def __getitem__(self, i):
        return self.whole[int(np.flatnonzero(self.members)[i])]


def test_sources_are_means_over_their_own_pairs():
    x, found = _truth(), _evaluated(_objective("sigmoid"), 4)
    margin = BETA * (x.w - x.l)
    for name, members in SOURCES.items():
        assert found[f"margin/{name}"] == pytest.approx(margin[members].mean(), rel=1e-5)
        assert found[f"accuracy/{name}"] == pytest.approx((margin[members] > 0).mean())
        assert found[f"pairs/{name}"] == members.sum()

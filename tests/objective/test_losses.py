"""Losses: against float64 NumPy written from the papers, against TRL's trainers, and what the definitions promise."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.errors import UserError
from dpo_jax.objective.logps import Logps, sum_groups
from dpo_jax.objective.losses import LOSSES, Scored
from dpo_jax.objective.objective import DIVERGENCES, ld_weights, preference_objective
from dpo_jax.objective.table import LOSS_FACTS, needs_reference, parse_loss
from dpo_jax.objective.token_logps import TokenValues
from dpo_jax.rows.batch import Batch
from dpo_jax.rows.shape import RowShape
from dpo_jax.training.step import make_reference_sync
from tests import places

N = 64


def _log_sigmoid(x):
    return -np.logaddexp(0, -x)


def _sigmoid(x):
    return np.exp(_log_sigmoid(x))


def _dpo(z, e):
    return -(1 - e) * _log_sigmoid(z) - e * _log_sigmoid(-z)


def _nll(x):
    return -x.p[:, 0] / x.n[:, 0].mean()


def _log_odds(x):
    p = np.exp(x.p / x.n)
    return np.log(p / (1 - p))


def _expected_discopop(x, b, e):
    z = b * (x.w - x.l)
    m = _sigmoid(z / 0.05)
    return -(1 - m) * _log_sigmoid(z) + np.where(m > 0, m * np.exp(np.minimum(-z, 700)), 0)


def _expected_exo(x, b, e):
    p = _sigmoid(b * (x.w - x.l) * np.array([[1], [-1]]))
    q = np.array([[1 - e], [e]])
    return (p * (np.log(p) - np.log(q))).sum(0)


def _expected_aot(x, b, e):
    pi, ref = x.p[:, 0] - x.p[:, 1], x.r[:, 0] - x.r[:, 1]
    delta = np.empty(N)
    delta[np.argsort(pi)] = np.sort(pi) - np.sort(ref)
    return _dpo(b * delta, e)


def _expected_aot_unpaired(x, b, e):
    delta = np.empty(N)
    delta[np.argsort(x.w)] = np.sort(x.w) - np.sort(x.l)
    return _dpo(b * delta, e)


# (pairs, β, ε) → values; x.w and x.l are log-ratios, x.p and x.r log-probabilities, x.n token counts.
EXPECTED = {
    "sigmoid": lambda x, b, e: _dpo(b * (x.w - x.l), e),
    "robust": lambda x, b, e: (
        ((1 - e) * -_log_sigmoid(b * (x.w - x.l)) - e * -_log_sigmoid(b * (x.l - x.w))) / (1 - 2 * e)
    ),
    "hinge": lambda x, b, e: np.maximum(0, 1 - b * (x.w - x.l)),
    "ipo": lambda x, b, e: (x.w / x.n[:, 0] - x.l / x.n[:, 1] - 1 / (2 * b)) ** 2,
    "exo_pair": _expected_exo,
    "nca_pair": lambda x, b, e: -_log_sigmoid(b * x.w) - (_log_sigmoid(-b * x.w) + _log_sigmoid(-b * x.l)) / 2,
    "bco_pair": lambda x, b, e: -_log_sigmoid(b * x.w) - _log_sigmoid(-b * x.l),
    "sppo_hard": lambda x, b, e: (x.w - 1 / (2 * b)) ** 2 + (x.l + 1 / (2 * b)) ** 2,
    "aot": _expected_aot,
    "aot_unpaired": _expected_aot_unpaired,
    "apo_zero": lambda x, b, e: 1 - _sigmoid(b * x.w) + _sigmoid(b * x.l),
    "apo_down": lambda x, b, e: _sigmoid(b * x.w) + 1 - _sigmoid(b * (x.w - x.l)),
    "discopop": _expected_discopop,
    "sigmoid_norm": lambda x, b, e: -_log_sigmoid(b * (x.w / x.n[:, 0] - x.l / x.n[:, 1])),
    "sft": lambda x, b, e: _nll(x),
    "simpo": lambda x, b, e: _dpo(b * (x.p[:, 0] / x.n[:, 0] - x.p[:, 1] / x.n[:, 1]) - 0.5, e),
    "cpo": lambda x, b, e: _dpo(b * (x.p[:, 0] - x.p[:, 1]), e) + _nll(x),
    "orpo": lambda x, b, e: _nll(x) - b * _log_sigmoid(_log_odds(x)[:, 0] - _log_odds(x)[:, 1]),
}


class _Pairs:
    """Random pairs in float64 and as a loss takes them."""

    def __init__(self, seed=0, scale=30.0):
        rng = np.random.default_rng(seed)
        self.n = rng.integers(1, 40, (N, 2)).astype(np.float64)
        self.p, self.r = (-np.abs(rng.normal(80, scale, (N, 2))).astype(np.float32).astype(np.float64) for _ in "pr")
        self.w, self.l = (self.p - self.r).T

    def scored(self):
        p, r, n = (jnp.asarray(x, jnp.float32) for x in (self.p, self.r, self.n))
        return Scored(p, r, p - r, n, p[:, 0], n[:, 0].mean(), jnp.ones(N, bool))


def _loss(name, pairs, beta, smoothing=0.0):
    smoothed = {"label_smoothing": smoothing} if "label_smoothing" in LOSS_FACTS[name].hyperparameters else {}
    return LOSSES[name](pairs, **({} if name == "sft" else {"beta": beta}), **smoothed)


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("name", LOSSES)
def test_values(name, beta):
    smoothings = [0.0, 0.1, 0.4] if "label_smoothing" in LOSS_FACTS[name].hyperparameters else [0.0]
    for smoothing in [1e-3, 0.1] if name == "exo_pair" else smoothings:
        x = _Pairs()
        ours = _loss(name, x.scored(), beta, smoothing)
        assert ours.shape == (N,)
        np.testing.assert_allclose(ours, EXPECTED[name](x, beta, smoothing), rtol=2e-5, atol=2e-5)


# --- TRL

GOLDEN = np.load(places.GOLDEN / "trl" / "losses.npz")
CASES = [json.loads(case) for case in GOLDEN["cases"]]
TRL_METRICS = ("chosen_reward", "rejected_reward", "margin", "accuracy")


def _rows(case):
    """Where docs/losses.md says a case's differences: at its options, else at its loss."""
    options = [f"f_divergence={case['f_divergence']}"] if "f_divergence" in case else []
    return [*options, *(name for name in ("wpo", "ld_alpha") if name in case)] or [case["loss"]]


ROWS = sorted({row for case in CASES for row in _rows(case)})


def _golden_inputs():
    """Token values `[P, 2, N]` as `record_losses.inputs` made them."""
    lengths = GOLDEN["lengths"].astype(int)
    real = np.arange(lengths.max()) < lengths[..., None]
    out = {"lengths": lengths}
    for name in (f"{data}/{x}" for data in ("near", "far") for x in ("policy", "reference", "log_sum_sq")):
        out[name] = np.zeros(real.shape, np.float32)
        out[name][real] = GOLDEN[name]
    return out, real


def _batch(is_group, completion_tokens, segments=None):
    """Of a batch what objectives read."""
    is_group, completion_tokens = jnp.asarray(is_group), jnp.asarray(completion_tokens)
    tokens = jnp.zeros((len(is_group), 0), jnp.int32) if segments is None else segments
    return Batch(tokens, tokens, tokens, tokens, is_group, completion_tokens)


def _ours(case, data):
    """Our loss of a case, its gradient to every policy token `[P, 2, N]`, and the metrics: one pair a row."""
    P, _, width = data["near/policy"].shape
    real = np.arange(width) < data["lengths"][..., None]
    segments, is_group = jnp.asarray(real.reshape(P, 2 * width), jnp.int32), jnp.ones((P, 1), bool)
    batch = _batch(is_group, data["lengths"][:, None], segments)
    keys = ("f_divergence", "f_alpha", "wpo", "label_smoothing", "simpo_gamma", "cpo_alpha", "discopop_tau")
    options = {k: case[k] for k in keys if k in case}
    objective = preference_objective(parse_loss(case["loss"]), beta=case["dpo_beta"], **options)

    def logps(tokens, squares):
        tokens, squares = (None if x is None else x.reshape(P, 2 * width) for x in (tokens, squares))
        weights = ld_weights(case.get("ld_alpha", 1.0))
        return sum_groups(TokenValues(tokens, squares), batch, RowShape(0, (width, width)), weights)

    def mean_loss(tokens):
        policy, reference, squares = (
            tokens,
            *(jnp.asarray(data[f"{case['data']}/{x}"]) for x in ("reference", "log_sum_sq")),
        )
        values = objective.values(
            logps(policy, squares if "wpo" in case else None),
            logps(reference, None) if objective.needs_reference else None,
            batch,
            batch.completion_tokens.mean((0, 1)),
        )
        return values["dpo_loss"].mean(), {name: value.mean() for name, value in values.items()}

    tokens = jnp.asarray(data[f"{case['data']}/policy"])
    (loss, means), grad = jax.value_and_grad(mean_loss, has_aux=True)(tokens)
    return float(loss), np.where(real, grad, 0), [float(means[name]) for name in TRL_METRICS]


def _compare(case, ours, theirs, measured=None):
    """Values within 1e-5 of max(1, |loss|), gradients within 1e-4 of their largest component."""
    value = abs(ours[0] - theirs[0]) / max(1, abs(theirs[0]))
    grad = np.abs(ours[1] - theirs[1]).max() / np.abs(theirs[1]).max()
    for row in _rows(case) if measured else []:
        measured("losses", "value", row, value)
        measured("losses", "gradient", row, grad)
    assert value < 1e-5, case
    assert grad < 1e-4, case
    np.testing.assert_allclose(ours[2], theirs[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", ROWS)
def test_values_gradients_and_rewards_are_those_of_trl(row, measured):
    data, real = _golden_inputs()
    for i, case in enumerate(CASES):
        if _rows(case)[0] == row:
            grad = np.zeros(real.shape)
            grad[real] = GOLDEN["grad"][i]
            _compare(case, _ours(case, data), (GOLDEN["loss"][i], grad, GOLDEN["metrics"][i]), measured)


def test_every_loss_was_recorded():
    assert {name for case in CASES for name in parse_loss(case["loss"])} == set(LOSSES)


@pytest.mark.extras
@pytest.mark.parametrize("loss", [*LOSSES, "sigmoid:1.0,sft:0.2"])
def test_trl_itself_says_the_same(loss):
    """The trainers' code as installed (the `parity` extra), on one case of every loss."""
    pytest.importorskip("trl", reason="needs the parity extra: torch and trl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests.golden import record_losses

        case = next(case for case in record_losses.CASES if case["loss"] == loss)
        data = record_losses.inputs()
        theirs = record_losses.record(case, data)
    _compare(case, _ours(case, data), theirs)


@pytest.mark.extras
def test_trls_callback_moves_the_reference_as_ours_does():
    """TR-DPO's soft update, by `SyncRefModelCallback`."""
    pytest.importorskip("trl", reason="needs the parity extra: torch and trl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests.golden import record_losses

    rng = np.random.default_rng(0)
    reference, params = (rng.normal(size=(5, 3)).astype(np.float32) for _ in range(2))
    ours = make_reference_sync(0.6)({"w": jnp.asarray(reference)}, {"w": jnp.asarray(params)})["w"]
    np.testing.assert_allclose(ours, record_losses.moved_reference(reference, params, 0.6), rtol=1e-6, atol=1e-7)


# --- what the definitions promise


def test_equal_models_give_ln_2():
    x = _Pairs(1)
    x.r = x.p
    np.testing.assert_array_equal(_loss("sigmoid", x.scored(), 0.1), np.full(N, np.log(2), np.float32))


def test_swapping_a_pair_flips_the_labels_smoothing():
    x = _Pairs(2)
    expected = EXPECTED["sigmoid"](x, 0.1, 0.7)
    x.p, x.r = x.p[:, ::-1], x.r[:, ::-1]
    np.testing.assert_allclose(_loss("sigmoid", x.scored(), 0.1, 0.3), expected, rtol=1e-5)


def test_the_gradient_is_the_papers():
    """−β·σ(−β·h) on the chosen log-probability, its negative on the rejected (DPO, section 4)."""
    x = _Pairs(3)
    pairs = x.scored()
    grad = jax.grad(lambda p: _loss("sigmoid", pairs.replace(scores=p - pairs.reference), 0.1).sum())(pairs.policy)
    expected = -0.1 / (1 + np.exp(0.1 * (x.w - x.l)))
    np.testing.assert_allclose(grad, np.stack([expected, -expected], -1), rtol=1e-4, atol=1e-8)


# But for ipo, whose square of f-DPO's e^80 is beyond float32.
FINITE = [(name, f) for name, it in LOSS_FACTS.items() for f in DIVERGENCES if f == "reverse_kl" or it.divergence]
FINITE = [x for x in FINITE if x not in (("ipo", "forward_kl"), ("ipo", "alpha"))]


@pytest.mark.parametrize(("name", "divergence"), FINITE)
def test_extreme_log_probabilities_and_empty_places_stay_finite(name, divergence):
    """The last place holds no pair: zeros everywhere, which must not reach the gradient."""
    policy = jnp.asarray([[[-1.0, -9e3], [-9e3, -1.0], [-1e-7, -1e-7], [0.0, 0.0]]])
    reference = Logps(jnp.where(policy == 0, 0.0, -50.0))
    batch = _batch([[True, True, True, False]], [[[90, 90], [90, 90], [1, 1], [0, 0]]])
    smoothing = {"label_smoothing": 0.1} if name == "exo_pair" else {}
    objective = preference_objective({name: 1.0}, beta=0.5, f_divergence=divergence, **smoothing)

    def mean(policy):
        values = objective.values(
            Logps(policy), reference if objective.needs_reference else None, batch, jnp.full(2, 60.0)
        )
        return jnp.sum(jnp.where(batch.is_group, values["dpo_loss"], 0.0)) / 3

    loss, grad = jax.value_and_grad(mean)(policy)
    assert np.isfinite(loss)
    assert np.isfinite(np.asarray(grad)).all()
    np.testing.assert_array_equal(grad[0, 3], [0, 0])


@pytest.mark.parametrize("name", [name for name, loss in LOSS_FACTS.items() if loss.across])
def test_a_sorted_loss_does_not_see_places_without_a_pair(name):
    x = _Pairs(5)
    pairs, beta = x.scored(), 0.1
    place = np.random.default_rng(0).permutation(N + 9)
    spread = lambda v, fill: jnp.full((N + 9, *v.shape[1:]), fill, v.dtype).at[place[:N]].set(v)
    padded = Scored(
        *(spread(v, -1e3) for v in (pairs.policy, pairs.reference, pairs.scores)),
        spread(pairs.tokens, 1.0), spread(pairs.chosen_logp, 0.0), pairs.chosen_tokens, spread(pairs.is_pair, False),
    )  # fmt: skip
    ours = _loss(name, padded.replace(**_reshaped(padded, (8, 9))) if (N + 9) == 72 else padded, beta)
    np.testing.assert_allclose(np.asarray(ours).reshape(-1)[place[:N]], _loss(name, pairs, beta), rtol=1e-6)


def _reshaped(pairs, shape):
    names = ("policy", "reference", "scores", "tokens", "chosen_logp", "is_pair")
    return {name: getattr(pairs, name).reshape(*shape, *getattr(pairs, name).shape[1:]) for name in names}


def test_a_weighted_sum_is_the_sum_and_says_its_parts():
    logps = Logps(jnp.asarray([[[-3.0, -5.0]], [[-2.0, -9.0]]]))
    reference = Logps(jnp.asarray([[[-4.0, -4.0]], [[-3.0, -7.0]]]))
    batch = _batch(np.ones((2, 1), bool), np.full((2, 1, 2), 3))
    said = lambda parts: preference_objective(parts, beta=0.1).values(logps, reference, batch, jnp.full(2, 3.0))
    both = said(parse_loss("sigmoid:0.5, sft:2"))
    for name in ("sigmoid", "sft"):
        np.testing.assert_array_equal(both[f"loss_{name}"], said({name: 1.0})["dpo_loss"])
    np.testing.assert_allclose(both["dpo_loss"], 0.5 * both["loss_sigmoid"] + 2 * both["loss_sft"], rtol=1e-6)
    assert "loss_sigmoid" not in said({"sigmoid": 1.0})


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("dpo", "'dpo' does not exist; choose from sigmoid, robust"),
        ("sigmoid,", "'' does not exist"),
        ("sigmoid:1,sigmoid:2", "names sigmoid twice"),
        ("sigmoid:many", "weight 'many' of sigmoid is not a number above 0; write sigmoid:0.5"),
        ("sigmoid:", "weight '' of sigmoid"),
        ("sigmoid:-1", "weight '-1' of sigmoid"),
        ("sigmoid:inf", "weight 'inf' of sigmoid"),
    ],
)
def test_a_loss_that_cannot_be_read_is_said(loss, words):
    with pytest.raises(UserError, match=words):
        parse_loss(loss)


def test_only_reference_free_losses_have_no_reference():
    assert [name for name in LOSSES if not needs_reference([name])] == ["simpo", "cpo", "orpo"]
    assert not needs_reference(["simpo", "sft"])
    assert needs_reference(["sigmoid", "sft"])


def test_wpo_weighs_pairs_by_the_policy_alone_and_gives_the_weight_no_gradient():
    """Equation 2 of WPO with its sampled alignment, in float64; every part of a sum is weighted."""
    rng = np.random.default_rng(0)
    p, r, squares = -rng.uniform(5, 30, (3, 4, 1, 2))
    n = rng.integers(3, 9, (4, 1, 2))
    weight = np.exp(((p - squares) / n).sum(-1))
    batch = _batch(np.ones((4, 1), bool), n)
    reference = Logps(jnp.asarray(r, jnp.float32))

    def losses(p, wpo):
        policy = Logps(p, jnp.asarray(squares, jnp.float32))
        objective = preference_objective({"sigmoid": 1.0, "sft": 0.5}, beta=0.1, wpo=wpo)
        return objective.values(policy, reference, batch, jnp.full(2, 5.0))["dpo_loss"]

    p = jnp.asarray(p, jnp.float32)
    np.testing.assert_allclose(losses(p, True), weight * losses(p, False), rtol=1e-4)
    grads = [jax.grad(lambda p, on=on: losses(p, on).sum())(p) for on in (True, False)]
    np.testing.assert_allclose(grads[0], weight[..., None] * grads[1], rtol=1e-4)

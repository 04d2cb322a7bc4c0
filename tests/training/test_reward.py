"""Reward models: scores packed as unpacked and as float64, their loss by hand, and the files that they become."""

import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpo_jax.data.comparison import Comparison
from dpo_jax.data.prepare import DataRequest, prepare
from dpo_jax.errors import UserError
from dpo_jax.model.options import LayoutOptions
from dpo_jax.objective.logps import Logps
from dpo_jax.objective.objective import make_set_values, mean_tokens, reduced, reward_objective, together
from dpo_jax.objective.policy_logps import scores_fn
from dpo_jax.parallel.mesh import make_mesh, to_global
from dpo_jax.preference.load import load_preference_model
from dpo_jax.preference.models import swapped
from dpo_jax.preference.reward import load_reward_model
from dpo_jax.rows.build import build_rows
from dpo_jax.rows.shape import RowShape
from dpo_jax.training.reward import margins
from dpo_jax.weights.find import find_policy
from dpo_jax.weights.huggingface import save_weights
from dpo_jax.weights.load import load_whole
from tests import places

GOLDEN = places.ROOT / "tests" / "golden" / "reward"
TINY = GOLDEN / "tiny"
CAUSAL = places.ROOT / "tests" / "golden" / "trl" / "tiny"
ROWS = [json.loads(line) for line in (GOLDEN / "pairs.jsonl").read_text().splitlines()]
HAS_TORCH = importlib.util.find_spec("torch") is not None


def loaded(directory=TINY, mesh=(1, 1, 1), devices=None):
    devices = devices or jax.devices()[: int(np.prod(mesh))]
    policy = find_policy(str(directory), TINY, 0, scalar_head=True)
    return policy, *load_whole(policy, make_mesh(*mesh, devices), LayoutOptions())


def pairs(tmp_path, margin="margin"):
    policy = find_policy(str(TINY), tmp_path, 0, scalar_head=True)
    request = DataRequest(str(GOLDEN / "pairs.jsonl"), eval_pairs=0, cache_dir=str(tmp_path), reward_margin=margin)
    return prepare(request, policy.tokenizer).train


def first_gradients(tmp_path):
    """The gradients of the golden run `both` at its first step, by the names of the exported tensors."""
    policy, layout, params = loaded()
    held = pairs(tmp_path)
    shape = RowShape(64, (128, 128), 4, 1)
    batch = build_rows(held, np.arange(4)[:, None], shape)
    batch = batch._replace(margin=np.asarray(held.margin[:4], np.float32)[:, None])
    objective, scores = reward_objective(center=0.05), scores_fn(layout, remat="none", pad=policy.pad)

    def loss(params):
        values = objective.values(scores(params, batch.map(jnp.asarray), shape), None, batch, mean_tokens(batch))
        return values["loss"].mean()

    with jax.set_mesh(layout.mesh):
        gradients = jax.jit(jax.grad(loss))(params)
    save_weights(gradients, policy.hf_config(), tmp_path / "gradients", dtype="float32")
    return load_file(tmp_path / "gradients" / "model.safetensors")


def exact_scores(directory, groups, pad):
    """Scores by a float64 decoder, sequence by sequence, `[groups, n]`."""
    from tests.oracles import oracle

    _, layout, params = loaded(directory)
    score = np.asarray(params["score"], np.float64)[0]
    rows = []
    for prompt, *completions in groups:
        row = []
        for completion in completions:
            ids = np.concatenate([prompt, completion])
            hidden = oracle.hidden(params, ids, layout.config)
            row.append(hidden[np.flatnonzero(ids != (-1 if pad is None else pad))[-1]] @ score)
        rows.append(row)
    return np.array(rows)


@pytest.mark.sweep
@pytest.mark.parametrize(("mesh", "pad"), [
    ((2, 2, 2), "eos"), ((1, 1, 1), "pad"), ((1, 1, 1), "eos"), ((1, 1, 1), None), ((1, 8, 1), "eos"),
    ((8, 1, 1), "pad"),
])  # fmt: skip
def test_packed_scores_are_those_of_the_float64_oracle(pad, mesh, tmp_path):
    policy, layout, params = loaded(mesh=mesh)
    held = pairs(tmp_path)
    token = {"pad": policy.tokenizer.pad_token_id, "eos": policy.tokenizer.eos_token_id, None: None}[pad]
    scores = scores_fn(layout, remat="full", pad=token)
    shape = RowShape(96, (160, 160), 8, 2)
    placed = np.append(np.arange(14), [-1, -1]).reshape(8, 2)
    batch = build_rows(held, placed, shape).map(lambda x: x[None])
    with jax.set_mesh(layout.mesh):
        step = jax.jit(lambda p, b: scores(p, b.map(lambda x: x[0]), shape).logps)
        found = np.asarray(jax.device_get(step(params, to_global(batch, layout.mesh, 8))))
    exact = exact_scores(TINY, [held[i] for i in range(14)], token)
    np.testing.assert_allclose(found[placed >= 0], exact, rtol=1e-5, atol=1e-5)
    assert (found[placed < 0] == 0).all()


@pytest.mark.slow
def test_an_answer_of_nothing_but_padding_is_read_at_its_prompt():
    policy, layout, params = loaded()
    pad = policy.tokenizer.eos_token_id
    prompt, other = np.array([7, 8, 9], np.int32), np.array([10, 11], np.int32)
    shape = RowShape(8, (8, 8), 1, 1)
    batch = build_rows([(prompt, np.array([pad, pad], np.int32), other)], np.array([[0]]), shape)
    with jax.set_mesh(layout.mesh):
        found = scores_fn(layout, remat="none", pad=pad)(params, batch.map(jnp.asarray), shape).logps
    exact = exact_scores(TINY, [(prompt, np.zeros(0, np.int32), other)], None)
    np.testing.assert_allclose(found[0], exact, rtol=1e-5, atol=1e-5)


def test_the_loss_is_bradley_and_terrys():
    """By hand: -log sigmoid(2 - 0.5 - 1) + 0.1 * 2.5^2, and the extremes of two parts."""
    objective = reward_objective(center=0.1)
    scores = np.array([[[2.0, 0.5], [-1.0, 3.0]]], np.float32)
    groups = type("Groups", (), {"is_group": np.array([[True, True]]), "completion_tokens": np.ones((1, 2, 2), int),
                                 "margin": np.array([[1.0, 0.0]], np.float32)})  # fmt: skip
    values = objective.values(Logps(jnp.asarray(scores)), None, groups, None)
    first = np.log1p(np.exp(-0.5)) + 0.1 * 2.5**2
    second = np.log1p(np.exp(4.0)) + 0.1 * 2.0**2
    np.testing.assert_allclose(values["loss"], [[first, second]], rtol=1e-6)
    assert values["accuracy"].tolist() == [[1.0, 0.0]]
    both = {k: jnp.stack([v, v - 5]) for k, v in reduced(values, jnp.array([[True, False]])).items()}
    assert together(both)["min_reward"] == -4.5
    assert together(both)["max_reward"] == 2.0
    assert together(both)["margin"] == pytest.approx(1.5 - 3.5)


def test_values_of_a_set_are_those_of_its_pairs():
    values = make_set_values(reward_objective())(
        Logps(np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)), None, np.ones((2, 2), np.int32), np.array([0.5, 0], "f4")
    )
    np.testing.assert_allclose(values["loss"], [np.log1p(np.exp(-0.5)), np.log1p(np.exp(2.0))], rtol=1e-6)


@pytest.mark.parametrize(("margin", "row", "wanted"), [
    ("margin", {"margin": 1.5}, 1.5),
    ("scores", {"score_chosen": 2, "score_rejected": 8}, 6.0),
    ("gap", {"gap": -0.25}, -0.25),
])  # fmt: skip
def test_margins_come_from_the_rows(margin, row, wanted, tmp_path):
    file = tmp_path / "pairs.jsonl"
    bad = dict.fromkeys(("margin", "gap", "score_chosen", "score_rejected"))
    rows = [{**ROWS[0], "margin": 0, **row}, {**ROWS[1], **bad}, {**ROWS[2], "margin": 0, **row}]
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    tokenizer = find_policy(str(TINY), tmp_path, 0, scalar_head=True).tokenizer
    request = DataRequest(str(file), eval_pairs=0, cache_dir=str(tmp_path), reward_margin=margin, max_bad_fraction=1.0)
    done = prepare(request, tokenizer)
    assert margins(done.train)["margin"].tolist() == [np.float32(wanted)] * 2
    assert done.report["sources"][0]["dropped"] == {"bad_margin": 1}
    assert prepare(request, tokenizer).built is False
    assert margins(prepare(DataRequest(str(file), eval_pairs=0, cache_dir=str(tmp_path)), tokenizer).train) == {}


# ------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("name", ["v_head.summary.weight", "value_head.weight"])
def test_heads_of_other_names_load(name, tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    held = load_file(TINY / "model.safetensors")
    held[name] = held.pop("score.weight")
    held[name.removesuffix("weight") + "bias"] = np.array([0.25], np.float32)
    save_file(held, tmp_path / "model" / "model.safetensors")
    policy, _, params = loaded(tmp_path / "model")
    assert policy.head.bias == 0.25
    np.testing.assert_array_equal(params["score"], held[name])


@pytest.mark.parametrize(("change", "words"), [
    (lambda held: held.update({"score.weight": np.zeros((2, 48), np.float32)}), "2 labels"),
    (lambda held: held.pop("score.weight"), "no tensor is its head"),
    (lambda held: held.update({"v_head.0.weight": held.pop("score.weight")}), "'v_head.0.weight'"),
    (lambda held: held.update({"v_head.weight": held["score.weight"]}), "two heads"),
    (lambda held: held.update({"score.weight": np.zeros((1, 47), np.float32)}), "has shape (1, 47)"),
])  # fmt: skip
def test_a_wrong_head_is_one_line(change, words, tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    held = load_file(TINY / "model.safetensors")
    change(held)
    save_file(held, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UserError) as refused:
        loaded(tmp_path / "model")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_reward_model_is_no_policy_and_a_causal_one_no_judge():
    with pytest.raises(UserError, match="is a reward model"):
        find_policy(str(TINY), TINY, 0)
    with pytest.raises(UserError, match="a causal model, which has no head"):
        load_reward_model(str(CAUSAL))


def test_a_fresh_head_is_drawn_by_the_seed():
    policy, _, params = loaded(CAUSAL)
    assert policy.head.name == ""
    assert 0.01 < float(np.std(params["score"])) < 0.03
    assert "lm_head" not in params


@pytest.mark.extras
@pytest.mark.skipif(not HAS_TORCH, reason="needs torch, which is not here")
@pytest.mark.parametrize("pad", ["pad", "eos"])
def test_exported_scores_are_those_of_transformers(pad, tmp_path):
    import torch
    import transformers

    policy, _, params = loaded()
    hf = policy.hf_config() | {"pad_token_id": getattr(policy.tokenizer, f"{pad}_token_id")}
    save_weights(params, hf, tmp_path / "out", dtype="float32", tokenizer_from=TINY)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == 1
    judge = load_reward_model(str(tmp_path / "out"))
    answered = [(row["prompt"], row[side]) for row in ROWS[:12] for side in ("chosen", "rejected")]
    ours = judge.scores(answered)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [tokenizer.apply_chat_template([*p, *a], tokenize=False) for p, a in answered]
    tokenizer.pad_token_id = model.config.pad_token_id
    ids = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False, padding_side="right")
    with torch.no_grad():
        theirs = model(**{k: v for k, v in ids.items() if k != "token_type_ids"}).logits[:, 0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.slow
def test_a_judge_negates_its_verdict_where_sides_are_exchanged():
    judge = load_preference_model(str(TINY))
    asked = [Comparison(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS[:6]]
    verdicts = judge(asked)
    assert np.abs(verdicts).min() > 1e-3
    assert np.array_equal(judge([swapped(c) for c in asked]), -verdicts)
    scores = judge.scores([(c.prompt_conversation, c.completion_a) for c in asked])
    others = judge.scores([(c.prompt_conversation, c.completion_b) for c in asked])
    np.testing.assert_allclose(verdicts, 2 / (1 + np.exp(scores - others)) - 1, atol=1e-12)

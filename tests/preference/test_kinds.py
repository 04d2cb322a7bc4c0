"""Judges that are models: the implicit reward and the label of a causal model against float64, and their names."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpo_jax.config.judges import divided
from dpo_jax.data.comparison import Comparison, LabeledComparison
from dpo_jax.data.render import make_renderer
from dpo_jax.errors import UserError
from dpo_jax.model.options import LayoutOptions
from dpo_jax.parallel.mesh import make_mesh
from dpo_jax.preference.comparing import comparison_messages
from dpo_jax.preference.generative import label_tokens
from dpo_jax.preference.load import load_preference_model, model_names
from dpo_jax.preference.models import Ensemble, answered_of, disagreement, swapped
from dpo_jax.preference.questions import Questions, question_of
from dpo_jax.preference.scoring import answer_renderer, answer_tokens
from dpo_jax.weights.find import find_policy
from dpo_jax.weights.huggingface import save_weights
from dpo_jax.weights.load import load_whole
from tests import places
from tests.oracles import oracle

GOLDEN = places.ROOT / "tests" / "golden"
CAUSAL, REWARD = GOLDEN / "trl" / "tiny", GOLDEN / "reward" / "tiny"
ROWS = [json.loads(line) for line in (GOLDEN / "trl" / "pairs.jsonl").read_text().splitlines()]
ASKED = [Comparison(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS[:5]]
# A template as Gemma's, which has no system turns and wants user and assistant by turns.
STRICT = (
    "{% for m in messages %}{% if m['role'] not in ('user', 'assistant') %}{{ raise_exception('no such role') }}"
    "{% endif %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def loaded(directory):
    policy = find_policy(str(directory), CAUSAL, 0)
    return policy, *load_whole(policy, make_mesh(1, 1, 1, jax.devices()[:1]), LayoutOptions())


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The causal model with other weights: a reference."""
    policy, _, params = loaded(CAUSAL)
    out = tmp_path_factory.mktemp("reference") / "model"
    moved = jax.tree.map(lambda p: p * 0.9, params)
    save_weights(moved, policy.hf_config(), out, dtype="float32", tokenizer_from=CAUSAL)
    return out


def test_the_implicit_reward_is_that_of_the_float64_oracle(other):
    judge = load_preference_model(f"implicit:{CAUSAL},{other}", beta=0.5)
    answered = [one for c in ASKED for one in answered_of(c)]
    tokens = answer_tokens(answer_renderer(find_policy(str(CAUSAL), CAUSAL, 0).tokenizer), answered)
    exact = []
    for directory in (CAUSAL, other):
        _, layout, params = loaded(directory)
        exact.append([oracle.completion_logp(params, np.array(p), np.array(a), layout.config) for p, a in tokens])
    wanted = 0.5 * np.subtract(*exact)
    np.testing.assert_allclose(judge.scores(answered), wanted, atol=1e-4)
    np.testing.assert_allclose(judge(ASKED), np.tanh((wanted[1::2] - wanted[::2]) / 2), atol=1e-4)


def test_a_generative_verdict_is_the_softmax_over_the_labels_in_both_orders():
    judge = load_preference_model(str(CAUSAL))
    policy, layout, params = loaded(CAUSAL)
    renderer = make_renderer(policy.tokenizer, "chat", 10_000, 10_000)
    wanted = []
    for one in ASKED:
        values = []
        for order in (one, swapped(one)):
            (of,) = label_tokens(renderer, [order])
            logp = [oracle.completion_logp(params, np.array(p), np.array(a), layout.config) for p, a in of]
            p = np.exp(logp) / np.exp(logp).sum()
            values.append(p[1] - p[0])
        wanted.append((values[0] - values[1]) / 2)
    np.testing.assert_allclose(judge(ASKED), wanted, atol=1e-5)
    assert np.abs(wanted).max() > 1e-4
    assert np.array_equal(judge([swapped(one) for one in ASKED]), -judge(ASKED))


def test_labels_end_where_the_turn_does():
    tokenizer = find_policy(str(CAUSAL), CAUSAL, 0).tokenizer
    (labels,) = label_tokens(make_renderer(tokenizer, "chat", 10_000, 10_000), ASKED[:1])
    assert [tokenizer.decode(ids) for _, ids in labels] == ["A", "B", "Tie"]
    question = tokenizer.decode(labels[0][0])
    assert question == tokenizer.apply_chat_template(
        comparison_messages(ASKED[0]), tokenize=False, add_generation_prompt=True
    )


def test_a_template_without_system_turns_is_asked_in_one_turn():
    tokenizer = find_policy(str(CAUSAL), CAUSAL, 0).tokenizer
    tokenizer.chat_template = STRICT
    renderer = make_renderer(tokenizer, "chat", 10_000, 10_000)
    assert len(question_of(renderer)(ASKED[0])) == 1
    (labels,) = label_tokens(renderer, ASKED[:1])
    assert [tokenizer.decode(ids) for _, ids in labels] == ["A", "B", "Tie"]


def test_a_pair_is_asked_in_one_order_however_it_is_given():
    tokenizer = find_policy(str(CAUSAL), CAUSAL, 0).tokenizer
    renderer = make_renderer(tokenizer, "chat", 10_000, 10_000)
    pairs = [LabeledComparison(Comparison(r["prompt"], r["chosen"], r["rejected"]), "A") for r in ROWS]
    for seed in (0, 1):
        asked = Questions(renderer, seed).asked(pairs)
        assert Questions(renderer, seed).asked([pair.swap() for pair in pairs]) == asked
        first = [one.chosen[0]["content"] == "A" for one in asked]
        assert 0.25 < np.mean(first) < 0.75
        for pair, one, is_a in zip(pairs, asked, first, strict=True):
            turn = one.comparison.prompt_conversation[-4 if is_a else -2]
            assert turn["content"] == pair.chosen[0]["content"]
    assert Questions(renderer, 0).asked(pairs) != Questions(renderer, 1).asked(pairs)


def test_an_ensemble_is_the_mean_of_those_that_have_a_verdict():
    judge = load_preference_model(f"{REWARD},dpo_jax.preference.rules:shorter")
    assert isinstance(judge, Ensemble)
    each = judge.each(ASKED)
    np.testing.assert_allclose(judge(ASKED), each.mean(0))
    np.testing.assert_allclose(disagreement(each), each.std(0))
    assert disagreement(np.array([[0.5], [np.nan]])).tolist() != [0.0]


@pytest.mark.parametrize(("spec", "words"), [
    ("", "empty name"),
    ("gold,", "empty name"),
    ("implicit:a", "POLICY,REFERENCE"),
    ("./nowhere", "no such directory"),
    ("no.such.module:rule", "cannot be imported"),
])  # fmt: skip
def test_a_judge_that_is_not_there_is_one_line(spec, words):
    with pytest.raises(UserError) as refused:
        load_preference_model(spec)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_names_are_divided_but_for_the_pair_of_an_implicit_reward():
    assert divided("gold, implicit:a,b ,m:f") == ["gold", "implicit:a,b", "m:f"]


def test_an_option_that_a_judge_has_not_is_refused():
    with pytest.raises(UserError, match="the judge gold has no options"):
        load_preference_model("gold", concurrency=4)


def test_texts_alone_are_asked_in_both_orders_and_tools_go_along():
    tokenizer = find_policy(str(CAUSAL), CAUSAL, 0).tokenizer
    renderer = make_renderer(tokenizer, "chat", 10_000, 10_000)
    texts = [("", f"{i}: Why? So.", f"{i}: Why? No.") for i in range(24)]
    pairs = [LabeledComparison(Comparison((), (), (), texts=one), "A") for one in texts]
    first = [one.chosen[0]["content"] for one in Questions(renderer, 0).asked(pairs)]
    assert 4 <= first.count("A") <= 20
    tools = [{"type": "function", "function": {"name": "tide"}}]
    one = Comparison(*(ROWS[0][x] for x in ("prompt", "chosen", "rejected")), tools, {"enable_thinking": False})
    asked = Questions(renderer, 0).asked([LabeledComparison(one, "A")])[0].comparison
    assert (asked.tools, asked.chat_template_kwargs) == (tools, {"enable_thinking": False})


def test_a_template_that_keeps_one_system_turn_is_asked_in_one_turn():
    tokenizer = find_policy(str(CAUSAL), CAUSAL, 0).tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] != 'system' %}{{ '<|user|>' + m['content'] + '<|end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    assert len(question_of(make_renderer(tokenizer, "chat", 10_000, 10_000))(ASKED[0])) == 1


def test_a_head_beside_a_causal_models_tensors_is_found(tmp_path):
    shutil.copytree(REWARD, tmp_path / "model")
    held = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(held | {"architectures": ["LlamaForCausalLM"]}))
    tensors = load_file(REWARD / "model.safetensors")
    tensors["v_head.summary.weight"] = tensors.pop("score.weight")
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    ours, theirs = (load_preference_model(str(one))(ASKED) for one in (tmp_path / "model", REWARD))
    np.testing.assert_array_equal(ours, theirs)


def test_an_answer_that_looks_like_what_stands_beside_it_has_a_score():
    judge = load_preference_model(str(REWARD))
    said = lambda text: [{"role": "assistant", "content": text}]
    assert np.isfinite(judge.scores([(ROWS[0]["prompt"], said(x)) for x in ("1", " 1", "1\n", "2")])).all()


def test_padding_beyond_the_table_is_none():
    policy = find_policy(str(CAUSAL), CAUSAL, 0)
    assert policy.pad == policy.tokenizer.pad_token_id
    policy.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert policy.tokenizer.pad_token_id >= policy.config.vocab_size
    assert policy.pad == policy.tokenizer.eos_token_id


def test_the_models_of_a_name(tmp_path):
    spec = f"gold,implicit:a/b,{tmp_path},my:rule,http://host/v1|m,owner/name"
    assert model_names(spec) == ["a/b", str(tmp_path), "owner/name"]
    assert model_names("") == []

"""`dpo_jax.sample` from Python."""

import inspect
import subprocess
import sys

import numpy as np
import pytest

import dpo_jax
from dpo_jax.answering import api
from tests.places import GOLDEN

MODEL = GOLDEN / "trl/tiny"
ASKED = {"n": 2, "max_tokens": 4, "seed": 1}


@pytest.fixture(scope="module")
def policy():
    return dpo_jax.load_policy(MODEL)


@pytest.fixture(scope="module")
def answers(policy):
    return dpo_jax.sample(policy, ["good", [{"role": "user", "content": "bad"}]], **ASKED)


def test_texts_messages_and_token_ids_are_prompts(policy, answers):
    tokenizer = policy[0].tokenizer
    ids = [
        tokenizer.apply_chat_template([{"role": "user", "content": x}], add_generation_prompt=True, return_dict=False)
        for x in ("good", "bad")
    ]
    assert dpo_jax.sample(policy, ids, **ASKED) == answers
    assert dpo_jax.sample(policy, [np.array(ids[0]), "bad"], **ASKED) == answers
    assert [len(one) for one in answers] == [2, 2]
    assert all(len(answer.token_ids) == len(answer.logprobs) <= 4 for one in answers for answer in one)
    assert answers[0][0].text == tokenizer.decode(answers[0][0].token_ids, skip_special_tokens=True)


def test_a_stream_gives_answers_as_they_end(policy, answers):
    stream = dpo_jax.sample(policy, ["good", "bad"], stream=True, **ASKED)
    assert {(one.prompt, one.sample): one.answer for one in stream} == {
        (i, k): answer for i, one in enumerate(answers) for k, answer in enumerate(one)
    }


def test_what_was_compiled_serves_the_next_call(policy, answers):
    before = api._samplers[-1]
    dpo_jax.sample(policy, ["good"], **ASKED)
    assert api._samplers[-1] is before


@pytest.mark.parametrize(
    ("prompts", "asked", "words"),
    [
        (["good", " "], {}, "prompt 2: the prompt is empty or blank"),
        ([[]], {}, "prompt 1: the prompt is empty"),
        ([[1, 300]], {}, "prompt 1: the prompt has token 300, and the model's table has 300 rows"),
        ([[1] * 512], {}, "prompt 1: the prompt has 512 tokens, and the model 512 positions"),
        (["good"], {"n": 0}, "n=0; needs at least 1"),
        (["good"], {"top_p": 0}, "top_p=0; needs more than 0"),
        (["good"], {"prompt_format": "letter"}, "prompt_format='letter'"),
    ],
)
def test_what_cannot_be_answered_is_refused(policy, prompts, asked, words):
    with pytest.raises(dpo_jax.UserError, match=words):
        dpo_jax.sample(policy, prompts, **asked)


def test_no_prompts_have_no_answers(policy):
    assert dpo_jax.sample(policy, []) == []


def test_the_name_is_the_functions_and_the_modules():
    assert callable(dpo_jax.sample)
    assert inspect.signature(dpo_jax.sample) == inspect.signature(api.sample)


@pytest.mark.parametrize(
    "program",
    [
        "import dpo_jax; f = dpo_jax.sample; import dpo_jax.sample; g = dpo_jax.sample",
        "import dpo_jax.sample; g = dpo_jax.sample; from dpo_jax import sample as f",
        "from dpo_jax.sample import main; import dpo_jax; f = g = dpo_jax.sample",
    ],
)
def test_both_orders_of_import(program):
    tell = "\nimport sys\nassert f is g and callable(f) and f.main\nassert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program + tell], check=True)

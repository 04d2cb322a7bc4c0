"""Small inputs of other tools whose rendering once went wrong, where the shared folder has them: the right values."""

import json

import pytest

from dpo_jax.data.comparison import Skip
from dpo_jax.data.forms.reader import parse_own
from dpo_jax.data.prepare import DataRequest, prepare
from dpo_jax.data.render import make_renderer, render_batch
from tests import places
from tests.data.small_tokenizers import small_tokenizer
from tests.data.test_render import CHATML, bpe_tokenizer, ids, trl_ids

CASES = places.SHARED.parent / "cases" / "rendering"
pytestmark = pytest.mark.skipif(not CASES.exists(), reason="the shared folder's cases are not beside the repository")
TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def rows(name):
    return [json.loads(line) for line in (CASES / name).read_text().splitlines()]


def rendered(name, form="chat", template=TOOLS, kind="GPT-2"):
    """The tokenizer, the parsed rows, and what they are rendered to."""
    tokenizer = small_tokenizer(kind, template)
    pairs = [parse_own(row) for row in rows(name)]
    assert not [pair for pair in pairs if isinstance(pair, Skip)]
    return tokenizer, pairs, render_batch(make_renderer(tokenizer, form, 10**6, 10**6), pairs)


def decoded(tokenizer, one):
    return [tokenizer.decode(part) for part in ids(one)]


@pytest.mark.parametrize(
    "name",
    [
        "tools",
        "same_text_other_call",
        "reasoning",
        "rows",
        "with_system",
        "tool_turn",
        "prompt_string_multi_turn_answers",
    ],
)
def test_rows_of_messages_are_trls(name):
    tokenizer, pairs, got = rendered(f"{name}.jsonl")
    for pair, one in zip(pairs, got, strict=True):
        assert ids(one) == trl_ids(tokenizer, pair)
        assert not one.notes or one.notes == ("unread enable_thinking",) or one.notes == ("unread name",)


def test_tools_calls_and_reasoning_reach_the_text():
    tokenizer, _, got = rendered("tools.jsonl")
    prompt = decoded(tokenizer, got[0])[0]
    assert "Height of the tide in metres." in prompt
    assert '<tool_call>{"name": "tide_height", "arguments": {"port": "Brest"}}</tool_call>' in prompt
    tokenizer, _, got = rendered("same_text_other_call.jsonl")
    _, chosen, rejected = decoded(tokenizer, got[0])
    assert '"port": "Brest"' in chosen
    assert '"port": "Oslo"' in rejected
    tokenizer, _, got = rendered("reasoning.jsonl")
    assert decoded(tokenizer, got[0])[1] == "<think>\n12*10 + 12*2 = 144.\n</think>\n\n144.<|im_end|>"


def test_system_history_and_a_prompt_before_several_turns_are_in_the_prompt():
    tokenizer, _, got = rendered("system.jsonl")
    assert decoded(tokenizer, got[0])[0].startswith(
        "<|im_start|>system\nYou are captain 0. Answer in one word.<|im_end|>"
    )
    tokenizer, _, got = rendered("alpaca_history.jsonl")
    prompt = decoded(tokenizer, got[0])[0]
    assert [part for part in ("You are captain 0.", "My ship is the Elba.", "Noted.") if part not in prompt] == []
    tokenizer, _, got = rendered("prompt_string_multi_turn_answers.jsonl")
    prompt, chosen, _ = decoded(tokenizer, got[0])
    assert "My name is Bo and I live in house 0." in prompt
    assert chosen.startswith("Hello Bo.<|im_end|>")
    assert chosen.endswith("House 0.<|im_end|>")


def test_transcripts_have_one_blank_and_one_end():
    tokenizer, _, whole = rendered("hh_whole.jsonl", "plain")
    _, _, split = rendered("hh_prompt.jsonl", "plain")
    assert [ids(one) for one in whole] == [ids(one) for one in split]
    assert decoded(tokenizer, whole[0])[1] == f" In harbour 0.{tokenizer.eos_token}"
    tokenizer, _, got = rendered("eos_in_text.jsonl", "plain", kind="SentencePiece BPE, Llama")
    assert got[0].chosen.count(tokenizer.eos_token_id) == 1 == got[0].rejected.count(tokenizer.eos_token_id)
    assert (got[0].chosen[-1], got[0].rejected[-1]) == (tokenizer.eos_token_id,) * 2


def test_a_template_that_fails_on_one_row_or_without_a_system_turn(tmp_path):
    needs = bpe_tokenizer("{{ raise_exception('no system turn') if messages[0].role != 'system' }}" + CHATML)
    request = {"eval_pairs": 0, "cache_dir": str(tmp_path)}
    found = prepare(DataRequest(str(CASES / "with_system.jsonl"), **request), needs).report["sources"][0]
    assert found["kept"] == found["read"]
    lines = (CASES / "tool_turn.jsonl").read_text().splitlines()
    (bad,) = (number for number, line in enumerate(lines, 1) if '"tool"' in line)
    fails = bpe_tokenizer(
        "{% for m in messages %}{% if m.role == 'tool' %}{{ 1 + m.content }}{% endif %}{% endfor %}" + CHATML
    )
    found = prepare(DataRequest(str(CASES / "tool_turn.jsonl"), **request), fails).report["sources"][0]
    assert (found["kept"], found["dropped"]) == (len(lines) - 1, {"template_error": 1})
    assert f"tool_turn.jsonl:{bad}: TypeError" in found["examples"]["template_error"]

"""Which tokens end an answer, by the tokenizer's template and the model's files: no answer of the data is asked."""

import json
import re
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_jax.errors import UserError
from dpo_jax.weights.stops import stop_tokens, write_generation_config

_TURNS = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
# Template, its tokens, and what ends an answer besides eos.
TEMPLATES = {
    "a newline behind it is none": (CHATML, ["<|im_start|>", "<|im_end|>"], ["<|im_end|>"]),
    "an eos behind the last turn too": (
        _TURNS + "{% if not add_generation_prompt %}\n{{ eos_token }}{% endif %}",
        ["<|user|>", "<|assistant|>", "<|end|>"],
        ["<|end|>"],
    ),
    "two tokens": (
        "{% for m in messages %}<|turn|>{{ m['content'] }}<|said|><|over|>{% endfor %}",
        ["<|turn|>", "<|said|>", "<|over|>"],
        ["<|over|>"],
    ),
    "another one behind the last turn": (
        "{% for m in messages %}<|start|>{{ m['content'] }}"
        "{% if loop.last and m['role'] == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}",
        ["<|start|>", "<|end|>", "<|return|>"],
        ["<|return|>"],
    ),
    "only the next turn ends it": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}",
        ["<|user|>", "<|assistant|>"],
        ["<|user|>"],
    ),
    "eos alone": ("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}", [], []),
    "nothing": ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", ["<|a|>"], []),
    "a system turn is demanded": (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML,
        ["<|im_start|>", "<|im_end|>"],
        ["<|im_end|>"],
    ),
    "no second question is taken": (
        "{% if messages | length > 2 %}{{ messages.nothing.there }}{% endif %}" + CHATML,
        ["<|im_start|>", "<|im_end|>"],
        ["<|im_end|>"],
    ),
    "of several templates each": (
        {"default": CHATML, "tool_use": _TURNS},
        ["<|im_start|>", "<|im_end|>", "<|user|>", "<|end|>"],
        ["<|im_end|>", "<|end|>"],
    ),
    "everything is refused": ("{{ raise_exception('no') }}", ["<|im_end|>"], []),
    "a call ends otherwise": (
        "{% for m in messages %}{% if m.tool_calls %}[{{ m.tool_calls[0].function.arguments | tojson }}]<|call|>"
        "{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}",
        ["<|end|>", "<|call|>"],
        ["<|end|>", "<|call|>"],
    ),
    "a bracket of the call is none": (
        "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments | tojson }}<|value|></call>"
        "{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}",
        ["<|end|>", "<|value|>"],
        ["<|end|>"],
    ),
}


def _tokenizer(template, special, plain=("</call>",)):
    """One id a letter would do: only the tokens of their own matter, which no special_tokens_map names."""
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_tokens([AddedToken(text, special=True) for text in special])
    backend.add_tokens([AddedToken(text) for text in plain])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_the_template_ends_a_turn_with(name):
    template, special, expected = TEMPLATES[name]
    tokenizer = _tokenizer(template, special)
    assert set(tokenizer.all_special_tokens) == {"<eos>", "<unk>"}  # the others only tokenizer.json flags
    assert tokenizer.convert_ids_to_tokens(stop_tokens(tokenizer, None, 100)) == ["<eos>", *expected]


def test_without_a_template_it_is_eos_and_without_one_nothing():
    tokenizer = _tokenizer(None, ["<|im_end|>"])
    assert stop_tokens(tokenizer, None, 100) == [1]
    tokenizer.eos_token = None
    assert stop_tokens(tokenizer, None, 100) == [-1]


@pytest.mark.parametrize(("said", "expected"), [(7, [7, 1, 3]), ([3, 9], [3, 9, 1]), ([], [1, 3]), (None, [1, 3])])
def test_the_models_own_come_first(said, expected, tmp_path):
    tokenizer = _tokenizer(CHATML, ["<|im_start|>", "<|im_end|>"])
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 3
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert stop_tokens(tokenizer, tmp_path, 100) == [5, 1, 3]  # as transformers reads a model without the other file
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
    assert stop_tokens(tokenizer, tmp_path, 100) == expected
    assert stop_tokens(tokenizer, tmp_path, 4) == [i for i in expected if i < 4]  # what the model cannot say


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"eos_token_id": "</s>"}', 'eos_token_id is "</s>", must be a valid integer'),
        ('{"eos_token_id": [1, true]}', r"eos_token_id\.1 is true, must be a valid integer"),
        ("[]", "generation_config.json"),
        ("{", "generation_config.json"),
    ],
)
def test_damaged_files_are_one_line(text, words, tmp_path):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=words) as e:
        stop_tokens(_tokenizer(None, []), tmp_path, 100)
    assert "\n" not in str(e.value)


def test_an_export_names_all_of_them_and_keeps_the_rest(tmp_path):
    before, path = tmp_path / "model", tmp_path / "generation_config.json"
    before.mkdir()
    written = lambda: json.loads(path.read_text())
    write_generation_config(path, None, [-1], {})
    assert not path.exists()
    write_generation_config(path, before, [4, 2], {"bos_token_id": 1, "pad_token_id": None, "eos_token_id": 4})
    assert written() == {"bos_token_id": 1, "eos_token_id": [4, 2]}
    (before / "generation_config.json").write_text(
        json.dumps({"temperature": 0.6, "eos_token_id": 4, "pad_token_id": 0})
    )
    write_generation_config(path, before, [4, 2], {"bos_token_id": 1})
    assert written() == {"temperature": 0.6, "eos_token_id": [4, 2], "pad_token_id": 0}
    write_generation_config(path, before, [4], {})
    assert written()["eos_token_id"] == 4
    write_generation_config(path, before, [-1], {})
    assert written() == {"temperature": 0.6, "eos_token_id": 4, "pad_token_id": 0}


# Of the templates in TRL's wheel: what ends an answer of the model that the template is of, eos aside.
TRL = {
    "cohere": "<|END_OF_TURN_TOKEN|>", "cohere2": "<|END_OF_TURN_TOKEN|>", "deepseekv3": "<｜end▁of▁sentence｜>",
    "gemma": "<end_of_turn>", "gemma3": "<end_of_turn>", "glm4moe": "<|user|>", "gptoss": "<|return|> <|call|>",
    "lfm2": "<|im_end|>", "llama3": "<|eot_id|>", "llama3_1": "<|eot_id|>", "llama3_2": "<|eot_id|>",
    "phi3": "<|end|>", "phi3_5": "<|end|>", "qwen2_5": "<|im_end|>", "qwen3": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
}  # fmt: skip


@pytest.mark.extras
def test_the_published_templates():
    trl = pytest.importorskip("trl", reason="needs the parity extra: trl")
    directory = Path(trl.__file__).parent / "chat_templates"
    for name, expected in TRL.items():
        template = (directory / f"{name}.jinja").read_text()
        found = sorted(set(re.findall(r"<[|｜][^<>'\"{}\s]*?[|｜]>|<\w+_of_\w+>", template)))
        tokenizer = _tokenizer(template, found, ["</tool_call>", "</arg_value>", "</think>"])
        tokenizer.bos_token = "<unk>"  # some templates write one
        tokens = tokenizer.convert_ids_to_tokens(stop_tokens(tokenizer, None, 1000))
        assert tokens == ["<eos>", *expected.split()], name

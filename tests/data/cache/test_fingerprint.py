"""What a cache is known by: everything that decides token ids, and nothing that does not."""

import copy
import json
import pkgutil

import pytest
import tokenizers

import dpo_jax.data
from dpo_jax.data.cache import fingerprint
from dpo_jax.data.cache.fingerprint import DECIDE_NOTHING, deciding_modules, identity
from dpo_jax.data.render import make_renderer
from dpo_jax.data.sources import DataSources
from tests.data.test_render import bpe_tokenizer

MODULES = deciding_modules()


@pytest.mark.parametrize("name", MODULES)
def test_words_decide_nothing_and_statements_everything(name, tmp_path):
    text, file = MODULES[name].read_text(), tmp_path / "module.py"

    def code(changed):
        file.write_text(changed)
        return fingerprint._our_code({name: file})

    before = fingerprint._our_code({name: MODULES[name]})
    assert code(text) == before
    assert code(text + "\n\n# a comment\n") == before
    if '"""' in text:
        assert code(text.replace('"""', '"""Other words. ', 1)) == before
    if import_line := next((x for x in text.splitlines() if x.startswith(("from dpo_jax.", "from typing"))), ""):
        moved = import_line.replace("dpo_jax.data", "dpo_jax.elsewhere") + "  # moved"
        assert code(text.replace(import_line, moved)) == before
    changed = text + "x = 1\n"
    assert code(changed) not in (before, code(changed + "x = 2\n"))
    assert code(text + 'x = "# no comment"\n') != code(text + 'x = "# no comment, too"\n')


def test_every_module_decides_unless_it_is_said_not_to():
    there = {module.name for module in pkgutil.iter_modules(dpo_jax.data.__path__)}
    assert {"render", "cuts", "template", "tokenise", "comparison", "datasets", "files"} <= set(MODULES)
    assert not {name for name in MODULES if name.partition(".")[0] in DECIDE_NOTHING}
    assert {name.partition(".")[0] for name in MODULES} | DECIDE_NOTHING >= there


def key(tokenizer, *options, **named):
    return identity(DataSources((), ()), make_renderer(tokenizer, *options, **named), True)


def test_whatever_decides_ids_is_part_of_it():
    base = bpe_tokenizer()
    keys = [key(base), key(base, "chat"), key(base, "plain"), key(base, "text"), key(base, "chat", 7)]
    several = copy.deepcopy(base)
    several.chat_template = {"default": base.chat_template, "other": "{{ bos_token }}" + base.chat_template}
    keys += [key(several), key(several, chat_template="other")]
    third = copy.deepcopy(several)
    third.chat_template["other"] += " "
    keys.append(key(third))
    rules = json.loads(base.backend_tokenizer.to_str())
    rules["added_tokens"][1]["rstrip"] = True  # as Phi-3's end of turn
    swallows = copy.deepcopy(base)
    swallows._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(rules))
    keys.append(key(swallows))
    named = copy.deepcopy(base)
    named.pad_token = "<|im_end|>"  # a template may write it
    keys.append(key(named))
    assert len({str(one) for one in keys}) == len(keys)
    assert key(copy.deepcopy(base)) == keys[0]
    assert key(base, "chat", overlong="truncate") == keys[1]


def test_a_template_with_a_date_is_known_by_its_day():
    dated, plain = bpe_tokenizer("{{ strftime_now('%d %B %Y') }}" + bpe_tokenizer().chat_template), bpe_tokenizer()
    first, second = (key(dated, template_date=f"2026-07-{day}") for day in (26, 27))
    assert first["template_date"] == "2026-07-26"
    assert first["rendered"] != second["rendered"]
    assert key(plain, template_date="2026-07-26") == key(plain)


def test_a_template_that_refuses_every_probe_has_a_key():
    refuses = bpe_tokenizer("{{ raise_exception('never') }}")
    assert key(refuses) != key(bpe_tokenizer("{{ messages[9].content + 1 }}"))
    assert key(refuses) == key(refuses)

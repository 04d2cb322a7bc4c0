"""Chat templates are programs of others: they render as in transformers, and never for longer than they may."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers

from dpo_jax.data import rendering
from dpo_jax.data.cuts import encode
from dpo_jax.data.render import make_renderer, render_batch
from dpo_jax.data.rendering import TemplateRefusal, render_jobs
from dpo_jax.data.template import choose_template
from dpo_jax.errors import UserError
from tests.data.test_render import bpe_tokenizer

ASK = [{"role": "user", "content": "hi"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def brief(monkeypatch):
    """Templates have a third of a second."""
    rendering.end_process()
    monkeypatch.setattr(rendering, "SECONDS", 0.3)
    yield
    rendering.end_process()


def ask(source, **more):
    tokenizer = bpe_tokenizer(source)
    return render_jobs(tokenizer, [{"conversation": ASK, "chat_template": source, **more}])[0]


def test_texts_are_those_of_transformers():
    source = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m['content'] | trim }}{{ m.reasoning_content }}"
        "{{ m.tool_calls | default(0) | tojson }}{% endfor %}{{ tools | tojson(indent=1) }}"
        "{% if add_generation_prompt %}>{% endif %}"
        "{{ documents }}{{ enable }}{% generation %}x{% endgeneration %}{% if loop %}{% endif %}"
    )
    tokenizer = bpe_tokenizer(source)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    said = [*ASK, {"role": "assistant", "content": " é😀\n", "thinking": "so", "tool_calls": [tool]}]
    jobs = [
        {"conversation": said, "chat_template": source, "tools": tools, "add_generation_prompt": prompt, **more}
        for tools in (None, [tool])
        for prompt in (True, False)
        for more in ({}, {"enable": True, "documents": [{"title": "a", "text": "b"}]})
    ]
    expected = [tokenizer.apply_chat_template(tokenize=False, **job) for job in jobs]
    assert render_jobs(tokenizer, jobs) == expected
    assert len(set(expected)) == len(jobs)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("{{ raise_exception('no') }}", "TemplateError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ x.y }}", "UndefinedError"),
    ],
)
def test_what_a_template_raises_comes_back(source, kind):
    refusal = ask(source)
    assert isinstance(refusal, TemplateRefusal)
    assert refusal.kind == kind


WHERE = "tokenizer_config.json: chat_template: the chat template"


@pytest.mark.parametrize(
    "source",
    [LOOP, pytest.param("{{ (7 ** 99999999) | string }}", marks=pytest.mark.slow)],
)
def test_a_template_that_does_not_end_is_ended(source, brief):
    with pytest.raises(UserError, match=rf"{WHERE} takes more than 0.3 s for one conversation; mend it"):
        ask(source)
    assert ask("{{ messages[0].content }}") == "hi"  # by another process


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ 'a' * 99999999999 }}", "takes more than 1 GB"),
        ("{{ 'a' | center(99999999999) }}", "takes more than 1 GB"),
        ("{{ 'a' * 9000000 }}", "writes more than a million characters"),
    ],
)
def test_a_template_that_eats_memory_or_writes_for_ever_is_a_users_error(source, words):
    with pytest.raises(UserError, match=rf"{WHERE} {words}") as caught:
        ask(source)
    assert "\n" not in str(caught.value)
    assert ask("{{ messages[0].content }}") == "hi"


@pytest.mark.parametrize("source", ["{{ 'a' * 99999999999 }}", "{% for a in range(99999) %}" * 2 + "{% endfor %}" * 2])
def test_a_template_of_a_row_costs_that_row_alone(source):
    """Also where it ends the process: those behind it are rendered by another."""
    tokenizer = bpe_tokenizer("{{ messages[0].content }}")
    jobs = [{"conversation": ASK, "chat_template": one} for one in ("{{ 'x' }}", source, "{{ 'y' }}")]
    before, refused, behind = render_jobs(tokenizer, jobs)
    assert (before, behind) == ("x", "y")
    assert isinstance(refused, TemplateRefusal)
    assert str(refused).startswith("the chat template takes more than")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% import 'x' as y %}", "no loader"),
        ("{% extends 'x' %}", "no loader"),
        ("{{ messages | nosuch }}", "No filter named 'nosuch'"),
        ("{% nosuch %}", "unknown tag 'nosuch'"),
        ("{{ messages", "unexpected end of template"),
        ("{{ cycler.__init__.__globals__.os }}", "SecurityError"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "RecursionError"),
    ],
)
def test_a_template_that_renders_nothing_is_refused_with_its_place(source, words):
    with pytest.raises(UserError, match=f"chat_template: the chat template cannot be rendered .*{words}") as caught:
        choose_template(bpe_tokenizer(source))
    assert "\n" not in str(caught.value)


def test_a_broken_template_is_in_nobodys_way_where_none_is_used(pairs_of_text):
    renderer = make_renderer(bpe_tokenizer("{{ messages"), prompt_format="plain")
    assert render_batch(renderer, pairs_of_text)[0].prompt


@pytest.fixture
def pairs_of_text():
    from dpo_jax.data.comparison import Comparison, LabeledComparison

    say = lambda text: ({"role": "assistant", "content": text},)
    return [LabeledComparison(Comparison(tuple(ASK), say("hello"), say("no")), "A")]


def test_half_a_character_is_a_refusal():
    tokenizer = bpe_tokenizer("{{ '\\ud800' }}")
    (said,) = render_jobs(tokenizer, [{"conversation": list(ASK), "chat_template": tokenizer.chat_template}])
    assert isinstance(said, TemplateRefusal)
    assert str(said) == r"it writes half a character (\ud800)"


def test_a_tokenizer_that_panics_is_a_users_error(capfd):
    tokenizer = bpe_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex("(x+x+)+y"), "isolated"
    )
    with pytest.raises(UserError, match=r"fails on a text .*retry-limit-in-match over"):
        encode(tokenizer, ["x" * 2000])
    capfd.readouterr()  # what Rust says of it


@pytest.mark.slow
def test_the_process_ends_with_the_one_that_asks():
    program = """
import os, signal, sys
from dpo_jax.data import rendering
from dpo_jax.data.cuts import encode
class Tokenizer: name_or_path, special_tokens_map, chat_template = ".", {}, "{{ 1 }}"
job = {"conversation": [{"role": "user", "content": ""}], "chat_template": "{{ 1 }}"}
assert rendering.render_jobs(Tokenizer, [job]) == ["1"]
print(rendering._RUNNING[0]._run.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    pid = int(done.stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":  # nobody waits for it here
            return
        time.sleep(0.05)
    pytest.fail("it is still there")

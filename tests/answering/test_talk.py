"""Typed prompts: a conversation that grows, begins again, and survives what cannot be answered."""

import dataclasses

import pytest

from dpo_jax.answering.flags import parse_request
from dpo_jax.answering.ready import make_prompt_renderer
from dpo_jax.answering.talk import Asked, converse
from dpo_jax.model.config import ModelConfig
from dpo_jax.sampling.engine import Sampled
from dpo_jax.sampling.params import Answer
from tests.data.test_render import CHATML, bpe_tokenizer


@dataclasses.dataclass
class Parrot:
    """Stands for a sampler: an answer says how many tokens its prompt has."""

    layout: object
    asked: list = dataclasses.field(default_factory=list)

    def sample(self, params, prompts, asked, ids):
        self.asked.append((prompts[0], ids[0]))
        for k in reversed(range(asked.n)):
            yield Sampled(0, k, Answer(f" {len(self.asked)}.{k}", [1], "stop", 1, 0.0, [0.0], [0.0]))


@pytest.fixture
def ask(monkeypatch):
    def converse_with(template, typed, *flags):
        tokenizer = bpe_tokenizer(template)
        config = ModelConfig("llama", len(tokenizer), 8, 8, 1, 1, 1, 8, tie_word_embeddings=True)
        config = dataclasses.replace(config, max_position_embeddings=100)
        layout = type("Layout", (), {"config": config, "dtype": "float32", "platform": "cpu"})()
        parrot, lines = Parrot(layout), iter(typed)

        def next_line():
            try:
                return next(lines)
            except StopIteration:
                raise EOFError from None

        renderer = make_prompt_renderer(tokenizer, "auto", "")
        converse(parse_request(["sample", "--model=x", *flags]), Asked(parrot, {}), renderer, next_line)
        return [tokenizer.decode(ids) for ids, _ in parrot.asked], [name for _, name in parrot.asked]

    return converse_with


def turns(*texts):
    roles = ["user", "assistant"] * len(texts)
    said = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in zip(roles, texts, strict=False))
    return said + "<|im_start|>assistant\n"


def test_a_conversation_grows_until_it_begins_anew(ask, capsys):
    prompts, names = ask(CHATML, ["a", "", "b", "/new", "c"])
    assert prompts == [turns("a"), turns("a", "1.0", "b"), turns("c")]
    assert len(set(names)) == 3
    assert capsys.readouterr().out.split() == ["1.0", "2.0", "3.0"]


def test_what_cannot_be_answered_is_told_and_left_out(ask, capsys):
    prompts, _ = ask(CHATML, ["a", "x y " * 100, "b"])
    assert prompts == [turns("a"), turns("a", "1.0", "b")]
    assert "error: prompt 2: the prompt has" in capsys.readouterr().out


def test_without_a_template_every_line_is_a_prompt(ask):
    prompts, names = ask(None, ["a", "a"])
    assert len(set(prompts)) == 1
    assert names[0] != names[1]  # the same words get another answer


def test_of_several_answers_the_first_goes_on(ask, capsys):
    prompts, _ = ask(CHATML, ["a", "b"], "--n=2")
    assert prompts[1] == turns("a", "1.0", "b")
    assert capsys.readouterr().out.splitlines()[:2] == ["[2] 1.1", "[1] 1.0"]

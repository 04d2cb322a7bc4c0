"""Order and progress of answers, without a model."""

import io
import itertools

import pytest
from rich.console import Console

from dpo_jax.answering import progress
from dpo_jax.answering.draw import in_order
from dpo_jax.answering.output import answer_line
from dpo_jax.answering.progress import Tracker
from dpo_jax.data.prompts import prompt_of
from dpo_jax.sampling.engine import Sampled, draw_names
from dpo_jax.sampling.params import Answer, SamplingParams


def answer(text, logprob=-1.0):
    return Answer(text, [1, 2], "length", None, logprob, [logprob, 0.0], [logprob, 0.0])


@pytest.mark.parametrize("order", list(itertools.permutations(range(6)))[::97])
def test_answers_come_in_the_order_of_their_prompts(order):
    drawn = [Sampled(i // 2, i % 2, answer(str(i))) for i in order]
    found = list(in_order(iter(drawn), 2))
    assert [(at, [one.text for one in answers]) for at, answers in found] == [
        (0, ["0", "1"]),
        (1, ["2", "3"]),
        (2, ["4", "5"]),
    ]


def test_a_prompt_is_written_as_soon_as_all_before_it_are_there():
    drawn = iter([Sampled(1, 0, answer("b")), Sampled(0, 0, answer("a")), None])
    found = in_order(drawn, 1)
    assert [next(found)[0], next(found)[0]] == [0, 1]  # without a look at the third one


def test_a_line_is_strict_json():
    line = answer_line(prompt_of("Hi"), "Hé", [answer("a", float("nan"))], "m", SamplingParams(logprobs=True, round=1))
    assert line == (
        '{"id": 1, "prompt": "Hé", "answers": [{"text": "a", "token_ids": [1, 2], "finish_reason": "length", '
        '"stop_reason": null, "logprob": null, "logprobs": [null, 0.0], "full_logprobs": [null, 0.0]}], "model": "m", '
        '"seed": 0, "round": 1}\n'
    )


def test_draws_depend_on_ids_or_on_tokens():
    whole = draw_names([[1], [2], [1], [1]], ["a", None, None, None])
    assert whole == ["a", (2,), (1,), (1, -2)]
    assert draw_names([[1], [1]], whole[2:]) == whole[2:]  # names of a part are those of the whole


def test_progress_is_a_line_now_and_then_without_a_terminal(monkeypatch):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    text = io.StringIO()
    with Tracker(4, 1, quiet=False, console=Console(file=text, width=200)) as tracker:
        for _ in range(3):
            tracker.ended(50)
            tracker.answered(1)
    *middle, last = text.getvalue().splitlines()
    assert "/4 prompts, " in middle[0]
    assert "tokens/s" in middle[0]
    assert any("left 0:00:" in line for line in middle)
    assert last.startswith("3 prompts, 3 answers, 150 tokens, ")


def test_nothing_is_shown_where_nobody_asked():
    text = io.StringIO()
    with Tracker(1, 0, quiet=True, console=Console(file=text)) as tracker:
        tracker.ended(5)
        tracker.answered(1)
    assert text.getvalue() == ""

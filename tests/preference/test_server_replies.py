"""What a reply says, in all the ways in which models say it; and what is none."""

import json
import math

import pytest

from dpo_jax.preference.server_replies import label_in, parse_reply, verdict_in
from tests.fakes.judge_server import completion

CLEAR = {
    "A": "A",
    " b\n": "B",
    "Tie": "Tie",
    "tie.": "Tie",
    "**B**": "B",
    "[[A]]": "A",
    "(B)": "B",
    '"Tie"': "Tie",
    "Answer: B": "B",
    "Final answer: **A**.": "A",
    "The final answer is $\\boxed{B}$.": "B",
    "My preference is completion A": "A",
    "==== Preference ====\nB": "B",
    '{"answer": "A"}': "A",
    "B\n\nBoth name a colour, and A is longer.": "B",
    "Both name a colour. A is longer.\n\nVerdict: B": "B",
    "A:\n- kind\n\nB:\n- short\n\nVerdict: A": "A",
    "<think>A or B? A.\nB\n</think>\n\nA": "A",
    "A or B?\nB\n</think>A": "A",
    "Completion B is better.": "B",
    "A is better.": "A",
    "I prefer completion B": "B",
    "B, because it is kind.": "B",
    "A. It is kind.": "A",
    "The better completion is B": "B",
}
UNCLEAR = {
    "": "no_label",
    "I cannot say.": "no_label",
    "A good question!": "no_label",
    "A and B are equally good": "several_labels",
    "I prefer A over B.": "several_labels",
    "A\nB": "several_labels",
    "A, B are equal": "several_labels",
    "B is worse.": "unclear",
    "I would not choose B.": "unclear",
    "B isn't better.": "unclear",
    "Completion B ignores the question.": "unclear",
    "Is it B?": "unclear",
    "[[A>B]]": "several_labels",
    "C": "no_label",
    "Yes": "no_label",
    "A/B": "several_labels",
    "A tie is worn with a shirt.": "no_label",
    "<think>A\n": "no_label",
    "B is better. " + "So it is. " * 200: "unclear",
}


@pytest.mark.parametrize(("text", "label"), CLEAR.items())
def test_a_text_says_a_label(text, label):
    found, at = label_in(text)
    assert found == label
    assert text[at : at + len(label)].lower() == label.lower()


@pytest.mark.parametrize(("text", "reason"), UNCLEAR.items())
def test_a_text_that_says_no_label_is_no_verdict(text, reason):
    assert label_in(text) == reason


def reply(said, **more):
    found = parse_reply(json.dumps(completion(said, **more)))
    assert not isinstance(found, str), found
    return found


def test_a_verdict_is_over_the_mass_of_the_labels():
    tops = {"A": 0.5, "B": 0.3, "The": 0.15, "Tie": 0.05}
    # (0.3 - 0.5) / (0.5 + 0.3 + 0.05), by hand
    assert verdict_in(reply([("A", tops)]), "auto") == (pytest.approx(-0.2 / 0.85), "")
    assert verdict_in(reply([("A", tops)]), "logprobs")[0] == pytest.approx(-0.2 / 0.85)
    assert verdict_in(reply([("A", tops)]), "text") == (-1.0, "")


def test_forms_of_a_label_are_added():
    tops = {" B": 0.25, "B": 0.25, "**A": 0.2, " T": 0.1, "Ti": 0.05, "The": 0.15}
    # A 0.2, B 0.5, Tie 0.15
    assert verdict_in(reply([(" B", tops)]), "auto")[0] == pytest.approx(0.3 / 0.85)


def test_a_tie_of_two_tokens_is_read_at_its_first_also_where_it_is_cut_there():
    first = ("T", {"T": 0.6, "A": 0.3, "B": 0.1})
    assert verdict_in(reply([first, ("ie", {"ie": 0.9, "o": 0.1})]), "auto")[0] == pytest.approx(-0.2)
    assert verdict_in(reply([first], finish="length"), "auto")[0] == pytest.approx(-0.2)
    assert verdict_in(reply("T", finish="length"), "auto") == (0.0, "")
    assert math.isnan(verdict_in(reply("T"), "auto")[0])


def test_the_token_of_the_label_is_read_and_no_other():
    sure = {"B": 0.9, "A": 0.1}
    other = {"A": 0.9, "B": 0.1}
    told = [("A", other), (" good", other), (" answer", other), (":\n", other), ("Verdict: ", other), ("B", sure)]
    assert verdict_in(reply(told), "auto")[0] == pytest.approx(0.8)
    assert verdict_in(reply([("**", other), ("B", sure), ("**", other)]), "auto")[0] == pytest.approx(0.8)


def test_without_alternatives_the_text_counts():
    assert verdict_in(reply([("B", {"B": 0.99})]), "auto") == (1.0, "")  # one token says nothing of the others
    assert verdict_in(reply("B"), "auto") == (1.0, "")
    value, reason = verdict_in(reply("B"), "logprobs")
    assert math.isnan(value)
    assert reason == "no_logprobs"


@pytest.mark.parametrize("broken", [{"content": None}, {"content": [{}]}, [], "x", {"tokens": ["B"]}])
def test_log_probabilities_of_another_shape_are_none(broken):
    body = completion([("B", {"B": 0.6, "A": 0.4})])
    body["choices"][0]["logprobs"] = broken
    assert verdict_in(parse_reply(json.dumps(body)), "auto") == (1.0, "")
    body["choices"][0]["logprobs"] = {"content": [{"token": "B", "logprob": float("nan"), "top_logprobs": []}]}
    assert verdict_in(parse_reply(json.dumps(body)), "auto") == (1.0, "")


@pytest.mark.parametrize(
    ("said", "finish", "reason"),
    [
        (None, "stop", "empty"),
        ("  ", "stop", "empty"),
        ("Both completions", "length", "cut_off"),
        (None, "length", "cut_off"),
        (None, "content_filter", "refused"),
        ("Maybe", "stop", "no_label"),
    ],
)
def test_why_there_is_no_verdict(said, finish, reason):
    value, why = verdict_in(reply(said, finish=finish), "auto")
    assert math.isnan(value)
    assert why == reason


def test_parts_and_refusals():
    body = completion("")
    body["choices"][0]["message"]["content"] = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "B"}]
    assert verdict_in(parse_reply(json.dumps(body)), "auto") == (1.0, "")
    body["choices"][0]["message"] = {"content": None, "refusal": "I will not."}
    assert verdict_in(parse_reply(json.dumps(body)), "auto")[1] == "refused"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("", "not_json"),
        ("<html>", "not_json"),
        ('{"choices": [', "not_json"),
        ("[" * 100_000, "not_json"),
        ("[]", "wrong_shape"),
        ("null", "wrong_shape"),
        ('{"choices": []}', "wrong_shape"),
        ('{"choices": "text"}', "wrong_shape"),
        ('{"choices": [{"text": "B"}]}', "wrong_shape"),
        ('{"choices": [{"message": {"content": 3}}]}', "wrong_shape"),
        ('{"choices": [{"message": {"content": [{"text": "B"}]}}]}', "wrong_shape"),
        ('{"choices": [{"message": "B"}]}', "wrong_shape"),
        ('{"error": {"message": "overloaded"}}', "wrong_shape"),
    ],
)
def test_a_body_that_is_no_completion(body, reason):
    assert parse_reply(body) == reason


def test_usage_is_what_the_server_says_or_unknown():
    assert reply("B", usage=(7, 1)).usage == (7, 1)
    assert reply("B", usage=None).usage is None
    body = completion("B") | {"usage": {"prompt_tokens": "many"}}
    assert parse_reply(json.dumps(body)).usage is None

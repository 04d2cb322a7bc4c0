"""Every form of rows: what it becomes, what stands beside it, what refuses it."""

import importlib.util
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.data.comparison import LabeledComparison, RatedAnswer, Skip
from dpo_jax.data.containers import read_rows
from dpo_jax.data.forms.families import MAKERS, transcripts
from dpo_jax.data.forms.reader import make_reader, pairs_in, parse_own, read_own
from dpo_jax.data.pairing import Pairing
from dpo_jax.data.raw import ColumnarRow
from tests import places

ASK, YES, NO = "What floats?", "A boat.", "A stone."
USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", ASK), ("assistant", YES), ("assistant", NO))
)
SYSTEM = {"role": "system", "content": "Speak like a captain."}
EARLIER = [{"role": "user", "content": "Ahoy."}, {"role": "assistant", "content": "Ahoy!"}]
TOOL = {"type": "function", "function": {"name": "tide", "description": "Its height.", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "tide", "arguments": {"port": "Brest"}}}
ANSWERS = {"chosen": YES, "rejected": NO}
TURNS = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}

# Rows that all mean USER, GOOD, BAD.
SAME = {
    **{name: {name: ASK, **ANSWERS} for name in ("prompt", "question", "input", "query", "instruction", "context")},
    **{f"list in {name}": {name: [USER], **ANSWERS} for name in ("messages", "conversation", "conversations")},
    "nemo aligner": {"prompt": ASK, "chosen_response": YES, "rejected_response": NO, "chosen_reward": 5},
    "orca": {"system": "", "question": ASK, **ANSWERS},
    "distilabel": {
        "system": "",
        "input": ASK,
        **ANSWERS,
        "generations": [YES, NO],
        "order": ["chosen", "rejected"],
        "labelling_prompt": [{"role": "user", "content": "Rate both."}],
        "rating": [9.0, 7.0],
        "raw_labelling_response": "9 7",
        "labelling_model": "m",
        "status": "unchanged",
    },
    "stack exchange": {"qid": 1, "question": ASK, "response_j": YES, "response_k": NO, "metadata": ["a", "b c"]},
    "code pairs": {"ID": 1, "input": ASK, "accepted": YES, "rejected": NO},
    "axolotl": {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    "prompt is null": {"prompt": None, "question": ASK, **ANSWERS},
    "ultrafeedback_binarized": {"prompt": ASK, "prompt_id": "a1", **TURNS, "messages": [USER, GOOD]},
    "messages repeated": {"messages": [USER, GOOD], **TURNS},
    "capybara": {"source": "x", "prompt": ASK, **ANSWERS, "conversation": [{"input": ASK, "output": YES}]},
    "json messages": {"prompt": json.dumps([USER]), "chosen": json.dumps([GOOD]), "rejected": json.dumps(BAD)},
    "python messages": {"prompt": str([USER]), "chosen": str([GOOD]), "rejected": str([BAD])},
    "parts": {"prompt": [{"role": "user", "content": [{"type": "text", "text": "What "}, "floats?"]}], **ANSWERS},
    "openai": {
        "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [GOOD],
        "non_preferred_output": [BAD],
    },
    "openai with text": {"input": ASK, "preferred_output": YES, "non_preferred_output": NO},
    "swift": {"messages": [USER, GOOD], "rejected_response": NO},
    "swift lists": {"messages": [USER, GOOD], "rejected_messages": [USER, BAD]},
    "swift query": {"query": ASK, "response": YES, "rejected_response": NO},
    "alpaca, nothing asked but the input": {"instruction": "", "input": ASK, **ANSWERS},
    "helpsteer3": {
        "context": [USER],
        "response1": NO,
        "response2": YES,
        "overall_preference": "2",
        "individual_preference": [{"score": 2, "reasoning": "It floats."}],
        "domain": "x",
        "language": "y",
    },
    "helpsteer2": {
        "prompt": ASK,
        "response_1": YES,
        "response_2": NO,
        "preference_strength": -1,
        "preference_statement": "The first is right.",
        "preference_elaboration": "It floats.",
    },
    "shp": {"history": ASK, "human_ref_A": NO, "human_ref_B": YES, "labels": 0, "score_A": 9, "score_B": 2},
    "safe rlhf": {
        "prompt": ASK,
        "response_0": NO,
        "response_1": YES,
        "better_response_id": 1,
        "safer_response_id": 0,
        "is_response_0_safe": True,
        "response_0_harm_category": {"a": False},
        "response_0_sha256": "ab",
    },
    "arena": {
        "question_id": "q",
        "model_a": "m",
        "model_b": "n",
        "winner": "model_b",
        "conversation_a": [USER, BAD],
        "conversation_b": [USER, GOOD],
        "judge": "arena_user_1",
        "openai_moderation": {"text": {"x": False}},
    },
    "winner by the model's name": {
        "prompt": ASK,
        "response_a": NO,
        "response_b": YES,
        "model_a": "m",
        "model_b": "n",
        "winner": "n",
    },
    "marks of a winner": {
        "prompt": '["What floats?"]',
        "response_a": '["A stone."]',
        "response_b": '["A boat."]',
        "winner_model_a": "0",
        "winner_model_b": "1",
        "winner_tie": "0",
    },
    "webgpt": {
        "question": {"full_text": ASK, "id": "1"},
        "answer_0": NO,
        "answer_1": YES,
        "score_0": -1.0,
        "score_1": 1.0,
        "quotes_0": {"title": ["a b"], "extract": ["c d"]},
        "tokens_0": {"prefix": [1]},
    },
    "judgebench": {"pair_id": "1", "question": ASK, "response_A": NO, "response_B": YES, "label": "B>A"},
    "llmbar": {"input": ASK, "output_1": NO, "output_2": YES, "label": 2},
    "alpaca eval": {"instruction": ASK, "input": "", "output_1": YES, "output_2": NO, "preference": 1.0},
    "summaries": {
        "info": {"id": "t", "post": ASK, "title": None},
        "summaries": [{"text": NO}, {"text": YES}],
        "choice": 1,
    },
    "nectar": {
        "prompt": f"\n\nHuman: {ASK}\n\nAssistant: ",
        "num_responses": 2,
        "good_natured": True,
        "answers": [{"answer": NO, "rank": 2.0, "model": "m"}, {"answer": YES, "rank": 1.0, "model": "n"}],
    },
    "nemo rl": {
        "context": [USER],
        "completions": [{"rank": 1, "completion": [BAD]}, {"rank": 0, "completion": [GOOD]}],
    },
    "stack exchange scores": {"question": ASK, "answers": [{"pm_score": 1, "text": NO}, {"pm_score": 4, "text": YES}]},
    "scores beside": {"instruction": ASK, "generations": [NO, YES], "ratings": [1, 5], "generation_models": ["m", "n"]},
    "rewardbench 1": {"prompt": ASK, **ANSWERS, "chosen_model": "m", "rejected_model": "n", "subset": "x", "id": 1},
    "rewardbench 2": {
        "prompt": ASK,
        "chosen": [YES],
        "rejected": [NO],
        "num_correct": 1,
        "additional_metadata": {"a": "b c"},
    },
    "a transcript for a prompt": {
        "prompt": f"\n\nHuman: {ASK}\n\nAssistant:",
        "chosen": f" {YES}",
        "rejected": f"{NO}\n",
    },
    "step": {"prompt": ASK, "initial_reason_steps": "A ", "chosen": "boat.", "rejected": "stone.", "answer": "boat"},
    "columnar": ColumnarRow(prompt=[{**USER, "tool_calls": None, "name": None}], chosen=[GOOD], rejected=[BAD]),
}


def parts(pair):
    return [list(pair.comparison.prompt_conversation), list(pair.chosen), list(pair.rejected)]


@pytest.mark.parametrize("row", SAME.values(), ids=SAME)
def test_every_form_means_the_same_pair(row):
    pair = parse_own(row)
    assert isinstance(pair, LabeledComparison), pair
    assert parts(pair) == [[USER], [GOOD], [BAD]]
    assert pair.comparison.tools is None
    assert (pair.swap().swap(), pair.swap().chosen) == (pair, pair.chosen)


@pytest.mark.parametrize("row", SAME.values(), ids=SAME)
def test_every_form_may_have_system_history_and_tools_beside_it(row):
    if "history" in row:
        pytest.skip("its history is the prompt")
    beside = {
        "history": [["Ahoy.", "Ahoy!"]],
        "tools": json.dumps([TOOL]),
        "chat_template_kwargs": '{"thinking": true}',
    }
    pair = parse_own({**row, **beside, "system": SYSTEM["content"]})
    assert isinstance(pair, LabeledComparison), pair
    assert parts(pair) == [[SYSTEM, *EARLIER, USER], [GOOD], [BAD]]
    assert pair.comparison.tools == [TOOL]
    assert pair.comparison.chat_template_kwargs == {"thinking": True}
    assert pair.comparison.texts is None  # text has no place for a system turn


def test_strings_stay_letter_for_letter_beside_their_messages():
    row = {"prompt": " Hi \n", "chosen": " a", "rejected": "b "}
    assert parse_own(row).comparison.texts == (" Hi \n", " a", "b ")
    start = "\n\nHuman: Hi\n\nAssistant:"
    assert parse_own({"chosen": start + " a", "rejected": start + " b"}).comparison.texts == (start, " a", " b")
    assert parse_own({"prompt": start, "chosen": " a", "rejected": " b"}).comparison.texts == (start, " a", " b")
    whole = parse_own({"chosen": "<|u|>Hi<|a|>a", "rejected": "<|u|>Hi<|a|>b"}).comparison
    assert (whole.prompt_conversation, whole.texts) == ((), ("", "<|u|>Hi<|a|>a", "<|u|>Hi<|a|>b"))
    assert parse_own({"prompt": [USER], **ANSWERS}).comparison.texts is None


def test_a_transcripts_blanks_are_one_in_all_its_spellings():
    start = "\n\nHuman: Hi\n\nAssistant:"
    whole = parts(parse_own({"chosen": start + " a", "rejected": start + "  b\n"}))
    for blank in ("", " ", "  "):
        assert parts(parse_own({"prompt": start, "chosen": blank + "a", "rejected": blank + "b"})) == whole


@pytest.mark.parametrize("prompt", [ASK, [USER], f" {ASK}\n"])
def test_several_turns_are_an_answer(prompt):
    one = [GOOD, {"role": "user", "content": "Sure?"}, GOOD]
    two = [GOOD, {"role": "user", "content": "Sure?"}, BAD]
    pair = parse_own({"prompt": prompt, "chosen": one, "rejected": two})
    assert parts(pair)[1:] == [one, two]
    assert pair.comparison.prompt_conversation[0]["content"].strip() == ASK
    # Without a prompt it is what both begin with, as TRL's extract_prompt has it.
    pair = parse_own({"chosen": [USER, *one], "rejected": [USER, *two]})
    assert parts(pair) == [[USER, *one[:2]], [GOOD], [BAD]]
    pair = parse_own({"chosen": [USER, GOOD], "rejected": [USER, *one]})
    assert parts(pair) == [[USER], [GOOD], one]


@pytest.mark.extras
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL, which .ci/run installs")
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_an_implicit_prompt_is_trls(data):
    from trl.data_utils import extract_prompt

    text = st.sampled_from("abc")
    turns = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), text), min_size=1, max_size=5)
    one, two = (
        [{"role": "user", "content": "q"}, *({"role": role, "content": said} for role, said in data.draw(turns))]
        for _ in range(2)
    )
    pair = parse_own({"chosen": one, "rejected": two})
    if isinstance(pair, LabeledComparison):
        ours = dict(zip(("prompt", "chosen", "rejected"), parts(pair), strict=True))
        assert ours == extract_prompt({"chosen": one, "rejected": two})


def test_every_key_of_a_message_is_kept_and_tells_answers_apart():
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "name": "tide", "content": "12 m", "tool_call_id": None}
    row = {"tools": [TOOL], "prompt": [USER, called, result], "chosen": [GOOD], "rejected": [BAD]}
    assert parts(parse_own(row))[0] == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "tide", "content": "12 m"},
    ]
    other = {"type": "function", "function": {"name": "tide", "arguments": {"port": "Calais"}}}
    for key, one, two in (("tool_calls", [CALL], [other]), ("reasoning_content", "a", "b")):
        pair = parse_own({"prompt": ASK, "chosen": [{**GOOD, key: one}], "rejected": [{**GOOD, key: two}]})
        assert (pair.chosen[0][key], pair.rejected[0][key]) == (one, two)
        assert parse_own({"prompt": ASK, "chosen": [{**GOOD, key: one}], "rejected": [{**GOOD, key: one}]}) == Skip(
            "identical_answers"
        )


def test_calls_in_turns_of_their_own():
    """LLaMA-Factory's and ms-swift's turns, and OpenAI's old key."""
    call = json.dumps({"name": "tide", "arguments": {"port": "Brest"}})
    turns = [
        {"from": "human", "value": ASK},
        {"from": "function_call", "value": call},
        {"from": "function_call", "value": call},
        {"from": "observation", "value": "12 m"},
    ]
    prompt = parts(parse_own({"conversations": turns, **ANSWERS}))[0]
    assert prompt[1] == {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}
    assert prompt[2] == {"role": "tool", "content": "12 m"}
    old = {"role": "assistant", "content": None, "function_call": {"name": "tide", "arguments": '{"port": "Brest"}'}}
    assert parse_own({"prompt": ASK, "chosen": [old], "rejected": [BAD]}).chosen[0]["tool_calls"] == [CALL]
    bare = {"name": "tide", "parameters": {}}
    row = {"prompt": ASK, **ANSWERS, "functions": [bare]}
    assert parse_own(row).comparison.tools == [{"type": "function", "function": bare}]


def test_padding_of_columnar_structs_goes_and_nulls_of_json_stay():
    padded = {"function": {"name": "f", "arguments": {"port": "Brest", "day": None}}}
    row = {"prompt": ASK, "chosen": [{**GOOD, "tool_calls": [padded]}], "rejected": [BAD]}
    arguments = lambda row: parse_own(row).chosen[0]["tool_calls"][0]["function"]["arguments"]
    assert arguments(ColumnarRow(row)) == {"port": "Brest"}
    assert arguments(row) == {"port": "Brest", "day": None}


def test_ids_and_times_of_messages_make_no_other_turn():
    one, two = ({**USER, "id": number, "created_at": f"{number} o'clock"} for number in (1, 2))
    pair = parse_own({"chosen": [one, GOOD], "rejected": [two, BAD]})
    assert parts(pair) == [[one], [GOOD], [BAD]]
    pairing = Pairing()
    assert pairing.add(parse_own({"prompt": [one], "completion": YES, "label": True})) is None
    assert pairing.add(parse_own({"prompt": [two], "completion": NO, "label": False})).chosen == (GOOD,)
    other = {"prompt": [{**USER, "name": "Bo"}], "completion": NO, "label": False}
    assert parse_own({"chosen": [one, GOOD], "rejected": [*other["prompt"], BAD]}).reason == "prompts_differ"
    assert pairing.add(parse_own(other)) is None
    assert pairing.unpaired() == 1


WINNERS = [
    (
        {"response_a": YES, "response_b": NO},
        "winner",
        {"A": "A", "b": "B", "model_a": "A", "tie": "Tie", "both_bad": "Tie"},
    ),
    ({"response_A": YES, "response_B": NO}, "label", {"A>B": "A", "B>A": "B", "A=B": "Tie", "[[B]]": "B", "A>>B": "A"}),
    (
        {"response_0": YES, "response_1": NO},
        "better_response_id",
        {0: "A", 1: "B", "0": "A", "1.0": "B", "response_1": "B"},
    ),
    ({"output_1": YES, "output_2": NO}, "preference", {1: "A", 2.0: "B", 1.5: "Tie", 1.2: "A", "2": "B"}),
    ({"human_ref_A": YES, "human_ref_B": NO}, "labels", {1: "A", 0: "B"}),
    ({"response_1": YES, "response_2": NO}, "preference_strength", {-3: "A", 0: "Tie", 1: "B", "-1": "A", 2.0: "B"}),
    ({"completion_a": YES, "completion_b": NO}, "label", {"A": "A", "B": "B", "Tie": "Tie", "tie (bothbad)": "Tie"}),
]


@pytest.mark.parametrize(("answers", "column", "labels"), WINNERS, ids=[column for _, column, _ in WINNERS])
def test_winners_in_every_spelling(answers, column, labels):
    for value, label in labels.items():
        assert parse_own({"prompt": ASK, **answers, column: value}).label == label
    for value in ("C", "", 7, True, [1], 0.3):
        assert parse_own({"prompt": ASK, **answers, column: value}).reason in ("bad_label", "bad_preference")


def test_scores_name_a_winner_and_more_than_two_answers_need_ranks():
    row = {"question": ASK, "answer_0": YES, "answer_1": NO}
    assert parse_own({**row, "score_0": 1, "score_1": "0.5"}).label == "A"
    assert parse_own({**row, "score_0": 1, "score_1": 1}).label == "Tie"
    assert parse_own({**row, "score_0": "x", "score_1": 1}).reason == "bad_label"
    assert parse_own({**row, "answer_2": "c", "label": 1}).reason == "unknown_columns"


def test_a_prompt_of_several_turns_in_helpsteer2s_markup():
    prompt = "Ahoy.\n<extra_id_1>Assistant\nAhoy!\n<extra_id_1>User\nWhat floats?"
    row = {"prompt": prompt, "response_1": YES, "response_2": NO, "preference_strength": -2}
    assert parts(parse_own(row)) == [[*EARLIER, USER], [GOOD], [BAD]]


def test_turn_lists_become_conversations():
    row = {"prompt": ["Ahoy.", ASK], "response_a": ["Ahoy!", YES], "response_b": ["Ahoy!", NO], "winner": "a"}
    assert parts(parse_own(row)) == [[*EARLIER, USER], [GOOD], [BAD]]


def test_ranked_answers_give_the_best_against_every_other():
    answers = [("c", 3), ("a", 1), ("b", 2), ("a too", 1)]
    ranked = [{"answer": text, "rank": rank} for text, rank in answers]
    _, outcomes = read_own({"prompt": ASK, "answers": ranked})
    assert [one.rejected[0]["content"] for one in outcomes[:2]] == ["c", "b"]
    assert outcomes[2] == Skip("tie")
    assert {one.chosen[0]["content"] for one in outcomes[:2]} == {"a"}
    scored = {"prompt": ASK, "responses": [text for text, _ in answers], "scores": [1, 9, None, 3]}
    assert [p.rejected[0]["content"] for p in pairs_in(scored)] == ["c", "a too"]
    for wrong in ([1, 2], "x", [None] * 4):
        assert parse_own({**scored, "scores": wrong}).reason == "bad_score"
    assert parse_own({"prompt": ASK, "answers": [1, 2]}).reason == "not_text"


def test_lists_of_answers_by_place_or_each_with_each():
    says = lambda row: [(p.chosen[0]["content"], p.rejected[0]["content"]) for p in pairs_in(row)]
    assert says({"prompt": ASK, "chosen": ["a", "b"], "rejected": ["c", "d"]}) == [("a", "c"), ("b", "d")]
    assert says({"prompt": ASK, "chosen": ["a"], "rejected": ["c", "d"]}) == [("a", "c"), ("a", "d")]
    assert says({"prompt": ASK, "chosen": ["a", "b"], "rejected": ["c"]}) == [("a", "c"), ("b", "c")]


RATED = {
    "kto": {"prompt": ASK, "completion": YES, "label": True},
    "kto text": {"prompt": ASK, "completion": YES, "label": "True"},
    "llama factory": {"instruction": ASK, "input": "", "output": YES, "kto_tag": True},
    "swift": {"messages": [USER, GOOD], "label": True},
    "hh": {"prompt": f"\n\nHuman: {ASK}\n\nAssistant:", "completion": f" {YES}", "label": 1},
}


@pytest.mark.parametrize("row", RATED.values(), ids=RATED)
def test_rated_answers_wait_for_another(row):
    one = parse_own(row)
    assert isinstance(one, RatedAnswer)
    assert (list(one.prompt_conversation), list(one.completion), one.good) == ([USER], [GOOD], True)
    bad = RatedAnswer([USER], [BAD], good=False)
    assert one.against(bad).chosen == bad.against(one).chosen == one.completion
    key = "kto_tag" if "kto_tag" in row else "label"
    assert parse_own({**row, key: "perhaps"}).reason == "bad_label"
    beside = parse_own({**row, "system": SYSTEM["content"], "tools": [TOOL]})
    assert (list(beside.prompt_conversation), beside.tools) == ([SYSTEM, USER], [TOOL])


REFUSED = [
    ({"prompt": ASK, **ANSWERS, "images": ["a.png"]}, "unread_field", "images"),
    ({"prompt": ASK, **ANSWERS, "rejected_images": ["a.png"]}, "unread_field", "rejected_images"),
    ({"prompt": ASK, **ANSWERS, "documents": [{"text": "a b"}]}, "unread_field", "documents"),
    ({"prompt": ASK, **ANSWERS, "persona": "a pirate"}, "unread_field", "columns=persona:"),
    ({"prompt": ASK, **ANSWERS, "facts": {"a": "b c"}}, "unread_field", "facts"),
    ({"prompt": ASK, "question": "And what sinks?", **ANSWERS}, "unread_field", "question"),
    ({"prompt": [{"role": "user", "content": [{"type": "image_url"}]}], **ANSWERS}, "unread_field", "image_url"),
    ({"prompt": [{**USER, "images": ["a.png"]}], **ANSWERS}, "unread_field", "images"),
    ({"prompt": ASK, "chosen": [{**GOOD, "weight": 0}], "rejected": [BAD]}, "unread_field", "weight"),
    ({"input": {"messages": [USER], "memory": "a b"}, "preferred_output": YES, "non_preferred_output": NO},
     "unread_field", "memory"),
    (
        {"prompt": ASK, "answers": [{"answer": YES, "rank": 1}, {"answer": NO, "rank": 2, "asked_as": "a pirate"}]},
        "unread_field",
        "asked_as",
    ),
    ({"prompt": ASK, **ANSWERS, "tools": "none"}, "bad_tools", "tools"),
    ({"prompt": ASK, **ANSWERS, "tools": [1]}, "bad_tools", "tools"),
    ({"prompt": ASK, **ANSWERS, "chat_template_kwargs": "x"}, "bad_template_kwargs", "mapping"),
    ({"prompt": ASK, **ANSWERS, "history": "Ahoy."}, "bad_history", "history"),
    ({"prompt": ASK, **ANSWERS, "history": [["Ahoy."]]}, "bad_history", "pairs"),
    ({"prompt": [SYSTEM, USER], **ANSWERS, "system": "Be brief."}, "systems_differ", "Be brief."),
    ({"prompt": ASK, **ANSWERS, "system": ["Be brief."]}, "not_text", "system"),
    ({"prompt": '[{"role": "user", "content": "x"}', **ANSWERS}, "not_text", "no JSON"),
    ({"prompt": "And what sinks?", **TURNS}, "prompts_differ", "prompt"),
    ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "x"}, BAD]}, "prompts_differ", "beginning"),
    ({"prompt": ASK, "chosen": [GOOD, USER], "rejected": [BAD]}, "answer_not_assistant", "chosen"),
    ({"prompt": ASK, "chosen": [], "rejected": [BAD]}, "answer_not_assistant", "chosen"),
    ({"conversations": [{"from": "human", "value": ASK}, {"from": "function_call", "value": "x"}], **ANSWERS},
     "bad_tool_call", "JSON"),
    ({"messages": [USER], "rejected_response": NO}, "missing_column", "last turn"),
    ({"system": SYSTEM["content"], "chosen": "a <b>", "rejected": "a <c>"}, "no_transcript", "system"),
    ({"prompt": ASK, "completion": YES, "label": None}, "missing_column", "label"),
    ({"messages": [USER, GOOD]}, "unknown_columns", "messages"),
    ({"quesion": ASK, "chosen_respons": YES}, "unknown_columns", "quesion is like question"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason", "word"), REFUSED, ids=[f"{r}, {w}" for _, r, w in REFUSED])
def test_a_row_that_would_lose_something_is_refused_by_name(row, reason, word):
    (skip,) = read_own(row)[1]
    assert isinstance(skip, Skip), skip
    assert (skip.reason, word in skip.detail) == (reason, True), skip
    assert "\n" not in skip.detail


def test_what_may_stand_beside_a_pair_is_named_and_does_not_matter():
    beside = {
        "id": "a b",
        "chosen_model": "x y",
        "metadata": {"a": "b c"},
        "source": "some site",
        "n": 3,
        "flag": True,
        "notes": None,
        "images": [],
        "persona": "",
        "topic": "boats and stones",
        "url": "https://a.b/c",
        "sent": "2024-01-01 10:00",
        "uid7": "b",
        "all_rejected": ["x y"],
        "processed_prompt": "<u> What floats?",
        "repeated": ASK,
        "task": "coding",
    }
    form, (pair,) = read_own({"prompt": ASK, **ANSWERS, **beside})
    assert parts(pair) == [[USER], [GOOD], [BAD]]
    assert set(form.harmless + form.suspicious) == set(beside)
    assert read_own({"prompt": ASK, **ANSWERS, **beside, "task": "translate this"})[1][0].reason == "unread_field"


def test_the_reading_of_transcripts_alone_takes_nothing_else():
    read = make_reader((transcripts,))
    assert read({"prompt": ASK, **ANSWERS})[1][0].reason == "no_transcript"
    assert read(TURNS)[1][0].reason == "not_text"
    assert read({"prompt": ASK})[1][0].reason == "unknown_columns"
    assert transcripts not in MAKERS


Q1, G1, B1, S = (
    "Name a colour of the sky.",
    "Blue, on a clear day.",
    "I cannot say.",
    "Answer in the style of a pirate.",
)
CASES = places.SHARED.parent / "cases" / "data"
NO_PAIRS = {"images.jsonl": "unread_field", "kto.jsonl": ""}
OTHER_ANSWERS = {
    "tool_calls_as_answer.jsonl",
    "templated_chatml.jsonl",
    "arena.jsonl",
    "shp.jsonl",
    "multi_turn_answer.jsonl",
}
WITH_SYSTEM = (
    "alpaca_system_history axolotl_chat_template messages_chosen_rejected openai swift_rejected_response "
    "system_column_message_lists system_prompt_chosen_rejected system_question"
).split()


@pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not beside the repository")
@pytest.mark.parametrize("path", sorted(CASES.glob("*.*")) if CASES.is_dir() else [], ids=lambda path: path.name)
def test_the_shared_files_of_other_tools(path):
    rows = [row for _, row in read_rows(str(path))]
    outcomes = [one for row in rows for one in read_own(row)[1]]
    if path.name in NO_PAIRS:
        assert {getattr(one, "reason", "") for one in outcomes} == {NO_PAIRS[path.name]}
        return
    if path.name == "kto_paired.jsonl":
        assert [one.good for one in outcomes] == [True, False] * 3
        outcomes = [one.against(two) for one, two in zip(outcomes[::2], outcomes[1::2], strict=True)]
    assert len(outcomes) == (9 if path.name == "rewardbench2.jsonl" else 3)
    if path.name == "shp.jsonl":
        assert [one.label for one in outcomes] == ["B", "A", "B"]
    if path.name == "arena.jsonl":
        assert [one.label == "Tie" for one in outcomes] == [False, True, False]
    first = outcomes[0]
    asked, said = first.comparison.prompt_conversation, first.chosen
    assert [turn["content"] for turn in asked if turn["role"] == "system"] == [S] * (path.stem in WITH_SYSTEM)
    if path.name == "templated_chatml.jsonl":
        assert all(text in first.comparison.texts[0] for text in (S, Q1))
        return
    assert [turn["content"] for turn in asked if turn["role"] == "user"][-1] == Q1
    assert said[-1]["content"] == ("" if path.name == "tool_calls_as_answer.jsonl" else G1)
    assert first.rejected[-1]["content"] == B1
    assert (first.comparison.tools is not None) == (path.stem in ("tools_column", "tool_calls_as_answer"))

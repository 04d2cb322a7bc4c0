"""Every parser: the published facts on the real samples, each accepted form, and properties on arbitrary rows."""

import collections
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.data.comparison import LabeledComparison, RatedAnswer, Skip
from dpo_jax.data.containers import read_rows
from dpo_jax.data.datasets import DATASETS, load_parser, read_with
from dpo_jax.data.forms.reader import parse_own, read_own
from dpo_jax.data.forms.scores import score_tie
from dpo_jax.data.forms.table import resolve
from dpo_jax.errors import UserError
from tests import places

SAMPLES = places.SHARED


def first_of(read):
    """A parser from a reader: the only pair of a row, or why there is none."""
    return lambda row: read(row)[1][0]


parse_hh, parse_helpsteer3, parse_ultrafeedback = (
    first_of(DATASETS[name].read) for name in ("hhh", "helpsteer3", "ultrafeedback")
)
MARK = "answer"


def sample(name):
    path = SAMPLES / name
    if not path.exists():
        pytest.skip(f"the real sample {name} is not beside the repository")
    return [row for _, row in read_rows(str(path))]


def reasons(rows, parse):
    """0-based row numbers by reason, "kept" for pairs."""
    found = collections.defaultdict(list)
    for number, row in enumerate(rows):
        result = parse(row)
        found[result.reason if isinstance(result, Skip) else "kept"].append(number)
    return dict(found)


def test_harmless_base_drops_exactly_the_rows_that_are_known_to_be_faulty():
    rows = sample("hh/harmless-base/test.jsonl.gz")
    assert len(rows) == 2312
    found = reasons(rows, parse_hh)
    assert len(found.pop("kept")) == 2299
    assert found == {
        "prompts_differ": [1254, 1688, 1950, 1952, 2036],
        "not_alternating": [667, 763, 1319, 1849],
        "empty_chosen": [86, 516, 925, 1103],
    }


def test_speaker_names_inside_a_turn_stay_text():
    rows = sample("hh/harmless-base/test.jsonl.gz")
    inside = 0
    for row in rows:
        pair = parse_hh(row)
        if isinstance(pair, LabeledComparison):
            turns = [*pair.comparison.prompt_conversation, *pair.chosen, *pair.rejected]
            inside += any("Human:" in turn["content"] or "Assistant:" in turn["content"] for turn in turns)
            # Nothing is lost or moved: the transcript comes back up to white space.
            names = {"user": "Human", "assistant": "Assistant"}
            prompt = [*pair.comparison.prompt_conversation, *pair.chosen]
            back = "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in prompt)
            assert "".join(back.split()) == "".join(row["chosen"].split())
    assert inside > 15


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("hh/helpful-online/test.jsonl.gz", {"kept": 1123, "identical_answers": 13, "not_alternating": 1}),
        ("helpsteer3/preference.2rows.jsonl", {"kept": 2}),
        (
            "ultrafeedback/ultrafeedback.1000.jsonl",
            {"kept": 994, "identical_answers": 4, "empty_chosen": 1, "empty_rejected": 1},
        ),
        ("sharegpt/dpo_en_demo.json", {"kept": 300}),
        ("polite/instruction-data-with-preference.json", {"kept": 1094, "identical_answers": 6}),
        ("trl/pairs.jsonl", {"kept": 32}),
    ],
)
def test_real_samples_are_read_by_their_columns(name, counts):
    found = reasons(sample(name), parse_own)
    assert {reason: len(numbers) for reason, numbers in found.items()} == counts


def test_the_ultrafeedback_sample_has_its_share_of_ties():
    rows = sample("ultrafeedback/ultrafeedback.1000.jsonl")
    assert sum(map(score_tie, rows)) == 111


def steer(preference):
    return {
        "context": [{"role": "user", "content": "Hi"}],
        "response1": "one",
        "response2": "two",
        "overall_preference": preference,
    }


@pytest.mark.parametrize("kind", [int, float, str])
@pytest.mark.parametrize(
    ("preference", "label"), [(-3, "A"), (-2, "A"), (-1, "A"), (0, "Tie"), (1, "B"), (2, "B"), (3, "B")]
)
def test_all_seven_helpsteer3_preferences(preference, label, kind):
    pair = parse_helpsteer3(steer(kind(preference) if kind is not str else str(preference)))
    assert pair.label == label
    if label != "Tie":
        assert pair.chosen[0]["content"] == ("one" if preference < 0 else "two")


@pytest.mark.parametrize("value", [4, -4, 0.5, True, "", "best", float("nan"), [1]])
def test_other_preferences_are_no_preference(value):
    assert parse_helpsteer3(steer(value)).reason == "bad_preference"


USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "yes"), ("assistant", "no"))
)
SYSTEM = {"role": "system", "content": "Be brief."}
ACCEPTED = {
    "strings": {"prompt": "Hi", "chosen": "yes", "rejected": "no"},
    "messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "one message": {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
    "implicit prompt": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "ultrafeedback_binarized": {"prompt": "Hi", "prompt_id": "1", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "list prompt inside the lists": {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "argilla": {"instruction": "Hi", "chosen_response": "yes", "rejected_response": "no", "chosen_avg_rating": 4.0},
    "alpaca": {"instruction": "Hi", "input": "", "output": "yes", "chosen": "yes", "rejected": "no"},
    "ranking": {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    },
    "preference API": {"prompt_conversation": [USER], "completion_a": [BAD], "completion_b": [GOOD], "label": "B"},
    "helpsteer3": {"context": [USER], "response1": "yes", "response2": "no", "overall_preference": -1},
    "transcripts": {"chosen": "\n\nHuman: Hi\n\nAssistant: yes", "rejected": "\n\nHuman: Hi\n\nAssistant: no"},
    "transcript prompt": {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "yes", "rejected": "no"},
}


@pytest.mark.parametrize("row", ACCEPTED.values(), ids=ACCEPTED)
def test_every_accepted_form_gives_the_same_pair(row):
    pair = parse_own(row)
    assert isinstance(pair, LabeledComparison), pair
    assert [list(pair.comparison.prompt_conversation), list(pair.chosen), list(pair.rejected)] == [
        [USER],
        [GOOD],
        [BAD],
    ]


def test_system_turns_and_several_assistant_turns_stay_in_the_prompt():
    prompt = [SYSTEM, USER, {"role": "assistant", "content": "ümlaut 🙂"}, {"role": "user", "content": "and?"}]
    for row in (
        {"prompt": prompt, "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [*prompt, GOOD], "rejected": [*prompt, BAD]},
    ):
        assert list(parse_own(row).comparison.prompt_conversation) == prompt
    ranking = {**ACCEPTED["ranking"], "system": "Be brief."}
    assert list(parse_own(ranking).comparison.prompt_conversation) == [SYSTEM, USER]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Hi", "chosen": "a", "rejected": None}, "missing_column"),
        ({"prompt": "Hi", "chosen": "a"}, "unknown_columns"),
        ({}, "unknown_columns"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "empty_prompt"),
        ({"prompt": "Hi", "chosen": 3, "rejected": "b"}, "not_text"),
        ({"prompt": [{"role": "poet", "content": "x"}], "chosen": "a", "rejected": "b"}, "unknown_role"),
        ({"chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, "prompts_differ"),
        ({"prompt": [SYSTEM], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "prompts_differ"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "empty_prompt"),
        ({**ACCEPTED["preference API"], "label": "C"}, "bad_label"),
        (
            {"chosen": "\n\nHuman: x\n\nAssistant: y\n\nHuman: z", "rejected": "\n\nHuman: x\n\nAssistant: y"},
            "prompts_differ",
        ),
    ],
)
def test_rows_that_are_no_pair_say_why(row, reason):
    assert parse_own(row).reason == reason


@pytest.mark.parametrize(
    ("row", "tied"),
    [
        ({"score_chosen": 5.0, "score_rejected": 5.0}, True),
        ({"chosen_avg_rating": 5.0, "rejected_avg_rating": 4.75}, False),
        ({"chosen-rating": 4, "rejected-rating": 4.0}, True),
        ({"metadata": {"score_chosen": 1, "score_rejected": 1}}, True),
        ({"score_chosen": None, "score_rejected": None, "metadata": None}, False),
    ],
)
def test_ties_are_read_from_every_published_spelling(row, tied):
    assert score_tie(row) is tied


# Properties. `json_values` are arbitrary, `texts` are full of what confuses transcript parsers.
texts = st.lists(
    st.sampled_from(
        ["\n\nHuman:", "\n\nAssistant:", "Human: ", " Assistant:", "\n", " ", "é🙂", "a", "\ud800", MARK[:2]]
    ),
    max_size=6,
).map("".join)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-4, 4) | st.floats() | texts,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "user", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
roles = st.sampled_from(["user", "assistant", "system", "human", "gpt", "poet"])
messages = st.lists(st.fixed_dictionaries({"role": roles, "content": texts}), max_size=4)
FORMS = {
    "preference API": ("prompt_conversation", "completion_a", "completion_b", "label"),
    "helpsteer3": ("context", "response1", "response2", "overall_preference"),
    "ranking": ("conversations", "chosen", "rejected", "system"),
    "argilla": ("instruction", "chosen_response", "rejected_response"),
    "strings": ("prompt", "chosen", "rejected", "history"),
    "alpaca": ("instruction", "input", "chosen", "rejected", "tools"),
    "transcripts": ("chosen", "rejected", "chat_template_kwargs"),
    "openai": ("input", "preferred_output", "non_preferred_output"),
    "swift": ("messages", "rejected_response"),
    "ranked": ("prompt", "answers"),
    "scored": ("prompt", "generations", "ratings"),
    "kto": ("prompt", "completion", "label"),
    "kto messages": ("messages", "label"),
    "arena": ("conversation_a", "conversation_b", "winner"),
    "summaries": ("info", "summaries", "choice"),
    "scores": ("question", "answer_0", "answer_1", "score_0", "score_1"),
    "steps": ("prompt", "initial_reason_steps", "chosen", "rejected"),
}
ALL_COLUMNS = sorted({column for columns in FORMS.values() for column in columns} | {"metadata", "persona", "images"})
rows = st.dictionaries(st.sampled_from(ALL_COLUMNS), json_values | texts | messages, max_size=8)
READERS = {**{name: spec.read for name, spec in DATASETS.items()}, "own": read_own}


def assert_sound(result):
    if isinstance(result, Skip):
        assert result.reason.isidentifier()
        return
    if isinstance(result, RatedAnswer):
        assert isinstance(result.good, bool)
        return
    comparison = result.comparison
    answers = [comparison.completion_a, comparison.completion_b]
    if not comparison.prompt_conversation:  # text that only the tokenizer can divide
        assert answers == [(), ()]
        assert comparison.texts[0] == ""
        assert comparison.texts[1].strip() != comparison.texts[2].strip()
        return
    assert all(answer[0]["role"] == answer[-1]["role"] == "assistant" for answer in answers)
    first, second = ([turn | {"content": turn["content"].strip()} for turn in answer] for answer in answers)
    assert first[-1]["content"] or first[-1]["tool_calls"]
    assert second[-1]["content"] or second[-1]["tool_calls"]
    assert first != second
    assert comparison.prompt_conversation[-1]["role"] in ("user", "tool")
    json.dumps([list(comparison.prompt_conversation), *map(list, answers)], ensure_ascii=False).encode("utf-8")


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@settings(max_examples=60, deadline=None)
@given(row=rows)
def test_no_reader_crashes_or_yields_an_unsound_pair(read, row):
    form, outcomes = read(row)
    assert outcomes
    for one in outcomes:
        assert_sound(one)
    assert (form is None) == (outcomes[0] == outcomes[-1] and getattr(outcomes[0], "reason", "") == "unknown_columns")
    assert isinstance(score_tie(row), bool)


@pytest.mark.parametrize("columns", FORMS.values(), ids=FORMS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_form_crashes_when_its_columns_are_there(columns, data):
    assert resolve(columns)
    row = data.draw(st.fixed_dictionaries(dict.fromkeys(columns, json_values | texts | messages)))
    for one in read_own(row)[1]:
        assert_sound(one)


@settings(max_examples=150, deadline=None)
@given(turns=st.lists(texts, min_size=1, max_size=5), one=texts, two=texts, form=st.sampled_from(sorted(ACCEPTED)))
def test_answers_never_get_into_the_prompt(turns, one, two, form):
    """Whatever stands in the turns, a marked answer is in the completions or the row is refused."""
    one, two = MARK + one + "1", MARK + two + "2"
    names = ["user", "assistant"]
    prompt = [{"role": names[number % 2], "content": text} for number, text in enumerate(turns)]
    speakers = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    transcript = "".join(speakers[turn["role"]] + turn["content"] for turn in prompt) + "\n\nAssistant: "
    good, bad = ({"role": "assistant", "content": text} for text in (one, two))
    row = {
        "transcripts": {"chosen": transcript + one, "rejected": transcript + two},
        "transcript prompt": {"prompt": transcript, "chosen": one, "rejected": two},
        "strings": {"prompt": turns[0], "chosen": one, "rejected": two},
        "alpaca": {"instruction": turns[0], "input": turns[-1], "chosen": one, "rejected": two},
        "argilla": {"instruction": turns[0], "chosen_response": one, "rejected_response": two},
        "messages": {"prompt": prompt, "chosen": [good], "rejected": [bad]},
        "helpsteer3": {"context": prompt, "response1": two, "response2": one, "overall_preference": 2},
        "preference API": {"prompt_conversation": prompt, "completion_a": one, "completion_b": two, "label": "A"},
    }.get(form, {"prompt": turns[0], "chosen": [*prompt, good], "rejected": [*prompt, bad]})
    result = parse_own(row)
    assert_sound(result)
    if isinstance(result, LabeledComparison):
        assert all(MARK not in turn["content"] for turn in result.comparison.prompt_conversation)
        if not result.comparison.prompt_conversation:  # a transcript that is none is text for the tokenizer
            assert form == "transcripts"
            return
        assert result.chosen[0]["content"].strip() == one.strip()
        assert result.rejected[0]["content"].strip() == two.strip()


def test_ultrafeedback_in_its_four_published_variants():
    for name in ("ultrafeedback_binarized", "argilla", "implicit prompt", "strings"):
        pair = parse_ultrafeedback(ACCEPTED[name])
        assert (pair.chosen[0]["content"], pair.rejected[0]["content"]) == ("yes", "no")


def test_ones_own_parser_is_guarded(tmp_path, monkeypatch):
    (tmp_path / "my_rows.py").write_text(
        "from dpo_jax.data.comparison import Comparison, LabeledComparison\n"
        "def parse(row):\n"
        "    turns = [[{'role': 'assistant', 'content': row[key]}] for key in 'ab']\n"
        "    return LabeledComparison(Comparison([{'role': 'user', 'content': 'Hi'}], *turns), 'A')\n"
        "def nothing(row): return None\n"
        "def several(row): return [parse({'a': 'x', 'b': 'x'}), parse(row), 7]\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    parse = load_parser("my_rows:parse")
    assert parse({"a": "x", "b": "y"}).chosen[0]["content"] == "x"
    assert parse({"a": "x", "b": "x"}) == Skip("identical_answers")
    assert read_with(parse)({"a": "x", "b": "y"}) == (None, (parse({"a": "x", "b": "y"}),))
    assert parse({"a": "x"}) == Skip("parser_error", "my_rows:parse raised KeyError: 'b'")
    assert "NoneType" in load_parser("my_rows:nothing")({}).detail
    same, pair, wrong = load_parser("my_rows:several")({"a": "x", "b": "y"})
    assert (same.reason, pair.chosen[0]["content"], wrong.reason) == ("identical_answers", "x", "parser_error")
    for name, found in (
        ("my_rows:absent", "no absent"),
        ("no_such_module:f", "cannot be imported"),
        ("my_rows:number", "int"),
    ):
        with pytest.raises(UserError, match=found):
            load_parser(name)

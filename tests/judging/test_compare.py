"""`python -m dpo_jax.judge compare` in this process: figures by hand, and everything that is refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from dpo_jax import judge as door
from dpo_jax.errors import UserError
from dpo_jax.judging import api
from dpo_jax.preference.models import Ensemble, Function, Pointwise
from dpo_jax.preference.verdicts import ask
from tests.judging import judges
from tests.judging.judges import answer, line, write

SHORTER = "--judge=tests.judging.judges:shorter"
A = [
    line("p", ["aa", "a"], source="one"),  # wins, wins
    line(7, ["aaaa"], [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], source="two"),
    line("r", ["a", "aaa"], source="one"),  # a tie, loses
    line("only a", ["a"], source="one"),
]
B = [
    line("r", ["b", "b", "left over"]),
    line("p", ["bbbb", "bbb"]),
    line("7", ["bb"], A[1]["prompt"]),
    line("only b", ["b"]),
    line("only b too", ["b"]),
]


def compare(*args):
    return door.main(["judge", "compare", *args])


@pytest.fixture
def files(tmp_path):
    return write(tmp_path / "a.jsonl", A), write(tmp_path / "b.jsonl", B)


def test_the_figures_by_hand(files, tmp_path, capsys):
    out = tmp_path / "figures.json"
    assert compare(*files, SHORTER, f"--json={out}") == 0
    found = json.loads(out.read_text())
    means = np.array([1, 0, 0.25])  # of p, 7 and r
    assert found["win_rate"] == pytest.approx(means.mean())
    assert found["win_rate_error"] == pytest.approx(means.std() / math.sqrt(3), rel=0.03)
    assert (found["wins"], found["ties"], found["losses"]) == pytest.approx((1 / 3, 0.5 / 3, 1.5 / 3))
    assert (found["no_verdict"], found["order_agreement"]) == (0, 1)
    assert found["mean_length_a"] == pytest.approx((1.5 + 4 + 2) / 3)
    assert found["mean_length_b"] == pytest.approx((3.5 + 2 + 1) / 3)
    assert found["length_unit"] == "tokens"
    assert [found[name] for name in ("prompts", "comparisons", "only_a", "only_b", "unpaired")] == [3, 5, 1, 2, 1]
    assert (found["judge"], found["a"], found["b"]) == ("tests.judging.judges:shorter", *files)
    assert 0 < found["length_controlled_win_rate"] < 1
    assert found["length_controlled_error"] > 0
    assert "disagreement" not in found
    one, two = found["by_source"]["one"], found["by_source"]["two"]
    assert (one["win_rate"], one["ties"], one["prompts"], one["no_verdict"]) == (0.625, 0.25, 2, 0)
    assert (two["win_rate"], two["win_rate_error"], two["prompts"]) == (0, None, 1)  # of one prompt there is no error
    printed, said = capsys.readouterr()
    assert "0.417 ± " in printed
    assert "33.3%, 16.7%, 50.0%" in printed
    assert f"1 prompts are in {files[0]} alone" in said
    assert f"2 prompts are in {files[1]} alone" in said
    assert "1 answers have none of their number in the other file" in said


def test_exchanged_files_give_the_rest(files):
    one, other = (api.compare(*both, "tests.judging.judges:shorter") for both in (files, files[::-1]))
    assert one.win_rate == pytest.approx(1 - other.win_rate)
    assert one.length_controlled_win_rate == pytest.approx(1 - other.length_controlled_win_rate)
    assert (one.mean_length_a, one.only_a) == (other.mean_length_b, other.only_b)


def test_the_function_takes_lines_and_models(files):
    judge = Pointwise("length", lambda answered: np.array([-len(done[-1]["content"]) for _, done, *_ in answered]))
    by_lines, by_files = api.compare(A, B, judge), api.compare(*files, judge)
    assert by_lines.win_rate == by_files.win_rate
    # tanh((r_B - r_A) / 2) of lengths: p 4 - 2 and 3 - 1, 7 by 2 - 4, r by 0 and 1 - 3.
    half = (1 + math.tanh(1)) / 2
    assert by_lines.win_rate == pytest.approx((half + (1 - half) + (0.5 + 1 - half) / 2) / 3, rel=1e-8)
    assert (by_lines.a, by_files.a) == ("a", files[0])
    assert api.compare(A, B, judge, limit=1).prompts == 1


def test_answers_without_a_verdict_are_counted_and_left_out(tmp_path):
    a = write(tmp_path / "a.jsonl", [line("p", ["a", "xa"]), line("q", ["xaa"]), line("r", ["a"])])
    b = write(tmp_path / "b.jsonl", [line("p", ["bb", "b"]), line("q", ["b"]), line("r", ["bb"])])
    found = api.compare(a, b, "tests.judging.judges:some")
    assert (found.win_rate, found.ties, found.no_verdict, found.comparisons) == (1, 0, 2, 4)
    out = tmp_path / "verdicts.jsonl"
    assert compare(a, b, "--judge=tests.judging.judges:some", f"--out={out}") == 0
    assert json.loads(out.read_text().splitlines()[1]) == {
        "id": "p",
        "sample": 1,
        "verdict": None,
        "orders": [None, None],
        "length_a": 2,
        "length_b": 1,
    }
    none = api.compare(a, b, Function("none", lambda comparison: None))
    assert math.isnan(none.win_rate)
    assert none.no_verdict == 4


class Biased:
    """Likes what it is shown second, and long answers a little."""

    name = "biased"

    def __init__(self):
        self.asked = 0

    def orders(self, comparisons):
        self.asked += len(comparisons)
        longer = np.array([0.1 * np.sign(len(b) - len(a)) for a, b in map(judges.texts, comparisons)])
        return np.stack([0.8 + longer, 0.8 - longer])

    def __call__(self, comparisons):
        first, second = self.orders(comparisons)
        return (first - second) / 2


def test_a_judge_that_tells_its_orders_is_asked_for_them(files, tmp_path):
    judge = Biased()
    found = api.compare(*files, judge)
    assert judge.asked == found.comparisons == 5
    # p: A is shorter both times, 0.45; 7: longer, 0.55; r: a tie, and longer.
    assert found.win_rate == pytest.approx((0.45 + 0.55 + (0.5 + 0.55) / 2) / 3)
    assert found.order_agreement == 0
    same = ask(judge, [])
    assert same.orders.shape == (2, 0)


def test_an_ensemble_says_how_far_it_disagrees(files):
    pair = Ensemble((Function("shorter", judges.shorter), Function("second", judges.second)))
    found = api.compare(*files, pair)
    # `second` says 0 of both orders together, `shorter` -1, -1, +1, 0, +1: deviations of 0.5, but for the tie.
    assert found.disagreement == pytest.approx(0.4)
    assert found.win_rate == pytest.approx((0.75 + 0.25 + 0.375) / 3)
    assert found.judge == "shorter,second"


def test_a_member_without_half_a_verdict_has_none():
    class Half(Biased):
        def orders(self, comparisons):
            return np.stack([np.full(len(comparisons), np.nan), np.ones(len(comparisons))])

    comparison = api.match_answers(api.answers_among([("a:1", A[0])], "a"), api.answers_among([("b:1", B[1])], "b"))
    asked = ask(Ensemble((Half(), Function("shorter", judges.shorter))), [comparison.matches[0].comparison])
    assert asked.orders.tolist() == [[-1.0], [1.0]]
    assert np.isnan(asked.spread).all()


def test_a_judge_that_does_not_negate_is_asked_both_ways(files):
    class Stubborn:
        name = "stubborn"

        def __call__(self, comparisons):
            return np.ones(len(comparisons))

    found = api.compare(*files, Stubborn())
    assert (found.win_rate, found.ties, found.order_agreement) == (0.5, 1, 0)


@pytest.mark.parametrize(
    ("said", "words"),
    [([0.5], "verdicts of shape (1,)"), ([0.1] * 9 + [1.5], "it said 1.5; needed is a number from -1 to 1")],
)
def test_a_judge_that_says_something_else_is_refused(files, said, words):
    class Wrong:
        name = "wrong"

        def __call__(self, comparisons):
            return np.array(said)

    with pytest.raises(UserError) as error:
        api.compare(*files, Wrong())
    assert words in str(error.value)


def test_lengths_are_characters_where_an_answer_has_no_tokens(tmp_path):
    bare = {"id": "q", "prompt": "Q", "answers": [answer("äöü")]}
    a, b = write(tmp_path / "a.jsonl", [line("p", ["aa"]), bare]), write(tmp_path / "b.jsonl", [line("p", ["b"]), bare])
    found = api.compare(a, b, Function("shorter", judges.shorter))
    assert (found.length_unit, found.mean_length_a) == ("characters", 2.5)
    assert api.compare(A, B, Function("shorter", judges.shorter), lengths="characters").length_unit == "characters"
    with pytest.raises(UserError, match=r"a.jsonl:2 has an answer without token_ids; use --lengths=characters"):
        api.compare(a, b, Function("shorter", judges.shorter), lengths="tokens")


def test_a_transcript_is_judged_as_its_turns():
    prompt = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Name a colour.\n\nAssistant:"
    seen = []
    api.compare([line("p", [" Red."], prompt)], [line("p", [" Blue"], prompt)], Function("see", seen.append))
    first = seen[0]
    assert [turn["content"] for turn in first.prompt_conversation] == ["Hi", "Hello", "Name a colour."]
    assert [side[0]["content"] for side in (first.completion_a, first.completion_b)] == ["Red.", "Blue"]
    assert first.texts == (prompt, " Red.", " Blue")


def test_an_answer_that_looks_like_messages_is_a_text():
    text = '[{"role": "user", "content": "x"}]'
    seen = []
    api.compare([line("p", [text])], [line("p", [""])], Function("see", seen.append))
    assert seen[0].completion_a == [{"role": "assistant", "content": text}]
    assert seen[0].completion_b == [{"role": "assistant", "content": ""}]


ROWS = {
    "other prompt": [line("p", ["b"], "another")],
    "no ids": [line("x", ["b"])],
    "twice": [line("p", ["b"]), line("p", ["c"])],
    "empty": [line("p", [])],
    "no text": [{"id": "p", "prompt": "question p", "answers": [{"logprob": 1}]}],
    "pairs": [{"prompt": "Hi", "chosen": "yes", "rejected": "no"}],
    "null": [{"id": "p", "prompt": None, "answers": [answer("b")]}],
    "bad id": [{"id": 1.5, "prompt": "Hi", "answers": [answer("b")]}],
    "source": [line("p", ["b"], source="two")],
    "bad source": [line("p", ["b"], source=3)],
    "blank": [line("p", ["b"], " ")],
}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("other prompt", "b.jsonl:1: the prompt of id 'p' is 'another', and 'question p' in "),
        ("no ids", "compare answers to the same prompts"),
        ("twice", "b.jsonl:2: the id 'p' is that of "),
        ("empty", "b.jsonl:1: answers is empty"),
        ("no text", "b.jsonl:1: an answer is {'logprob': 1}"),
        ("pairs", "b.jsonl:1: found prompt, chosen, rejected; needed is a line of python -m dpo_jax.sample"),
        ("null", "b.jsonl:1: prompt is None"),
        ("bad id", "b.jsonl:1: id is 1.5"),
        ("source", "the source of id 'p' is 'two', and 'one' in"),
        ("bad source", "b.jsonl:1: source is 3"),
        ("blank", "b.jsonl:1: the prompt is empty or blank"),
    ],
)
def test_bad_answers_are_one_line(tmp_path, rows, words, capsys):
    a = write(tmp_path / "a.jsonl", [line("p", ["a"], source="one")])
    assert compare(a, write(tmp_path / "b.jsonl", ROWS[rows]), SHORTER) == 2
    refused(capsys, words)


def refused(capsys, words):
    said = capsys.readouterr().err.strip()
    assert words in said
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1


def test_a_torn_file_is_refused_with_what_mends_it(files, tmp_path, capsys):
    (tmp_path / "torn.jsonl").write_text(json.dumps(B[0]) + "\n" + json.dumps(B[1])[:30])
    assert compare(files[0], str(tmp_path / "torn.jsonl"), SHORTER) == 2
    refused(capsys, "torn.jsonl:2: invalid json: ")
    assert compare(files[0], str(tmp_path / "none.jsonl"), SHORTER) == 2
    refused(capsys, "none.jsonl: cannot be read")
    (tmp_path / "empty.jsonl").write_text("")
    assert compare(files[0], str(tmp_path / "empty.jsonl"), SHORTER) == 2
    refused(capsys, "empty.jsonl: the file is empty")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "--judge is missing"),
        (["--judge=tests.judging.judges:no"], "no"),
        (["--judge=nowhere:no"], "nowhere"),
        (["--judge=tests.judging.judges:broken"], "it ended in KeyError"),
        (["--judge=tests.judging.judges:loud"], "it said 2; needed is a number from -1 (A) to 1 (B)"),
        ([SHORTER, "--option=size=3"], "size"),
        ([SHORTER, "--option=3"], "--option=3; needed is NAME=VALUE"),
        ([SHORTER, "--lengths=words"], "--lengths=words does not exist; choose from auto, tokens, characters"),
        ([SHORTER, "--limit=-1"], "--limit=-1; needs 0 or more"),
        ([SHORTER, "--json=no/such/place.json"], "--json=no/such/place.json cannot be written"),
        ([SHORTER, "--overwrite"], "--overwrite has no meaning without --out"),
        ([SHORTER, "--split=test"], "split"),
        ([SHORTER, "more.jsonl"], "compare takes 2, found 3 files or names"),
    ],
)
def test_a_bad_command_is_one_line(tmp_path, args, words, capsys):
    same = [write(tmp_path / name, A[:1]) for name in ("a.jsonl", "b.jsonl")]
    assert compare(*same, *args) == 2
    refused(capsys, words)


def test_no_file_is_written_over(files, capsys):
    before = Path(files[0]).read_bytes()
    assert compare(*files, SHORTER, f"--out={files[0]}") == 2
    refused(capsys, f"--out={files[0]} is {files[0]}, too; choose another file")
    assert Path(files[0]).read_bytes() == before


def test_commands_that_are_not_there(capsys):
    for words, argv in (("a command is missing", ["judge"]), ("unknown command 'grade'", ["judge", "grade"])):
        assert door.main(argv) == 2
        refused(capsys, words)


def test_help_tells_every_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        door.main(["judge", "compare", "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"--{name}" in printed for name in ("judge", "out", "html", "json", "lengths"))
    assert "--split" not in printed


def test_it_can_be_interrupted(files, capsys):
    assert compare(*files, "--judge=tests.judging.judges:stopped") == 130
    assert "the same command resumes it" in capsys.readouterr().err

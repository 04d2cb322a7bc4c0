"""Benchmarks: rows of our own in the published shapes, and the published aggregates worked out by hand."""

import json
import math

import numpy as np
import pytest

from dpo_jax.errors import UserError
from dpo_jax.judging import api
from dpo_jax.judging.benchmarks.benchmark import weighted_means
from dpo_jax.judging.benchmarks.rewardbench import SECTIONS
from dpo_jax.judging.benchmarks.table import BENCHMARKS
from dpo_jax.judging.flags import FLAGS
from dpo_jax.preference.models import Function, Pointwise
from tests.judging.judges import texts, write
from tests.places import SHARED

CASES = SHARED.parent / "cases" / "data"


def number(text):
    """An answer's own worth: a number at its beginning; NaN of any other text."""
    try:
        return float(text.split()[0])
    except ValueError:
        return math.nan


SCORER = Pointwise("scorer", lambda answered: np.array([number(done[-1]["content"]) for _, done, *_ in answered]))


def by_sign(comparison):
    a, b = map(number, texts(comparison))
    return None if math.isnan(a - b) else float(np.sign(b - a))


COMPARES = Function("compares", by_sign)


class Judge:
    """Verdicts in both orders by the question: {question: (of the first order, of the second)}, as in the file."""

    name = "table"

    def __init__(self, said):
        self.said = said

    def orders(self, comparisons):
        found = []
        for one in comparisons:
            a, b = map(number, texts(one))
            forward, backward = self.said[one.prompt_conversation[-1]["content"]]
            # The table is of the order in the file, where the answer with 1 is first.
            found.append((forward, backward) if a < b else (backward, forward))
        return np.array(found, np.float64).T

    def __call__(self, comparisons):
        first, second = self.orders(comparisons)
        return (first - second) / 2


def test_the_flag_has_every_benchmark():
    assert set(FLAGS["format"][0].choices) == {"auto", *BENCHMARKS}


# ------------------------------------------------------------------------------------------------------ labelled pairs


def test_pairs_in_any_form_by_what_they_call_their_source(tmp_path):
    rows = [
        {"prompt": "Q", "chosen": "2", "rejected": "1", "source": "s"},
        {"prompt": "Q", "chosen": "1", "rejected": "2", "source": "s"},
        {"prompt": "Q", "chosen": "3", "rejected": "3.0", "source": "t"},
        {"prompt": "Q", "chosen": "none", "rejected": "2", "source": "t"},
        {"prompt": "Q", "chosen": "5", "rejected": "4", "source": "t"},
        {"prompt": "Q", "chosen": "same", "rejected": "same", "source": "t"},
        {"prompt": "Q", "chosen": "2", "rejected": "1", "score_chosen": 3, "score_rejected": 3},
        {"chosen": "2"},
    ]
    found = api.benchmark(write(tmp_path / "pairs.jsonl", rows), COMPARES)
    assert (found.format, found.items, found.comparisons, found.no_verdict) == ("pairs", 5, 5, 1)
    assert found.accuracy == pytest.approx((1 + 0 + 0.5 + 1) / 4)  # a tie is a half, what has no verdict is out
    assert found.accuracy_error == pytest.approx(np.std([1, 0, 0.5, 1]) / 2, rel=0.03)
    assert found.ties == 0.25
    assert found.left_out == {"identical_answers": 1, "tie": 1, "unknown_columns": 1}
    assert {name: (part["accuracy"], part["items"], part["no_verdict"]) for name, part in found.parts.items()} == {
        "s": (0.5, 2, 0),
        "t": (0.75, 3, 1),
    }


def test_names_of_single_rows_are_no_parts(tmp_path):
    rows = [{"prompt": "Q", "chosen": "2", "rejected": "1", "source": f"row {i}"} for i in range(51)]
    assert list(api.benchmark(write(tmp_path / "pairs.jsonl", rows), COMPARES).parts) == ["all"]
    assert len(api.benchmark(str(tmp_path / "pairs.jsonl"), COMPARES, limit=50).parts) == 50


def test_labels_of_a_and_b_and_messages(tmp_path):
    ask = [{"role": "user", "content": "Q"}]
    side = lambda text: [{"role": "assistant", "content": text}]
    rows = [
        {"prompt_conversation": ask, "completion_a": side(a), "completion_b": side(b), "label": label}
        for a, b, label in (("1", "2", "B"), ("2", "1", "B"), ("9", "2", "A"), ("1", "2", "Tie"))
    ]
    found = api.benchmark(write(tmp_path / "api.jsonl", rows), COMPARES)
    assert (found.accuracy, found.items, found.left_out) == (pytest.approx(2 / 3), 3, {"tie": 1})
    assert api.benchmark(str(tmp_path / "api.jsonl"), SCORER).accuracy == pytest.approx(2 / 3)
    assert api.benchmark(str(tmp_path / "api.jsonl"), COMPARES, limit=1).items == 1


def test_rated_answers_meet_their_prompts(tmp_path):
    rows = [
        {"prompt": "Q", "completion": text, "label": good} for text, good in (("3", True), ("1", False), ("2", False))
    ]
    found = api.benchmark(write(tmp_path / "kto.jsonl", rows), COMPARES)
    assert (found.accuracy, found.items, found.left_out) == (1, 1, {"unpaired": 1})


def test_a_dataset_by_its_name_and_split(tmp_path):
    start = "\n\nHuman: Q\n\nAssistant:"
    for split, chosen in (("train", "1"), ("test", "3")):
        (tmp_path / "hhh/harmless-base").mkdir(parents=True, exist_ok=True)
        write(
            tmp_path / f"hhh/harmless-base/{split}.jsonl", [{"chosen": f"{start} {chosen}", "rejected": f"{start} 2"}]
        )
    found = api.benchmark("hhh/harmless-base", COMPARES, path=str(tmp_path / "hhh"))
    assert (found.accuracy, list(found.parts)) == (1, ["harmless-base"])  # the test split, where there is one
    assert api.benchmark("hhh/harmless-base", COMPARES, path=str(tmp_path / "hhh"), split="train").accuracy == 0
    with pytest.raises(UserError, match="split=dev"):
        api.benchmark("hhh/harmless-base", COMPARES, path=str(tmp_path / "hhh"), split="dev")


def test_columns_of_any_name(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question": "Q", "good": "2", "poor": "1"}])
    with pytest.raises(UserError, match=r"nothing to judge in it \(1 unknown columns\); first .*--columns=") as error:
        api.benchmark(path, COMPARES)
    assert "--config" not in str(error.value)
    assert api.benchmark(path, COMPARES, columns="chosen:good,rejected:poor").accuracy == 1


def test_the_gold_rule_knows_the_synthetic_pairs(tmp_path):
    from dpo_jax.data.synthetic import write_hh

    write_hh(tmp_path, seed=1, train_pairs=4, test_pairs=40)
    found = api.benchmark("synthetic", "gold", path=str(tmp_path))
    assert (found.accuracy, found.accuracy_error, found.items, found.no_verdict) == (1, 0, 40, 0)


# ------------------------------------------------------------------------------------------------------- RewardBench 1


def rewardbench1(subset, chosen, rejected):
    return {
        "prompt": "Q", "chosen": chosen, "rejected": rejected, "subset": subset, "id": 1, "chosen_model": "m",
        "rejected_model": "n",
    }  # fmt: skip


def test_rewardbench_weighs_subsets_within_sections(tmp_path):
    rows = [
        rewardbench1("alpacaeval-easy", "2", "1"),  # 1 of 2, counts 100
        rewardbench1("alpacaeval-easy", "1", "2"),
        rewardbench1("mt-bench-med", "2", "1"),  # 1 of 1, counts 40
        rewardbench1("math-prm", "2", "1"),  # 1 of 1, counts 984
        rewardbench1("hep-go", "1", "1.0"),  # a tie is not right, counts 164
    ]
    found = api.benchmark(write(tmp_path / "rb.jsonl", rows), COMPARES)
    chat, reasoning = (0.5 * 100 + 1 * 40) / 140, (1 * 984 + 0) / 1148
    assert found.format == "rewardbench"
    assert found.more == pytest.approx({"Chat": chat, "Reasoning": reasoning})
    assert found.accuracy == pytest.approx((chat + reasoning) / 2)
    assert {name: part["accuracy"] for name, part in found.parts.items()} == {
        "alpacaeval-easy": 0.5,
        "mt-bench-med": 1,
        "math-prm": 1,
        "hep-go": 0,
    }
    assert found.ties == 0.2
    assert math.isnan(found.accuracy_error)  # a part of one pair has no error


def test_rewardbench_errors_go_by_the_weights(tmp_path):
    rows = [rewardbench1(subset, *pair) for subset in ("donotanswer", "hep-go") for pair in (("2", "1"), ("1", "2"))]
    found = api.benchmark(write(tmp_path / "rb.jsonl", rows), COMPARES)
    of_part = 0.5 / math.sqrt(2)
    assert found.accuracy == 0.5
    assert found.accuracy_error == pytest.approx(math.sqrt(2 * (of_part / 2) ** 2), rel=0.03)


def test_the_published_sizes_of_sections():
    assert {name: sum(sizes.values()) for name, sizes in SECTIONS.items()} == {
        "Chat": 358,
        "Chat Hard": 456,
        "Safety": 740,
        "Reasoning": 1968,
    }


# ------------------------------------------------------------------------------------------------------- RewardBench 2


def rewardbench2(name, subset, good, bad):
    return {
        "id": name, "prompt": f"Q {name}", "chosen": good, "rejected": bad, "num_correct": len(good),
        "num_incorrect": len(bad), "total_completions": len(good) + len(bad), "subset": subset,
    }  # fmt: skip


FOURS = [
    rewardbench2("1", "Math", ["5"], ["1", "2", "4"]),  # 1
    rewardbench2("2", "Math", ["5"], ["1", "6", "4"]),  # 0
    rewardbench2("3", "Focus", ["5"], ["1", "5.0", "5.00"]),  # one of three at the top
    rewardbench2("4", "Focus", ["5"], ["1", "none", "2"]),  # a comparison without a verdict is not won
]
TIES = [
    rewardbench2("ref:1", "Ties", ["8"], ["2"]),
    rewardbench2("tied:1", "Ties", ["8", "7"], ["2"]),
    rewardbench2("ref:2", "Ties", ["3"], ["5"]),
    rewardbench2("tied:2", "Ties", ["4", "4.0"], ["5"]),
    rewardbench2("ref:3", "Ties", ["9"], ["1"]),
    rewardbench2("tied:3", "Ties", ["9", "9.0"], ["1"]),
]


@pytest.mark.parametrize("judge", [SCORER, COMPARES], ids=["scores", "compares"])
def test_best_of_four(tmp_path, judge):
    found = api.benchmark(write(tmp_path / "rb2.jsonl", FOURS), judge)
    assert found.format == "rewardbench2"
    assert {name: part["accuracy"] for name, part in found.parts.items()} == {
        "Math": 0.5,
        "Focus": pytest.approx(1 / 6),
    }
    assert found.accuracy == pytest.approx((1 / 2 + 1 / 6) / 2)
    assert (found.comparisons, found.no_verdict) == (12, 1)


def test_ties_by_scores(tmp_path):
    found = api.benchmark(write(tmp_path / "rb2.jsonl", TIES), SCORER)
    # Prompt 1: gaps 6 (ref) and 5 (tied), range 1; 2: -2 and -1, range 0; 3: 8 and 8, range 0.
    margins = (math.tanh(5 / 1 - 1) + -1 + 1) / 3
    assert found.accuracy == pytest.approx(0.3 * 2 / 3 + 0.3 * 2 / 3 + 0.2 * 2 / 3 + 0.2 * 2 / 3 + 0.01 * margins)
    prompts = [1 + 0.01 * math.tanh(4), -0.01, 1 + 0.01]
    assert found.accuracy_error == pytest.approx(np.std(prompts) / math.sqrt(3), rel=0.03)


def test_ties_of_a_judge_that_compares(tmp_path):
    found = api.benchmark(write(tmp_path / "rb2.jsonl", TIES), COMPARES)
    # Verdicts are 1, 0 or -1: prompt 1 has a gap of 1, and its range is 1, too, as 8 beats 7.
    margins = (math.tanh(1 / 1 - 1) + -1 + 1) / 3
    expected = 0.3 * 2 / 3 + 0.3 * 2 / 3 + 0.2 * 1 / 3 + 0.2 * 1 / 3 + 0.01 * margins
    assert found.accuracy == pytest.approx(expected)


def test_all_subsets_count_the_same(tmp_path):
    found = api.benchmark(write(tmp_path / "rb2.jsonl", FOURS + TIES), SCORER)
    assert found.accuracy == pytest.approx(sum(part["accuracy"] for part in found.parts.values()) / 3)


def test_rows_of_rewardbench2_that_say_something_else(tmp_path):
    rows = [
        rewardbench2("1", "Math", ["5", "6"], ["1"]),
        rewardbench2("x", "Ties", ["5", "6"], ["1"]),
        rewardbench2("2", "Math", ["5"], ["1"]) | {"prompt": ""},
        rewardbench2("3", "Math", ["5"], ["1"]),
        {"prompt": "Q", "chosen": ["5"], "rejected": None, "subset": "Math"},
    ]
    found = api.benchmark(write(tmp_path / "rb2.jsonl", rows), SCORER)
    assert (found.items, found.left_out) == (
        1,
        {"several_chosen": 1, "bad_id": 1, "bad_prompt": 1, "missing_column": 1},
    )


def test_means_over_what_is_there():
    parts = np.array([[1.0, math.nan], [0.0, 4.0], [1.0, 2.0], [0.0, math.nan]])
    score, error = weighted_means(parts, np.array([2.0, 1.0]))
    assert score == 2 * 0.5 + 3
    moved = np.array([2 * 0.5, -2 * 0.5 + 2 * 1, 2 * 0.5 - 2 * 1, -2 * 0.5])  # the second column's mean is over two
    assert error == pytest.approx(moved.std() / 2, rel=0.03)


# ----------------------------------------------------------------------------------------------------------- RM-Bench


def rm_bench(domain, good, bad):
    return {"id": f"{domain}{good}", "prompt": "Q", "chosen": good, "rejected": bad, "domain": domain}


def matrix(rows):
    """Hard, normal and easy as the benchmark's README writes them, from the scores of its rows."""
    wins = np.mean([[[float(c) > float(r) for r in bad] for c in good] for good, bad in rows], axis=0)
    return np.triu(wins, 1).sum() / 3, np.diag(wins).mean(), np.tril(wins, -1).sum() / 3


@pytest.mark.parametrize("judge", [SCORER, COMPARES], ids=["scores", "compares"])
def test_three_styles_against_three(tmp_path, judge):
    chat = [(["1", "2", "3"], ["2", "2.0", "4"]), (["9", "5", "7"], ["3", "6", "8"])]
    refuse, response = (["1", "5", "6"], ["0", "4", "7"]), (["3", "3", "3"], ["1", "2", "9"])
    rows = [rm_bench("chat", *pair) for pair in chat]
    rows += [rm_bench("safety-refuse", *refuse), rm_bench("safety-response", *response)]
    path = tmp_path / "total_dataset.json"
    path.write_text(json.dumps(rows))
    found = api.benchmark(str(path), judge)
    by_domain = np.array([matrix(chat), matrix([refuse, response])])
    # Chat by hand: the first row wins 3 > 2 twice (easy), the second all but 5 > 6, 5 > 8 and 7 > 8.
    assert by_domain[0] == pytest.approx([2 / 6, 1 / 6, 5 / 6])
    assert found.format == "rm-bench"
    assert (found.items, found.comparisons) == (4, 36)
    assert {name: part["accuracy"] for name, part in found.parts.items()} == pytest.approx(
        {"chat": by_domain[0].mean(), "safety": by_domain[1].mean()}
    )
    assert found.accuracy == pytest.approx(by_domain.mean())
    assert [found.more[name] for name in ("hard", "normal", "easy")] == pytest.approx(by_domain.mean(0).tolist())


def test_rows_of_rm_bench_have_three_of_each(tmp_path):
    rows = [rm_bench("chat", ["1", "2", "3"], ["1", "2", "3"]), rm_bench("chat", ["1", "2"], ["1", "2", "3"])]
    assert api.benchmark(write(tmp_path / "rm.jsonl", rows), SCORER).left_out == {"not_text": 1}


# --------------------------------------------------------------------------------------------------------- JudgeBench


def judgebench(name, source, label):
    return {
        "pair_id": name, "original_id": "1", "source": source, "question": name, "response_model": "m",
        "response_A": "1", "response_B": "2", "label": label,
    }  # fmt: skip


def test_both_games_of_judgebench(tmp_path):
    # Verdicts in the file's order and in the other one, +1: the second that is shown.
    said = {
        "both right": (-1, 1),
        "right and a tie": (-1, 0),
        "right and wrong": (1, 1),
        "two ties": (0, 0),
        "both wrong": (-1, 1),
        "right and none": (1, math.nan),
        "none": (math.nan, math.nan),
    }
    labels = dict(zip(said, ["A>B", "A>B", "A>B", "B>A", "B>A", "B>A", "A>B"], strict=True))
    sources = [
        "mmlu-pro-law",
        "mmlu-pro-math",
        "livebench-reasoning",
        "livebench-math",
        "livecodebench",
        "other",
        "other",
    ]
    rows = [judgebench(name, source, labels[name]) for name, source in zip(said, sources, strict=True)]
    found = api.benchmark(write(tmp_path / "jb.jsonl", rows), Judge(said))
    assert found.format == "judgebench"
    assert found.accuracy == pytest.approx(3 / 7)  # both right, right and a tie, right and none
    assert {name: part["accuracy"] for name, part in found.parts.items()} == {
        "Knowledge": 1,
        "Reasoning": 0,
        "Math": 0,
        "Coding": 0,
        "other": 0.5,
    }
    assert found.no_verdict == 2
    # In the file's order right, right, wrong, half, wrong, right, none; exchanged right, half, right, half, wrong.
    assert found.more == pytest.approx(
        {
            "order_as_given": (1 + 1 + 0 + 0.5 + 0 + 1 + 0) / 7,
            "order_exchanged": (1 + 0.5 + 1 + 0.5 + 0 + 0 + 0) / 7,
            "both_right": 1 / 7,
            "agreement": 3 / 7,
        }
    )


def test_a_label_of_judgebench_that_is_none(tmp_path):
    rows = [judgebench("a", "x", "A>B"), judgebench("b", "x", "A=B")]
    assert api.benchmark(write(tmp_path / "jb.jsonl", rows), COMPARES).left_out == {"bad_label": 1}


# ------------------------------------------------------------------------------------------------------------- LLMBar


def test_both_orders_of_llmbar_by_its_sets(tmp_path):
    sets = {"Natural": {"a": (-1, 1), "b": (1, 1)}, "Neighbor": {"c": (0, 1), "d": (1, -1)}}
    for name, said in sets.items():
        (tmp_path / name).mkdir()
        rows = [{"input": q, "output_1": "1", "output_2": "2", "label": 2 if q == "d" else 1} for q in said]
        (tmp_path / name / "dataset.json").write_text(json.dumps(rows))
    judge = Judge({question: orders for said in sets.values() for question, orders in said.items()})
    found = api.benchmark(str(tmp_path / "*" / "dataset.json"), judge)
    assert found.format == "llmbar"
    # a: both; b: only exchanged; c: half, and right exchanged; d: both.
    assert found.accuracy == pytest.approx((1 + 0.5 + 0.75 + 1) / 4)
    assert {name: part["accuracy"] for name, part in found.parts.items()} == {"Natural": 0.75, "Neighbor": 0.875}
    assert found.more == pytest.approx(
        {"order_as_given": 2.5 / 4, "order_exchanged": 1, "both_right": 0.5, "agreement": 0.5}
    )


# --------------------------------------------------------------------------------------------- forms that are not told


def test_a_form_may_be_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"input": "Q", "output_1": "2", "output_2": "1", "label": 1}])
    assert api.benchmark(path, COMPARES).format == "llmbar"
    assert api.benchmark(path, COMPARES, form="pairs").format == "pairs"
    with pytest.raises(UserError, match=r"nothing to judge in it \(1 missing column\)"):
        api.benchmark(path, COMPARES, form="judgebench")


@pytest.mark.skipif(not CASES.is_dir(), reason="needs the shared cases")
@pytest.mark.parametrize(
    ("file", "form", "comparisons"),
    [
        ("rewardbench1", "rewardbench", 3),
        ("rewardbench2", "rewardbench2", 9),
        ("judgebench", "judgebench", 3),
        ("llmbar", "llmbar", 3),
        ("question", "pairs", 3),
    ],
)
def test_shared_rows_are_recognised(file, form, comparisons):
    found = api.benchmark(str(CASES / f"{file}.jsonl"), Function("first", lambda comparison: 0))
    assert (found.format, found.items, found.comparisons) == (form, 3, comparisons)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_real_pairs():
    found = api.benchmark(str(SHARED / "hh/harmless-base"), "dpo_jax.preference.rules:shorter")
    assert found.items > 2200
    assert found.left_out["prompts_differ"] == 5
    assert 0.45 < found.accuracy < 0.6
    assert found.accuracy_error == pytest.approx(0.5 / math.sqrt(found.items), rel=0.05)

"""From files to training and evaluation pairs: counts, the hold-out, ties, the quarantine, and the cache in between."""

import gzip
import importlib
import json
import os
import re
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dpo_jax.data import tokenise
from dpo_jax.data.prepare import DataRequest, prepare
from dpo_jax.data.summary import field_lines, form_lines
from dpo_jax.errors import UserError
from dpo_jax.inspection.console import print_rows
from tests import places
from tests.data.test_render import bpe_tokenizer

SAMPLES = places.SHARED
TOKENIZER = bpe_tokenizer()


def rows(number, prompts=None, start=0):
    """Distinct pairs; `prompts` of them share each prompt."""
    return [
        {"prompt": f"question {i // (prompts or 1)}?", "chosen": f"yes {i}", "rejected": f"no {i}"}
        for i in range(start, start + number)
    ]


def jsonl(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (line if isinstance(line, str) else json.dumps(line) for line in content)
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


@pytest.fixture
def run(tmp_path):
    def run_it(dataset, path="", quarantine=None, tokenizer=TOKENIZER, progress=None, **options):
        options.setdefault("cache_dir", str(tmp_path / "cache"))
        return prepare(DataRequest(str(dataset), str(path), **options), tokenizer, quarantine, progress)

    return run_it


def texts(pairs):
    return [tuple(TOKENIZER.decode(part) for part in pairs[number]) for number in range(len(pairs))]


def prompts(pairs):
    return {prompt for prompt, _, _ in texts(pairs)}


def test_pairs_keep_the_order_of_the_file(tmp_path, run):
    prepared = run(jsonl(tmp_path / "data.jsonl", rows(10)), eval_pairs=0)
    start, end = "<|im_start|>user\nquestion ", "?<|im_end|>\n<|im_start|>assistant\n"
    assert texts(prepared.train) == [
        (f"{start}{i}{end}", f"yes {i}<|im_end|>\n", f"no {i}<|im_end|>\n") for i in range(10)
    ]
    assert len(prepared.evaluation) == 0
    assert prepared.train.lengths.tolist() == [[len(part) for part in prepared.train[i]] for i in range(10)]
    assert prepared.report["held_out"] == "no evaluation (eval_pairs=0)"


def test_pairs_are_held_out_by_prompt(tmp_path, run):
    path = jsonl(tmp_path / "data.jsonl", rows(60, prompts=3))
    prepared = run(path, eval_pairs=10)
    assert len(prepared.evaluation) == 10
    assert not prompts(prepared.train) & prompts(prepared.evaluation)
    assert len(prepared.train) == 60 - 12  # four prompts are out of training; two of their pairs are not needed
    assert "10 pairs of 4 prompts are held out by prompt (seed 0)" in prepared.report["held_out"]
    assert texts(run(path, eval_pairs=10).evaluation) == texts(prepared.evaluation)
    assert texts(run(path, eval_pairs=10, seed=1).evaluation) != texts(prepared.evaluation)


def test_the_same_prompts_are_held_out_whatever_the_tokenizer(tmp_path, run):
    path = jsonl(tmp_path / "data.jsonl", rows(40))
    other = bpe_tokenizer(limit=300)
    assert run(path, eval_pairs=10).evaluation.index.tolist() == (
        run(path, eval_pairs=10, tokenizer=other, prompt_format="plain").evaluation.index.tolist()
    )


def test_at_most_half_is_held_out(tmp_path, run):
    prepared = run(jsonl(tmp_path / "data.jsonl", rows(10)), eval_pairs=512)
    assert (len(prepared.train), len(prepared.evaluation)) == (5, 5)
    with pytest.raises(UserError, match="eval_pairs=-1"):
        run(tmp_path / "data.jsonl", eval_pairs=-1)


def test_one_prompt_for_all_pairs_leaves_nothing_to_hold_out(tmp_path, run):
    prepared = run(jsonl(tmp_path / "data.jsonl", rows(10, prompts=10)), eval_pairs=3)
    assert (len(prepared.train), len(prepared.evaluation)) == (10, 0)


def test_a_published_split_is_sampled(tmp_path, run):
    jsonl(tmp_path / "data/train.jsonl", rows(20))
    jsonl(tmp_path / "data/test.jsonl", rows(12, start=18))
    prepared = run(tmp_path / "data", eval_pairs=5)
    assert (len(prepared.train), len(prepared.evaluation)) == (20, 5)
    assert min(prepared.evaluation.index) >= 20
    everything = run(tmp_path / "data", eval_pairs=-1)
    assert len(everything.evaluation) == 12
    assert "12 of its 12 pairs (seed 0); 2 have a prompt of training" in everything.report["held_out"]


def test_eval_path_is_evaluated(tmp_path, run):
    train, held = jsonl(tmp_path / "a.jsonl", rows(20)), jsonl(tmp_path / "b.jsonl", rows(4, start=50))
    prepared = run(train, eval_path=held)
    assert (len(prepared.train), len(prepared.evaluation)) == (20, 4)
    assert f"eval_path={held}" in prepared.report["held_out"]
    assert prepared.evaluation.source.tolist() == [1] * 4
    assert prepared.report["source_names"] == [train, held]


BAD_LINES = ["{broken", {"prompt": "q", "chosen": "", "rejected": "b"}, {"chosen": 1}]
SAME = {"prompt": "q", "chosen": "b", "rejected": "b "}


def test_bad_rows_are_counted_and_quarantined_with_their_place(tmp_path, run):
    path = jsonl(tmp_path / "data.jsonl", [*rows(30), *BAD_LINES, SAME])
    quarantine = tmp_path / "run/quarantine.jsonl"
    first = run(path, quarantine=quarantine).report
    (source,) = first["sources"]
    assert (source["read"], source["kept"]) == (34, 30)
    assert source["dropped"] == {"invalid_json": 1, "empty_chosen": 1, "unknown_columns": 1, "identical_answers": 1}
    assert first["quarantine"] == str(quarantine)
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [(line["location"], line["reason"], line["row"]) for line in lines] == [
        (f"{path}:31", "invalid_json", BAD_LINES[0]),
        (f"{path}:32", "empty_chosen", BAD_LINES[1]),
        (f"{path}:33", "unknown_columns", BAD_LINES[2]),
    ]
    content = quarantine.read_text()
    quarantine.unlink()
    assert run(path, quarantine=quarantine).report == first  # from the cache
    assert quarantine.read_text() == content


def test_bad_rows_stay_in_the_cache_where_no_run_asks_for_them(tmp_path, run):
    path = jsonl(tmp_path / "data.jsonl", [*rows(30), *BAD_LINES])
    report = run(path).report
    assert [json.loads(line)["location"] for line in Path(report["quarantine"]).read_text().splitlines()] == [
        f"{path}:{number}" for number in (31, 32, 33)
    ]
    assert report["sources"][0]["examples"]["empty_chosen"] == f"{path}:32"


def test_building_tells_how_far_it_has_come(tmp_path, run):
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows(2000)).encode())
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl.gz").write_bytes(packed)
    jsonl(tmp_path / "data/test.jsonl", [*rows(900, start=3000), *BAD_LINES])
    total = len(packed) + (tmp_path / "data/test.jsonl").stat().st_size
    told = []
    prepared = run(tmp_path / "data", progress=told.append)
    assert prepared.built
    assert (told[-1].bytes, told[-1].rows, told[-1].kept) == (total, 2903, 2900)
    assert {reading.total_bytes for reading in told} == {total}
    assert all(getattr(a, key) <= getattr(b, key) for key in ("bytes", "rows", "kept") for a, b in pairwise(told))
    assert told[0].rows == 512
    assert 0 < told[0].bytes <= len(packed)
    told.clear()
    assert not run(tmp_path / "data", progress=told.append).built
    assert not told


def test_an_old_quarantine_goes_when_there_are_no_bad_rows(tmp_path, run):
    (tmp_path / "quarantine.jsonl").write_text("old\n")
    report = run(jsonl(tmp_path / "data.jsonl", rows(4)), quarantine=tmp_path / "quarantine.jsonl").report
    assert report["quarantine"] is None
    assert not (tmp_path / "quarantine.jsonl").exists()


def test_too_many_bad_rows_stop_the_run_and_name_their_reasons(tmp_path, run):
    path = jsonl(tmp_path / "data.jsonl", [*rows(10), *BAD_LINES])
    quarantine = tmp_path / "quarantine.jsonl"
    for _ in range(2):  # built, then from the cache
        with pytest.raises(
            UserError, match=r"3 of 13 rows are bad.*1 invalid_json.*data.jsonl:11.*1 empty_chosen"
        ) as caught:
            run(path, quarantine=quarantine)
        assert "\n" not in str(caught.value)
        assert str(quarantine) in str(caught.value)
        assert len(quarantine.read_text().splitlines()) == 3
    assert len(run(path, max_bad_fraction=0.3, eval_pairs=0).train) == 10


def test_deliberate_drops_are_not_bad(tmp_path, run):
    tied = [{**row, "score_chosen": 3, "score_rejected": 3} for row in rows(20, start=30)]
    path = jsonl(tmp_path / "data.jsonl", [*rows(10), *[SAME] * 20, *tied])
    prepared = run(path, eval_pairs=0)
    assert len(prepared.train) == 10
    assert prepared.report["sources"][0]["dropped"] == {"identical_answers": 20, "tie": 20}
    assert prepared.report["quarantine"] is None
    assert len(run(path, eval_pairs=0, drop_ties=False).train) == 30


def test_a_row_labelled_a_tie_is_dropped_whatever_drop_ties_says(tmp_path, run):
    row = {"context": [{"role": "user", "content": "q"}], "response1": "a", "response2": "b"}
    path = jsonl(tmp_path / "data.jsonl", [{**row, "overall_preference": value} for value in range(-3, 4)])
    prepared = run("helpsteer3", path, eval_pairs=0, drop_ties=False)
    assert [chosen[0] for _, chosen, _ in texts(prepared.train)] == list("aaabbb")
    assert prepared.report["sources"][0]["dropped"] == {"tie": 1}


def test_wrong_columns_are_an_error_that_lists_found_and_accepted(tmp_path, run):
    path = jsonl(tmp_path / "data.jsonl", [{"question": "q", "answer": "a"}] * 3)
    with pytest.raises(
        UserError,
        match=r"data.jsonl:1: found question, answer; accepted are question.chosen.rejected.*columns=chosen:NAME",
    ):
        run(path)
    with pytest.raises(
        UserError, match=r"data.jsonl:1: found question, answer; not the columns of the dataset that is named"
    ):
        run("hhh", path)


def test_no_pair_left_is_an_error_that_says_where_they_went(tmp_path, run):
    with pytest.raises(UserError, match=r"no training pair is left.*3 rows read, 0 kept, dropped 3 identical_answers"):
        run(jsonl(tmp_path / "data.jsonl", [SAME] * 3))


def test_a_truncated_file_leaves_no_cache(tmp_path, run):
    (tmp_path / "data.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in rows(999)).encode())[:-20]
    )
    with pytest.raises(UserError, match="truncated or damaged after"):
        run(tmp_path / "data.jsonl.gz")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_the_cache_is_used_for_the_same_request_and_for_no_other(tmp_path, run, monkeypatch):
    path = jsonl(tmp_path / "data.jsonl", rows(20))
    directory = lambda **options: run(path, **options).train.cache.directory
    first = directory()
    assert directory(seed=7, eval_pairs=3, max_bad_fraction=0.5) == first  # a view of the same pairs
    others = {
        directory(max_prompt_length=9),
        directory(max_completion_length=9),
        directory(overlong="drop"),
        directory(drop_ties=False),
        directory(prompt_format="plain"),
        directory(tokenizer=bpe_tokenizer(limit=300)),
        directory(tokenizer=bpe_tokenizer(bpe_tokenizer().chat_template + " ")),
    }
    assert len(others | {first}) == 8
    cutting = bpe_tokenizer()
    cutting.backend_tokenizer.enable_truncation(4)  # somebody else's setting, which our calls do not use
    assert directory(tokenizer=cutting) == first
    jsonl(tmp_path / "data.jsonl", rows(21))
    assert directory() not in others | {first}


def test_the_same_files_elsewhere_are_the_same_cache(tmp_path, run):
    """A machine that prepared the data has its files in another place than those that train."""
    ask = "\n\nHuman: {}?\n\nAssistant: {}"
    content = [{"chosen": ask.format(i, "a"), "rejected": ask.format(i, "b")} for i in range(9)]
    for place in ("here", "there"):
        jsonl(tmp_path / place / "one/train.jsonl", content)
    here, there = (run("synthetic", tmp_path / place).train.cache.directory for place in ("here", "there"))
    assert here == there


def test_ones_own_function_and_a_change_in_it(tmp_path, run, monkeypatch):
    source = (
        "from dpo_jax.data.comparison import Comparison, LabeledComparison\n"
        "def parse(row):\n"
        "    ask, one, two = row['text'].split('|')\n"
        "    say = lambda role, text: [{'role': role, 'content': text}]\n"
        "    answers = say('assistant', one), say('assistant', two)\n"
        "    return LabeledComparison(Comparison(say('user', ask), *answers), 'B')\n"
    )
    (tmp_path / "bar_rows.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    path = jsonl(tmp_path / "data.jsonl", [{"text": f"q{i}|a|b"} for i in range(19)] + [{"text": "no bars"}])
    prepared = run("bar_rows:parse", path, eval_pairs=0)
    assert len(prepared.train) == 19
    assert texts(prepared.train)[0][1] == "b<|im_end|>\n"
    assert prepared.report["sources"][0]["dropped"] == {"parser_error": 1}
    before = prepared.train.cache.directory
    (tmp_path / "bar_rows.py").write_text(source.replace("'B'", "'A'") + "# the other way round\n")
    monkeypatch.delitem(sys.modules, "bar_rows")
    changed = run("bar_rows:parse", path, eval_pairs=0)
    assert changed.train.cache.directory != before
    assert texts(changed.train)[0][1] == "a<|im_end|>\n"


def test_lengths_truncation_and_sources_are_reported(tmp_path, run):
    for subset, number in (("one", 12), ("two", 8)):
        start = 0 if subset == "one" else 100
        for split, many in (("train", number), ("test", 4)):
            content = [
                {
                    key: f"\n\nHuman: q{split}{start + i}\n\nAssistant: {answer}"
                    for key, answer in (("chosen", "yes " * (i + 1)), ("rejected", "no"))
                }
                for i in range(many)
            ]
            jsonl(tmp_path / "synth" / subset / f"{split}.jsonl", content)
    report = run("synthetic", tmp_path / "synth", eval_pairs=3, max_completion_length=8).report
    assert report["source_names"] == ["synthetic/one", "synthetic/two"]
    assert [(entry["name"], entry["split"], entry["kept"]) for entry in report["sources"]] == [
        ("synthetic/one", "train", 12),
        ("synthetic/two", "train", 8),
        ("synthetic/one", "test", 4),
        ("synthetic/two", "test", 4),
    ]
    assert report["sources"][0]["truncated"]["chosen"] > 0
    assert report["splits"]["train"]["pairs"] == 20
    assert report["splits"]["eval"]["pairs"] == 3
    train = report["splits"]["train"]
    assert train["tokens"]["chosen"]["max"] == 8
    assert train["longer"] == {"chosen": 1.0, "rejected": 0.0, "mean_difference": pytest.approx(4, abs=3)}
    assert {name: sum(found["counts"]) for name, found in train["histograms"].items()} == dict.fromkeys(
        ("prompt", "chosen", "rejected", "difference"), 20
    )
    json.dumps(report)


def test_over_long_pairs_are_dropped_on_request(tmp_path, run):
    path = jsonl(tmp_path / "data.jsonl", [*rows(5), {"prompt": "q", "chosen": "a " * 99, "rejected": "b"}])
    report = run(path, overlong="drop", max_prompt_length=64, max_completion_length=32, eval_pairs=0).report
    assert report["sources"][0]["dropped"] == {"too_long": 1}


def test_the_batch_size_changes_nothing(tmp_path, run, monkeypatch):
    path = jsonl(tmp_path / "data.jsonl", [*rows(30), *BAD_LINES])
    whole = run(path, cache_dir=str(tmp_path / "one"))
    monkeypatch.setattr(tokenise, "_BATCH", 4)
    parts = run(path, cache_dir=str(tmp_path / "two"))
    assert texts(whole.train) == texts(parts.train)
    assert np.array_equal(whole.evaluation.index, parts.evaluation.index)


@pytest.mark.parametrize(
    ("dataset", "path", "read", "kept"),
    [
        ("hhh", "hh", [2312, 1137], [2299, 1123]),
        ("hhh/harmless-base", "hh", [2312], [2299]),
        ("ultrafeedback", "ultrafeedback", [1000], [884]),
        ("helpsteer3", "helpsteer3", [2], [2]),
    ],
)
def test_the_real_samples(run, dataset, path, read, kept):
    if not (SAMPLES / path).exists():
        pytest.skip(f"the real sample {path} is not beside the repository")
    prepared = run(dataset, SAMPLES / path, eval_pairs=64)
    assert [entry["read"] for entry in prepared.report["sources"]] == read
    assert [entry["kept"] for entry in prepared.report["sources"]] == kept
    hashes = [prepared.train.cache.prompt_hash[pairs.index] for pairs in (prepared.train, prepared.evaluation)]
    assert not len(np.intersect1d(*hashes))
    assert sum(map(len, hashes)) in range(sum(kept) - 2, sum(kept) + 1)  # a held-out prompt may have a pair too many


def test_a_mixture_holds_out_by_part_and_trains_on_no_held_out_prompt(tmp_path, run):
    a = jsonl(tmp_path / "a.jsonl", rows(80))
    b = jsonl(tmp_path / "b.jsonl", [{**row, "chosen": "other " + row["chosen"]} for row in rows(60, start=40)])
    prepared = run(f"{a}:3,{b}:1", eval_pairs=20, batch_size=8, drop_remainder=True)
    assert {name: int(held.sum()) for name, held in prepared.split.groups.items()} == {a: 15, b: 5}
    assert prepared.evaluation.source[:4].tolist() == [0, 0, 1, 0]  # the first ones are from every part
    assert not prompts(prepared.train) & prompts(prepared.evaluation)
    sizes = [int((prepared.train.source == part).sum()) for part in (0, 1)]
    first, second = prepared.report["mixture"]
    assert (first["weight"], first["pairs"], second["pairs"]) == (0.75, *sizes)
    assert first["epoch"] + second["epoch"] == int(min(sizes[0] / 0.75, sizes[1] / 0.25)) // 8 * 8
    assert abs(first["epoch"] - 3 * second["epoch"]) <= 2
    with pytest.raises(UserError, match=r"none\.jsonl: no training pair is left"):
        run(f"{a}:1,{jsonl(tmp_path / 'none.jsonl', [rows(1)[0] | {'rejected': 'yes 0'}])}:1")


def test_a_mixtures_published_splits_are_sampled_by_weight(tmp_path, run):
    for name in "ab":
        jsonl(tmp_path / name / "train.jsonl", rows(20))
        jsonl(tmp_path / name / "test.jsonl", rows(12, start=100))
    prepared = run(f"{tmp_path}/a:1,{tmp_path}/b:2", eval_pairs=6)
    assert [int(held.sum()) for held in prepared.split.groups.values()] == [2, 4]
    assert len(run(f"{tmp_path}/a:1,{tmp_path}/b:2", eval_pairs=-1).evaluation) == 24


def test_no_published_test_prompt_of_one_part_is_trained_on_in_another(tmp_path, run):
    jsonl(tmp_path / "a" / "train.jsonl", rows(20))
    jsonl(tmp_path / "a" / "test.jsonl", rows(12, start=100))
    b = jsonl(tmp_path / "b.jsonl", [{**row, "chosen": "other " + row["chosen"]} for row in rows(40, start=90)])
    for order in (f"{tmp_path}/a:1,{b}:1", f"{b}:1,{tmp_path}/a:1"):
        prepared = run(order, eval_pairs=20)
        assert not prompts(prepared.train) & prompts(prepared.evaluation)
        assert "0 have a prompt of training" in prepared.report["held_out"]


def test_wrong_columns_leave_their_rows_in_the_quarantine(tmp_path, run):
    path = jsonl(tmp_path / "data.jsonl", [{"prompt": "x", "chosen": "y"}] * 600)
    with pytest.raises(UserError, match="accepted are"):
        run(path, quarantine=tmp_path / "run" / "quarantine.jsonl")
    assert len((tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()) == 600
    good = jsonl(tmp_path / "good.jsonl", [{"prompt": "x", "chosen": "y"}] * 600 + rows(3000))
    assert len(run(good, eval_pairs=0, max_bad_fraction=1.0).train) == 3000


def test_a_change_in_what_ones_own_module_imports_is_another_cache(tmp_path, run, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rows_of_mine.py").write_text(
        "import words_of_mine\nfrom dpo_jax.data.forms.reader import parse_own\n"
        "class Parse:\n    def __call__(self, row):\n"
        "        return parse_own({**row, 'chosen': row['chosen'] + words_of_mine.WORD})\nparse = Parse()\n"
    )
    path = jsonl(tmp_path / "data" / "rows.jsonl", rows(4))
    for word in (" one", " two"):
        (tmp_path / "words_of_mine.py").write_text(f"WORD = {word!r}\n")
        for module in ("rows_of_mine", "words_of_mine"):
            sys.modules.pop(module, None)
        importlib.invalidate_caches()
        sys.dont_write_bytecode = True
        prepared = run("rows_of_mine:parse", path, eval_pairs=0)
        assert all(chosen.removesuffix("<|im_end|>\n").endswith(word) for _, chosen, _ in texts(prepared.train))
    for text, what in (("raise RuntimeError('x\\ny')", "RuntimeError: x y"), ("def (", "SyntaxError")):
        (tmp_path / "broken_of_mine.py").write_text(text + "\n")
        sys.modules.pop("broken_of_mine", None)
        importlib.invalidate_caches()
        with pytest.raises(UserError, match=f"importing module broken_of_mine failed .{what}"):
            run("broken_of_mine:parse", path)


def test_rated_answers_are_paired_over_the_whole_source(tmp_path, run):
    """The i-th good answer of a prompt with its i-th bad one, also across files; what is left over is counted."""
    rate = lambda prompt, answer, good: {"prompt": prompt, "completion": answer, "label": good, "id": 1}
    first = [rate("a", "a1", True), rate("b", "b1", False), rate("a", "a2", True), rate("c", "c1", True)]
    rest = [rate("b", "b2", True), rate("a", "a3", False), rate("a", "a4", True), rate("b", "b3", True)]
    jsonl(tmp_path / "in/1.jsonl", first)
    jsonl(tmp_path / "in/2.jsonl", [*rest, rate("d", "d1", False), rate("d", "d1", True)])
    prepared = run(str(tmp_path / "in"), eval_pairs=0)
    (source,) = prepared.report["sources"]
    assert (source["read"], source["kept"], source["dropped"]) == (10, 2, {"unpaired": 4, "identical_answers": 1})
    (form,) = source["forms"]
    assert (form["form"], form["rows"]) == ("rated answers", 10)
    assert form["reads"] == {"prompt": "prompt", "completion": "an answer", "label": "whether it is good"}
    assert source["unused"] == {"id": 10}


def test_a_row_may_give_several_pairs(tmp_path, run):
    ranked = [{"answer": f"answer {n}", "rank": n} for n in (3, 1, 2)]
    tied = [{"answer": text, "rank": 1} for text in "ab"]
    broken = [{"answer": "a", "rank": 1}, {"answer": 3, "rank": 2}, {"answer": 4, "rank": 3}]
    rows = [{"prompt": "x", "answers": answers} for answers in (ranked, tied, broken)]
    (source,) = run(jsonl(tmp_path / "x.jsonl", rows), eval_pairs=0, max_bad_fraction=0.5).report["sources"]
    assert (source["read"], source["kept"]) == (3, 2)
    assert source["dropped"] == {"tie": 1, "not_text": 1}  # a row that is bad is bad once


def test_the_report_says_what_was_read_sent_and_not_used(tmp_path, run):
    answer = lambda text: [{"role": "assistant", "content": text, "reasoning_content": "Hm."}]
    row = {"task": "Hi", "chosen": answer("yes"), "rejected": answer("no"), "source": "x", "persona": "a pirate"}
    several = {**row, "chosen": [*answer("yes"), {"role": "user", "content": "Sure?"}, *answer("yes")]}
    path = jsonl(tmp_path / "x.jsonl", [row, several])
    report = run(path, eval_pairs=0, columns="prompt:task,persona:").report
    (source,) = report["sources"]
    assert source["forms"] == [
        {
            "form": "prompt, chosen and rejected",
            "rows": 2,
            "reads": {"task": "prompt", "chosen": "chosen", "rejected": "rejected"},
        }
    ]
    assert source["to_template"] == {"reasoning_content": 2}
    assert source["unused"] == {"source": 2, "persona": 2}
    assert source["answers_of_several_turns"] == 1
    assert form_lines(report) == [
        f"form: prompt, chosen and rejected, 2 rows of {path} (train): task → prompt; chosen → chosen; "
        "rejected → rejected"
    ]
    assert field_lines(report) == [
        "to the chat template: reasoning_content (2 pairs)",
        "answers of several turns: 1 pairs, with loss on all that follows the prompt",
        "columns that nothing reads: source, persona (2 rows)",
    ]
    other = run(path, eval_pairs=0, columns="prompt:task,persona:,source:").report
    assert other["fingerprint"] != report["fingerprint"]
    with pytest.raises(UserError, match="columns: no row has a column tsk; found chosen, persona"):
        run(path, eval_pairs=0, columns="prompt:tsk")
    with pytest.raises(UserError, match=r"x.jsonl:1: persona has the text 'a pirate'.*--config.columns=persona:"):
        run(path, eval_pairs=0, columns="prompt:task")


def test_own_functions_read_rows_as_they_are(tmp_path, run, monkeypatch):
    (tmp_path / "reads_all.py").write_text("from dpo_jax.data.forms.reader import pairs_in as parse\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = jsonl(tmp_path / "x.jsonl", [{"prompt": "x", "chosen": ["a", "b"], "rejected": ["c", "d"]}])
    report = run("reads_all:parse", path, eval_pairs=0).report
    (source,) = report["sources"]
    assert (source["kept"], source["forms"]) == (2, [{"form": "a function of one's own", "rows": 1, "reads": {}}])
    assert field_lines(report) == []
    with pytest.raises(UserError, match="reads its rows itself"):
        run("reads_all:parse", path, columns="prompt:x")


def test_a_template_that_refuses_a_row_costs_that_row_and_one_that_refuses_all_says_why(tmp_path, run):
    refuses = "{% if 'question 6' in messages[0].content %}{{ 1 + messages[0].content }}{% endif %}"
    some = bpe_tokenizer(refuses + TOKENIZER.chat_template)
    path = jsonl(tmp_path / "data.jsonl", rows(12))
    source = run(path, eval_pairs=0, tokenizer=some).report["sources"][0]
    assert (source["kept"], source["dropped"]) == (11, {"template_error": 1})
    assert source["examples"]["template_error"].startswith(f"{path}:7: TypeError: unsupported operand")
    with pytest.raises(UserError) as refused:
        run(path, tokenizer=bpe_tokenizer("{{ raise_exception('only\n for tools') }}"))
    message = f"refuses all 12 rows that it was given, first {path}:1: only for tools; give rows that it takes, another"
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "max_bad_fraction" not in str(refused.value)


def test_what_became_of_rows_is_said_once_with_counts(tmp_path, run):
    start = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    templated = [{"prompt": start, "chosen": f"yes {i}<|im_end|>", "rejected": "no"} for i in range(3)]
    moved = [{"prompt": "hello", "chosen": f"\n\nyes {i}", "rejected": f"\n\nno {i}"} for i in range(2)]
    report = run(jsonl(tmp_path / "data.jsonl", [*rows(5), *templated, *moved]), eval_pairs=0).report
    assert report["sources"][0]["notes"] == {"templated": 3}
    assert (report["sources"][0]["boundary_moved"], report["sources"][0]["left_out"]) == (2, "\n")
    assert report["template_date"] == ""
    first, second = report["notes"]
    assert first.startswith("3 prompts hold the tokenizer's own special tokens and are taken as text")
    assert second.startswith("2 prompts are no beginning of prompt and answer in tokens")
    assert second.endswith(r"left out, such as '\n'")


def test_a_template_with_a_date_has_a_cache_for_each_day(tmp_path, run):
    dated = bpe_tokenizer("{{ strftime_now('%d %b %Y') }}" + TOKENIZER.chat_template)
    path = jsonl(tmp_path / "data.jsonl", rows(4))
    first, second = (run(path, tokenizer=dated, eval_pairs=0, template_date=f"2026-07-{day}") for day in (26, 27))
    assert first.report["fingerprint"] != second.report["fingerprint"]
    assert prompts(second.train).pop().startswith("27 Jul 2026<|im_start|>")
    assert "these token ids are of 2026-07-27" in second.report["notes"][0]
    assert not run(path, tokenizer=dated, eval_pairs=0, template_date="2026-07-26").built


EVIL = "\ud800\x1b[31m\nerror: forged\u202e id"
SHOWN = r"\ud800\x1b[31m\nerror: forged\u202e id"


def test_names_of_columns_drive_no_terminal(tmp_path, run, capsys):
    """Neither in the report, which console and pages show, nor in errors; nor does a file's name that is no UTF-8."""
    name = os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9\x1b[31m.jsonl")
    path = jsonl(Path(name), [{**row, EVIL: "x"} for row in rows(20)])
    prepared = run(path, eval_pairs=4)
    text = json.dumps(prepared.report, ensure_ascii=False)
    assert text.encode()
    assert prepared.report["sources"][0]["unused"] == {SHOWN: 20}
    assert prepared.report["sources"][0]["files"][0].endswith(r"/caf\udce9\x1b[31m.jsonl")
    print_rows(prepared.report, Console(file=sys.stdout, width=200))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]|\nerror", capsys.readouterr().out)
    path = jsonl(Path(name), [{f"{EVIL}{i}": "x", "why": "y"} for i in range(20)])
    for columns in ("", "nothing:"):
        with pytest.raises(UserError) as caught:
            run(path, columns=columns)
        assert str(caught.value).isprintable()
        assert str(caught.value).encode()


def test_long_texts_are_tokenised_a_few_at_a_time(tmp_path, run, monkeypatch):
    monkeypatch.setattr(tokenise, "LONGEST_ROW", 10_000)
    sizes, render = [], tokenise.render_batch
    monkeypatch.setattr(tokenise, "render_batch", lambda *args: (sizes.append(len(args[1])), render(*args))[1])
    content = rows(30) + [{**row, "prompt": row["prompt"] + "x" * 6000} for row in rows(6, start=30)]
    prepared = run(jsonl(tmp_path / "data.jsonl", content), eval_pairs=0)
    assert len(prepared.train) == 36
    assert sizes == [32, 2, 2]

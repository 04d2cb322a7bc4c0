"""`python -m dpo_jax.collect` in this process: its pairs are those of answers and scores, and the file is resumed."""

import json

import numpy as np
import pytest

from dpo_jax import collect as door
from dpo_jax import sample
from dpo_jax.collecting import run
from dpo_jax.data.prompts import prompt_of
from dpo_jax.preference.models import Function, Pointwise
from dpo_jax.preference.ranking import AnswerGroup, scores_in_groups
from dpo_jax.sampling.params import Answer, SamplingParams
from dpo_jax.sampling.selection import Selection
from dpo_jax.training.on_policy import AskedPrompt, PairAnswers, collect_pairs, pair_record
from tests.collecting import judges
from tests.disks import grow, small_disk
from tests.places import GOLDEN

MODEL = str(GOLDEN / "trl/tiny")
JUDGE = "tests.collecting.judges:e_count"
WORDS = ["good", "more of it", "tell me of the sea", "what is it that you like about a day"]
ROWS = [{"prompt": f"{WORDS[i % 4]} {i}"} | ({"id": f"row {i}"} if i % 3 else {}) for i in range(40)]
DRAWN = ["--n=4", "--max_tokens=12", "--seed=3", "--rows=1"]  # blocks of few prompts
COMMON = [f"--policy={MODEL}", f"--judge={JUDGE}", *DRAWN]


def command(*args):
    return door.main(["collect", *COMMON, *args])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def whole(rows):
    out = rows.with_name("whole.jsonl")
    assert command(f"--prompts={rows}", f"--out={out}", "--keep_unfinished", "--mode=all") == 0
    return out


@pytest.fixture(scope="module")
def answered(rows):
    """The same answers by `python -m dpo_jax.sample`, with their scores."""
    out = rows.with_name("answers.jsonl")
    assert sample.main(["sample", f"--model={MODEL}", *DRAWN, f"--prompts={rows}", f"--out={out}"]) == 0
    found = lines(out)
    for line in found:
        said = [[{"role": "assistant", "content": one["text"]}] for one in line["answers"]]
        group = AnswerGroup(prompt_of(line["prompt"]).comparison, said)
        (line["scores"],) = scores_in_groups(Function("e", judges.e_count), [group])
    return found


def test_pairs_are_those_of_the_answers_and_their_scores(whole, answered):
    wanted = []
    for line in answered:
        texts, scores, seen = [one["text"].strip() for one in line["answers"]], line["scores"], set()
        kept = [i for i, t in enumerate(texts) if t and not np.isnan(scores[i]) and not (t in seen or seen.add(t))]
        order = sorted(kept, key=lambda i: -scores[i])
        wanted += [(line["id"], i, j) for k, i in enumerate(order) for j in order[k + 1 :] if scores[i] > scores[j]]
    found = lines(whole)
    assert [(line["id"], line["sample_a"], line["sample_b"]) for line in found] == wanted
    assert len(found) > 10
    by_id = {line["id"]: line for line in answered}
    for line in found:
        its = by_id[line["id"]]
        assert line["prompt_conversation"] == [{"role": "user", "content": its["prompt"]}]
        assert (line["label"], line["model"], line["judge"], line["seed"]) == ("A", MODEL, JUDGE, 3)
        for side in "ab":
            answer = its["answers"][line[f"sample_{side}"]]
            assert line[f"completion_{side}"] == [{"role": "assistant", "content": answer["text"]}]
            assert line[f"tokens_{side}"] == len(answer["token_ids"])
            assert line[f"finish_reason_{side}"] == answer["finish_reason"]
            assert line[f"score_{side}"] == its["scores"][line[f"sample_{side}"]]


def test_the_file_is_a_dataset(whole, tmp_path):
    from dpo_jax.data.prepare import DataRequest, prepare
    from dpo_jax.weights.find import find_policy

    policy = find_policy(MODEL, tmp_path, 0)
    found = prepare(DataRequest(str(whole), eval_pairs=0, cache_dir=str(tmp_path)), policy.tokenizer)
    assert len(found.train) == len(lines(whole))


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_stopped_anywhere_it_ends_byte_for_byte_the_same(whole, rows, tmp_path, blocks, monkeypatch, capsys):
    out = tmp_path / "pairs.jsonl"
    args = [f"--prompts={rows}", f"--out={out}", "--keep_unfinished", "--mode=all"]
    write, written = run.PairFile.write, []

    def stopping(self, lines, *more):
        if len(written) == blocks:  # in the middle of the lines of a block
            self._file.write(json.dumps(lines[0]).encode()[:20])
            self._file.flush()
            raise KeyboardInterrupt
        written.append(1)
        write(self, lines, *more)

    with monkeypatch.context() as patched:
        patched.setattr(run.PairFile, "write", stopping)
        assert command(*args) == 130
    assert "the same command resumes it" in capsys.readouterr().err
    assert command(*args) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert ("prompts are done" in capsys.readouterr().err) == (blocks > 0)
    about = json.loads(out.with_name("pairs.jsonl.about.json").read_text())
    assert about["counts"] == json.loads(whole.with_name("whole.jsonl.about.json").read_text())["counts"]


def test_a_finished_file_is_left_alone_and_shown(whole, rows, tmp_path, capsys):
    before = whole.read_bytes()
    page = tmp_path / "page.html"
    args = [f"--prompts={rows}", f"--out={whole}", "--keep_unfinished", "--mode=all", f"--html={page}", "--shown=3"]
    assert command(*args) == 0
    said = capsys.readouterr()
    assert "finished" in said.err
    assert whole.read_bytes() == before
    assert f"{len(lines(whole)):,}" in said.out
    assert page.read_text().count('<article class="sample"') == 3


def test_a_file_of_something_else_or_changed_is_refused(whole, rows, tmp_path, capsys):
    args = [f"--prompts={rows}", "--keep_unfinished"]
    assert command(*args, f"--out={whole}") == 2
    assert "begun with other settings (mode: 'all' there, 'best_worst' now)" in capsys.readouterr().err
    assert command(*args, "--mode=all", f"--out={whole}", "--judge=tests.collecting.judges:equal") == 2
    assert "begun with another judge" in capsys.readouterr().err
    out = tmp_path / "changed.jsonl"
    out.write_bytes(whole.read_bytes().replace(b"A", b"B", 1))
    about = whole.with_name("whole.jsonl.about.json").read_bytes()
    out.with_name("changed.jsonl.about.json").write_bytes(about)
    assert command(*args, "--mode=all", f"--out={out}") == 2
    assert "was changed since it was stopped" in capsys.readouterr().err


def test_prompts_that_are_held_out_or_there_again_are_left_out(rows, tmp_path, capsys):
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:36]))
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in ROWS + ROWS))
    out = tmp_path / "pairs.jsonl"
    args = [f"--prompts={more}", f"--out={out}", f"--held_out={held}", "--keep_unfinished"]
    assert command(*args) == 0
    said = capsys.readouterr().err
    assert "72 prompts that are held out" in said
    assert "4 prompts that were there before" in said
    assert {line["prompt_conversation"][0]["content"] for line in lines(out)} <= {row["prompt"] for row in ROWS[36:]}
    assert command(*args[1:], f"--prompts={held}", "--overwrite") == 2
    assert "all 36 prompts are held out" in capsys.readouterr().err


@pytest.mark.slow
def test_prompts_that_the_model_cannot_answer_are_counted(tmp_path, capsys):
    """Also where a whole block is left out, and a judge that scores has nothing to score."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("word " * 5000, "good", "more of it")))
    out = tmp_path / "pairs.jsonl"
    args = [
        "--judge=tests.collecting.judges:e_count",
        f"--out={out}",
        "--keep_unfinished",
        "--n=40",
    ]  # a prompt a block
    assert command(f"--prompts={rows}", *args) == 0
    assert json.loads(out.with_name("pairs.jsonl.about.json").read_text())["counts"]["too_long"] == 1
    assert "1" in next(line for line in capsys.readouterr().out.splitlines() if "too long" in line)
    asked = SamplingParams(n=2)
    nothing = collect_pairs(None, {}, Pointwise("p", lambda answered: np.zeros(len(answered))), [], asked, Selection())
    assert (nothing.pairs, nothing.tokens) == ([], 0)


def test_other_held_out_prompts_are_another_file(rows, tmp_path, capsys):
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps(ROWS[0]) + "\n")
    args = [
        f"--prompts={rows}",
        f"--out={tmp_path / 'a.jsonl'}",
        "--keep_unfinished",
        f"--held_out={held}",
        "--limit=8",
    ]
    assert command(*args) == 0
    held.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    assert command(*args) == 2
    assert "was begun with other prompts" in capsys.readouterr().err


def test_a_templated_prompt_is_written_letter_for_letter():
    prompt = prompt_of("<s>user Hi</s>")
    asked = AskedPrompt(1, [1], 1, prompt.comparison, as_texts=True)
    answers = tuple(Answer(text, [3], "stop", 2, 0.0, [0.0], [0.0]) for text in (" yes", "no"))
    line = pair_record(PairAnswers(asked, answers, (1.0, 0.0), (0, 1)), {})
    assert (line["prompt_conversation"], line["completion_a"]) == ("<s>user Hi</s>", " yes")


@pytest.mark.slow
def test_a_full_disk_has_its_own_code_and_only_room_is_needed(whole, rows, tmp_path, capsys):
    with small_disk(tmp_path / "disk", "12k"):
        out = tmp_path / "disk" / "pairs.jsonl"
        args = [f"--prompts={rows}", f"--out={out}", "--keep_unfinished", "--mode=all"]
        assert command(*args) == 74
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(said) == 1
        assert str(out) in said[0]
        assert "No space left" in said[0]
        grow(tmp_path / "disk", "4m")
        assert command(*args) == 0
        assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--judge=tests.collecting.judges:silent"], "no verdict on any of"),
        (["--judge=tests.collecting.judges:equal", "--keep_unfinished"], "no pair could be made ("),
        (["--n=1"], "--n=1: a pair needs two answers"),
        (["--temperature=0"], "--temperature=0 draws the same answer"),
        (["--mode=worst"], "--mode=worst does not exist; choose from best_worst"),
        (["--min_margin=-1"], "min_margin=-1.0; needs a number from 0 on"),
        (["--held_out=/nowhere.jsonl"], "--held_out=/nowhere.jsonl"),
        (["--split=test"], "--split=test has no meaning with prompts of a file"),
        (["--prompts=hhh", "--split=test"], "--split=test is held out"),
        (["--prompts=hf:owner/name:test_prefs"], "--split=test_prefs is held out"),
        (["--judge=/nowhere"], "judge='/nowhere': no such directory"),
        (["--policy=/nowhere"], "model='/nowhere': no such directory"),
        (["--out="], "--out is missing; usage"),
        (["--unknown=1"], "Unknown command line flag 'unknown'"),
    ],
)
def test_bad_input_is_one_line(rows, tmp_path, args, words, capsys):
    assert command(f"--prompts={rows}", f"--out={tmp_path / 'a.jsonl'}", *args) == 2
    said = capsys.readouterr().err.splitlines()
    assert words in said[-1]
    assert said[-1].startswith("error: ")
    assert "Traceback" not in "".join(said)

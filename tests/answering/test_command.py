"""`python -m dpo_jax.sample` in this process: what it writes, in which order, and what it goes on with."""

import io
import json
import sys

import pytest

import dpo_jax
from dpo_jax import sample as door
from tests.places import GOLDEN

MODEL = str(GOLDEN / "trl/tiny")
ROWS = [
    {"id": "first", "prompt": "what is good"},
    {"prompt": [{"role": "user", "content": "tell me more of it please"}]},
    {"prompt": "good", "chosen": "yes", "rejected": "no"},
    {"prompt": "good"},
]
COMMON = [f"--model={MODEL}", "--n=2", "--max_tokens=6", "--seed=3"]


def command(*args):
    return door.main(["sample", *COMMON, *args])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def whole(rows):
    """A file that was never stopped."""
    out = rows.with_name("whole.jsonl")
    assert command(f"--prompts={rows}", f"--out={out}", "--logprobs") == 0
    return out


def test_a_line_a_prompt_in_the_files_order(whole):
    found = lines(whole)
    assert [line["id"] for line in found] == ["first", 2, 3, 4]
    assert [line["prompt"] for line in found] == [row["prompt"] for row in ROWS]
    for line in found:
        assert list(line) == ["id", "prompt", "answers", "model", "seed"]
        assert (line["model"], line["seed"], len(line["answers"])) == (MODEL, 3, 2)
        for answer in line["answers"]:
            size = len(answer["token_ids"])
            assert 1 <= size <= 6
            assert answer["finish_reason"] == ("length" if answer["stop_reason"] is None else "stop")
            assert len(answer["logprobs"]) == len(answer["full_logprobs"]) == size
            assert answer["logprob"] == pytest.approx(sum(answer["logprobs"]), abs=1e-4)
            assert answer["logprobs"] == pytest.approx(answer["full_logprobs"], abs=1e-4)  # nothing is filtered
    drawn = [tuple(answer["token_ids"]) for line in found for answer in line["answers"]]
    assert len(set(drawn)) == len(drawn)  # also of the prompt that is there twice


def test_a_finished_file_is_left_alone(whole, rows, capsys):
    before = whole.read_bytes()
    assert command(f"--prompts={rows}", f"--out={whole}", "--logprobs") == 0
    assert "finished, 4 prompts are answered" in capsys.readouterr().err
    assert whole.read_bytes() == before


@pytest.mark.parametrize("cut", [0, 1, 400, -1, -30])
def test_a_file_that_was_cut_anywhere_ends_byte_for_byte_the_same(whole, rows, cut, capsys):
    content = whole.read_bytes()
    out = whole.with_name(f"cut{cut}.jsonl")
    out.write_bytes(content[:cut])
    about = json.loads(whole.with_name("whole.jsonl.about.json").read_text())
    out.with_name(out.name + ".about.json").write_text(json.dumps(about))
    assert command(f"--prompts={rows}", f"--out={out}", "--logprobs") == 0
    assert out.read_bytes() == content
    said = capsys.readouterr().err
    assert ("the last line was torn" in said) == (cut != 0)


def test_blocks_change_nothing_but_rounding(whole, rows):
    out = whole.with_name("blocks.jsonl")
    assert command(f"--prompts={rows}", f"--out={out}", "--limit=3", "--rows=1") == 0
    texts = lambda found: [[answer["token_ids"] for answer in line["answers"]] for line in found]
    assert texts(lines(out)) == texts(lines(whole))[:3]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--temperature=0.5", "--top_k=3"], "begun with other settings (temperature: 1.0 there, 0.5 now; top_k: 0"),
        ([], "logprobs: True there, False now"),
        (["--logprobs", "--limit=2"], "begun with other prompts (4 there, 2 now)"),
    ],
)
def test_a_file_of_something_else_is_refused(whole, rows, args, words, capsys):
    before = whole.read_bytes()
    assert command(f"--prompts={rows}", f"--out={whole}", *args) == 2
    assert words in capsys.readouterr().err
    assert whole.read_bytes() == before


def test_another_model_of_the_same_name_is_refused(whole, rows, tmp_path, capsys):
    for file in (GOLDEN / "trl/tiny").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    args = [f"--prompts={rows}", f"--out={whole}", "--logprobs"]
    assert door.main(["sample", *COMMON[1:], f"--model={tmp_path}", *args]) == 2
    assert "begun with another model" in capsys.readouterr().err
    # The same files elsewhere are the same model.
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    assert door.main(["sample", *COMMON[1:], f"--model={tmp_path}", *args]) == 0


def test_files_that_are_not_ours_are_refused(whole, rows, tmp_path, capsys):
    out = tmp_path / "mine.jsonl"
    out.write_text("{}\n")
    assert command(f"--prompts={rows}", f"--out={out}") == 2
    assert "no mine.jsonl.about.json says what it is of" in capsys.readouterr().err
    assert out.read_text() == "{}\n"
    (tmp_path / "mine.jsonl.about.json").write_text(whole.with_name("whole.jsonl.about.json").read_text())
    assert command(f"--prompts={rows}", f"--out={out}", "--logprobs") == 2
    assert "line 1 is no answer to the prompt of its place" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("word " * 600, ":2: the prompt has 1,807 tokens"),
        ("", ":2: the prompt is empty or blank"),
    ],
)
def test_a_refused_prompt_leaves_nothing_behind(tmp_path, content, words, capsys):
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps({"prompt": "good"}) + "\n" + json.dumps({"prompt": content}))
    assert command(f"--prompts={path}", f"--out={out}") == 2
    said = capsys.readouterr().err.strip()
    assert words in said
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prompts.jsonl"]


def test_standard_input_and_output(whole, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "what is good", "id": "first"}')))
    assert command() == 0
    out, err = capsys.readouterr()
    (line,) = map(json.loads, out.splitlines())
    texts = lambda line: [answer["text"] for answer in line["answers"]]
    assert texts(line) == texts(lines(whole)[0])
    assert "1 prompts, 2 answers" in err
    assert "logprobs" not in line["answers"][0]


def test_overwrite_begins_anew_and_a_round_is_told(rows):
    out = rows.with_name("again.jsonl")
    out.write_text("something\n")
    assert command(f"--prompts={rows}", f"--out={out}", "--overwrite", "--limit=1", "--round=2") == 0
    (line,) = lines(out)
    assert line["round"] == 2
    assert command(f"--prompts={rows}", f"--out={out}", "--overwrite", "--limit=1") == 0
    assert lines(out)[0]["answers"] != line["answers"]


def test_the_function_gives_what_the_command_writes(whole):
    prompts = [row["prompt"] for row in ROWS]
    ids = [row.get("id") for row in ROWS]
    answers = dpo_jax.sample(MODEL, prompts, ids=ids, n=2, max_tokens=6, seed=3)
    written = [[answer["token_ids"] for answer in line["answers"]] for line in lines(whole)]
    assert [[answer.token_ids for answer in one] for one in answers] == written

"""`python -m dpo_jax.data`: what it shows is what the files hold, and what the model gets."""

import html
import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer

from dpo_jax.bucket.local import cache_root
from dpo_jax.data import lengths
from dpo_jax.inspection import actions
from dpo_jax.inspection import command as data_command
from dpo_jax.inspection import console as inspection_text
from dpo_jax.inspection import gather as inspection
from dpo_jax.inspection.gather import Piece
from tests import processes
from tests.data.test_render import bpe_tokenizer

TINY = "--config=configs/hhh.py:tiny"
EVIL = "<script>alert(1)</script>{{7*7}}&\"'"
ROWS = [
    {"prompt": f"question {i}? {EVIL}", "chosen": "yes " * 5 + "\n\nbye", "rejected": "no " * (3 * i + 1)}
    for i in range(13)
]
HELD_OUT = [{"prompt": f"held out {i}", "chosen": "yes", "rejected": "no " * (i + 1)} for i in range(3)]
LINES = [
    *map(json.dumps, ROWS),
    "{broken",
    json.dumps({"prompt": "q", "chosen": "same", "rejected": "same "}),
    json.dumps({"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 2}),
    json.dumps({"prompt": "q", "chosen": "", "rejected": "b"}),
    json.dumps({"prompt": "q", "chosen": "", "rejected": "b"}),
]  # 18 rows: 13 pairs, 3 bad ones, a tie, one whose answers are the same


def command(*args, expect=0, **environment):
    """Run it where JAX has no devices to wake; returns what it printed."""
    inherited = processes.of_a_user() | {"JAX_PLATFORMS": "none"}
    done = subprocess.run(
        [sys.executable, "-m", "dpo_jax.data", *map(str, args)],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout if expect == 0 else done.stderr


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny model's tokenizer, made by the command itself: (what prepare said, its cache root)."""
    root = tmp_path_factory.mktemp("tiny")
    return command("prepare", TINY, DPO_JAX_CACHE=str(root)), root


@pytest.fixture(scope="module")
def shown(tiny, tmp_path_factory):
    """An inspection of `LINES`, by a model directory without weights: (text, page, directory, tokenizer)."""
    where = tmp_path_factory.mktemp("own")
    (where / "own.jsonl").write_text("".join(line + "\n" for line in LINES))
    (where / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HELD_OUT))
    model = where / "model"
    shutil.copytree(tiny[1] / "tiny-0/tokenizer-0", model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "llama", "vocab_size": len(tokenizer), "max_position_embeddings": 64, **shape}
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5, "hidden_act": "silu"}))
    text = command(
        "inspect", TINY, f"--config.model={model}", f"--config.dataset={where}/own.jsonl",
        f"--config.eval_path={where}/held_out.jsonl",
        "--config.batch_size=4", "--config.max_bad_fraction=0.2", "--config.max_completion_length=96",
        "--config.shuffle=False", "--platform=cpu",
        f"--html={where}/page.html", "--examples=2", "--shards=2", f"--workdir={where}",
        DPO_JAX_CACHE=str(where / "cache"),
    )  # fmt: skip
    return text, (where / "page.html").read_text(), where, tokenizer


def ids(tokenizer, row):
    """Prompt, chosen, rejected, as the plain form means them; written out again here on purpose."""
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = [tokenizer.bos_token_id, *encode(f"\n\nHuman: {row['prompt']}\n\nAssistant:")]
    return prompt, *([*encode(" " + row[key]), tokenizer.eos_token_id] for key in ("chosen", "rejected"))


def test_rows_are_counted_with_their_reasons_and_places(shown):
    text, _, where, _ = shown
    file = f"{where}/own.jsonl"
    (line,) = [line for line in text.splitlines() if line.strip().startswith(file)]
    assert re.search(r"train +18 +13 +2 empty_chosen, 1 invalid_json, 1 identical_answers, 1 tie +–", line)
    assert f"bad: 1 invalid_json in {file} (train), first {file}:14\n" in text
    assert f"bad: 2 empty_chosen in {file} (train), first {file}:17\n" in text
    assert "identical_answers in" not in text
    assert f"bad rows are kept in {where}/quarantine.jsonl\n" in text
    form = f"form: prompt, chosen and rejected, 17 rows of {file} (train): prompt → prompt; chosen → chosen; "
    assert f"{form}rejected → rejected" in text
    assert form in html.unescape(shown[1])
    quarantine = (where / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["location"] for line in quarantine] == [f"{file}:{n}" for n in (14, 17, 18)]
    assert (
        f"evaluation: eval_path={where}/held_out.jsonl: 3 of its 3 pairs (seed 0); 0 have a prompt of training" in text
    )


def test_lengths_are_those_of_the_token_ids(shown):
    text, page, _, tokenizer = shown
    for split, rows in (("train", ROWS), ("eval", HELD_OUT)):
        every = np.array([[len(part) for part in ids(tokenizer, row)] for row in rows])
        for i, part in enumerate(("prompt", "chosen", "rejected")):
            column = every[:, i]
            numbers = (column.mean(), np.percentile(column, 50), np.percentile(column, 90))
            found = re.search(rf"^ +{split} +{len(rows)} +{part} +([\d.]+) +([\d.]+) +([\d.]+) +(\d+) *$", text, re.M)
            assert found.groups() == (*(f"{number:.1f}" for number in numbers), str(column.max()))
    longer = sum(len(chosen) > len(rejected) for _, chosen, rejected in (ids(tokenizer, row) for row in ROWS))
    assert 0 < longer < 13
    bias = f"The chosen answer is longer in {longer / 13:.1%} of the training pairs"
    assert bias in text
    assert bias in page


def test_the_schedule_adds_up(shown):
    text, _, _, tokenizer = shown
    real = sum(len(part) for row in ROWS[:12] for part in ids(tokenizer, row))  # three steps of four, in file order
    shapes = re.findall(r"(\d+) x \[(\d+) \| (\d+) \| (\d+)\] +(\S+) +(\d+) +(\d+) +(\S+)", text)
    assert sum(int(steps) for *_, steps, _ in shapes) == 3
    assert all(int(rows) % 2 == 0 for rows, *_ in shapes)
    assert sum(float(each) * int(rows) * int(steps) for rows, *_, each, _, steps, _ in shapes if each != "–") == 12
    computed = sum(int(rows) * (int(p) + int(c) + int(r)) * int(steps) for rows, p, c, r, _, _, steps, _ in shapes)
    assert f"3 steps an epoch, 60 in the run; {real / computed:.1%} of tokens real; " in text
    (always,) = re.findall(r"the shape that always fits is used (\d+) times", text)
    assert shapes[-1][-2] == always


def test_the_marked_tokens_are_the_completions(shown):
    text, page, _, tokenizer = shown
    marked = re.findall(r"^(chosen|rejected): «(.*?)»$", text, re.M | re.S)
    assert [part for part, _ in marked] == ["chosen", "rejected"] * 2
    spans = Spans(page)
    assert len(spans.ids["chosen"]) == len(spans.ids["rejected"]) == len(spans.ids["prompt"]) == 2
    by_prompt = {tuple(prompt): rest for prompt, *rest in (ids(tokenizer, row) for row in ROWS)}
    for i in range(2):
        chosen, rejected = by_prompt[tuple(spans.ids["prompt"][i])]
        assert (spans.ids["chosen"][i], spans.ids["rejected"][i]) == (chosen, rejected)
        for (_, words), expected in zip(marked[2 * i : 2 * i + 2], (chosen, rejected), strict=True):
            assert words.replace("⏎\n", "\n").replace("·", " ") == tokenizer.decode(expected)
    assert "yes·⏎\n⏎\nbye</s>»" in text


class Spans(HTMLParser):
    """The page as a browser sees it: token ids by part, tags, text, exact numbers, figures."""

    def __init__(self, page):
        super().__init__()
        self.part, self.words = "", []
        self.ids, self.tags, self.values = {"prompt": [], "chosen": [], "rejected": []}, Counter(), set()
        self.addresses = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags[tag] += 1
        self.addresses += [attrs[name] for name in ("src", "href", "action") if name in attrs]
        if tag == "div" and (attrs.get("class") or "").startswith("said tokens"):
            self.part = attrs["class"].split()[-1]
            self.ids[self.part].append([])
        if tag == "span" and "data-ids" in attrs:
            self.ids[self.part][-1] += map(int, attrs["data-ids"].split())
        if tag == "data":
            self.values.add(float(attrs["value"]))

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_self_contained_and_hostile_text_stays_text(shown):
    _, page, where, _ = shown
    spans = Spans(page)
    assert spans.addresses == []
    assert "//" not in re.sub(r"<span.*?</span>|<code>.*?</code>", "", page)
    assert spans.tags["script"] == 1  # its own
    assert EVIL not in page
    assert EVIL in "".join(spans.words)
    assert {18.0, 13.0, 2.0, 3.0} <= spans.values
    assert spans.tags["figure"] == 4
    assert f"{where}/own.jsonl:14" in "".join(spans.words)


def within(capsys, monkeypatch, *args, cache):
    """The command in this process; returns what it printed."""
    monkeypatch.setenv("DPO_JAX_CACHE", str(cache))
    assert data_command.main(["data", *args]) == 0
    return capsys.readouterr().out


def test_prepare_builds_once_and_prints_where(tiny, capsys, monkeypatch):
    said, root = tiny
    (place,) = re.findall(r"^cache (\S+): 8,512 pairs, [\d.]+ MB, built in [\d.]+ s$", said, re.M)
    assert Path(place).parent == root
    assert re.search(r"train +8,000 +8,000", said)
    again = within(capsys, monkeypatch, "prepare", TINY, cache=root)
    assert re.search(rf"^cache {place}: 8,512 pairs, [\d.]+ MB, already there$", again, re.M)
    assert {path.name for path in (root / "tiny-0").iterdir()} == {"synthetic-0", "tokenizer-0"}


@pytest.mark.slow
def test_prepare_onto_a_shared_cache(tiny, tmp_path, capsys, monkeypatch):
    address = f"file://{tmp_path}/shared"
    for machine, said in (("one", "built in"), ("two", "already there")):
        (tmp_path / machine).mkdir()
        shutil.copytree(tiny[1] / "tiny-0", tmp_path / machine / "tiny-0")
        assert re.search(
            rf"^cache {address}/\w+ \(copy in {tmp_path}/{machine}/\w+\): 8,512 pairs, .*{said}",
            within(capsys, monkeypatch, "prepare", TINY, f"--config.cache_dir={address}", cache=tmp_path / machine),
            re.M,
        )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "a command is missing; use inspect or prepare"),
        (["inspct", TINY], "unknown command 'inspct'; use inspect or prepare"),
        (["inspect"], "--config is missing; usage: python -m dpo_jax.data inspect"),
        (["prepare", TINY, "--html=x"], "Unknown command line flag 'html'"),
        (["inspect", TINY, "--shards=0"], "--shards=0"),
        (["inspect", TINY, "--config.loss=dpo"], "loss='dpo': 'dpo' does not exist"),
        (["inspect", TINY, "--config.batchsize=4"], "did you mean batch_size"),
        (["inspect", TINY, "--shards=5"], "does not divide over 5 data shards x 1 microbatches"),
        (["inspect", TINY, "--config.dataset=/nowhere/x.jsonl"], "/nowhere/x.jsonl: no such file"),
        (["prepare", TINY, "--config.cache_dir=nothing://x"], "cache_dir=nothing://x: Protocol not known"),
        (["prepare", TINY, "--workdir=s3://bucket/run"], "addresses of this kind are not supported"),
        (["prepare", TINY, "--workdir=/proc/nowhere"], "/proc/nowhere cannot be written"),
        (["inspect", TINY, "--html=/nowhere/page.html"], "cannot write /nowhere/page.html.*--html"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, words, tiny, capsys, monkeypatch):
    monkeypatch.setenv("DPO_JAX_CACHE", str(tiny[1]))
    assert data_command.main(["data", *args]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{words}.*\n", said), said


@pytest.mark.slow
def test_the_module_runs_as_a_command():
    assert command("inspct", expect=2) == "error: unknown command 'inspct'; use inspect or prepare\n"


@pytest.mark.parametrize("args", [["--help"], ["inspect", "--help"], ["prepare", "-h"]])
def test_help(args, capsys):
    try:
        code = data_command.main(["data", *args])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 0
    assert f"python -m dpo_jax.data {args[0] if args[0] != '--help' else 'inspect'}" in capsys.readouterr().out


def test_too_few_pairs_for_a_batch_can_be_looked_at(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DPO_JAX_CACHE", str(tiny[1]))
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    keys = [f"--config.dataset={tmp_path}/few.jsonl", "--config.eval_pairs=0", f"--html={tmp_path}/page.html"]
    assert data_command.main(["data", "inspect", TINY, *keys, "--examples=9"]) == 0
    said = capsys.readouterr().out
    assert "no schedule: batch_size=16 is more than the 3 training pairs" in said
    assert said.count("\nchosen: «") == 3
    assert "no schedule: batch_size=16" in (tmp_path / "page.html").read_text()


@pytest.mark.slow
def test_progress_is_told_line_by_line_without_a_terminal(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path))
    shutil.copytree(tiny[1] / "tiny-0", tmp_path / "tiny-0")
    monkeypatch.setattr(actions, "LINE_SECONDS", 0.0)
    assert data_command.main(["data", "prepare", TINY]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith(": 512 rows, 512 kept")
    assert lines[-1].endswith("8,512 rows, 8,512 kept")
    read, total = re.match(r"read ([\d.]+) of ([\d.]+) MB", lines[-1]).groups()
    assert read == total


def test_a_terminal_shows_colours_and_no_marks():
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=80, _environ={})
    part = lambda *texts: tuple(Piece(text, (n,), text.startswith("<")) for n, text in enumerate(texts))
    parts = {"prompt": part("<s>", "Hi"), "chosen": part(" yes", "\n", "</s>"), "rejected": part(" no", " ")}
    example = inspection.Example(0, "own", parts)
    inspection_text._example(example, console, coloured=True)
    text = console.file.getvalue()
    assert "«" not in text
    styled = [(code, words) for code, words in re.findall(r"\x1b\[([\d;]+)m(.*?)\x1b\[0m", text, re.S)]
    assert [words for code, words in styled if "2" in code.split(";")] == ["<s>", "Hi"]
    assert "".join(words for code, words in styled if "32" in code.split(";")) == " yes⏎</s>"
    assert "".join(words for code, words in styled if "31" in code.split(";")) == " no·"
    assert ("1;32", "</s>") in styled


@pytest.mark.parametrize("text", ["plain words", "  two  blanks\n\n\tand a tab ", "naïve 🦜🦜 漢字", "a\ufffdb"])
def test_pieces_hold_all_ids_and_all_text(text):
    tokenizer = bpe_tokenizer()
    encoded = tokenizer(f"<|im_start|>{text}<|im_end|>", add_special_tokens=False)["input_ids"]
    found = inspection.pieces(tokenizer, encoded)
    assert [i for piece in found for i in piece.ids] == encoded
    assert "".join(piece.text for piece in found) == f"<|im_start|>{text}<|im_end|>"
    assert [piece.text for piece in found if piece.special] == ["<|im_start|>", "<|im_end|>"]


def test_a_space_that_the_decoder_drops_in_front_is_kept(tiny):
    """As SentencePiece tokenizers do: a completion is decoded behind its prompt."""

    class Dropping:
        all_special_ids = ()

        def decode(self, ids, **_):
            return "".join((" a", " b", "c")[i] for i in ids).removeprefix(" ")

        def convert_ids_to_tokens(self, ids):
            return [("_a", "_b", "c")[i] for i in ids]

    assert [p.text for p in inspection.pieces(Dropping(), [1, 2], before=[0])] == [" b", "c"]


@pytest.mark.parametrize(
    ("text", "words"), [("\n", "⏎\n"), (" \t", "·⇥"), (" a", " a"), (".\n", ".⏎\n"), ("\x1b[2J", "␛[2J")]
)
def test_nothing_blank_stays_invisible(text, words):
    assert Piece(text, (0,)).visible == words


@pytest.mark.parametrize("values", [[0], [3, 3, 5], [-7, 0, 200], range(-90, 91), [1000]])
def test_bins_hold_every_value_and_begin_one_at_0(values):
    points, width = lengths.bin_points(lengths.count_bins(np.array(values)))
    assert sum(n for _, n in points) == len(values)
    assert len(points) <= lengths.BINS + 2
    starts = [middle - (width - 1) / 2 for middle, _ in points]
    assert 0 in starts
    for start, (_, n) in zip(starts, points, strict=True):
        assert n == sum(start <= value < start + width for value in values)


def test_where_the_tiny_preset_lies_with_a_shared_cache(monkeypatch):
    monkeypatch.setenv("DPO_JAX_CACHE", "/local")
    assert cache_root("gs://bucket/dir") == Path("/local")

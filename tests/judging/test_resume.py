"""What was judged is kept: stopped anywhere and started again, a file ends the same, and nothing is asked twice."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_jax import judge as door
from dpo_jax.errors import UserError
from dpo_jax.judging import kept
from tests.judging import judges
from tests.judging.judges import line, write

JUDGE = "--judge=tests.judging.judges:counted"
PROMPTS = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("answers")
    a = [line(f"p{i}", ["a" * (i % 5 + 1), "a" * (i % 3 + 1) + "ä\u2028"]) for i in range(PROMPTS)]
    b = [line(f"p{i}", ["b" * (i % 4 + 1), "bb"]) for i in range(PROMPTS)]
    return write(directory / "a.jsonl", a), write(directory / "b.jsonl", b)


@pytest.fixture
def seen(tmp_path, monkeypatch):
    path = tmp_path / "seen"
    monkeypatch.setenv(judges.SEEN, str(path))
    return lambda: path.read_text().splitlines() if path.exists() else []


@pytest.fixture(scope="module")
def commands(files):
    return {"compare": ["compare", *files], "score": ["score", files[0]]}


@pytest.fixture
def whole(commands, seen, tmp_path):
    """Files that were never stopped."""
    done = {}
    for name, command in commands.items():
        out = tmp_path / f"whole_{name}.jsonl"
        assert door.main(["judge", *command, JUDGE, f"--out={out}"]) == 0
        done[name] = out
    os.unlink(os.environ[judges.SEEN])
    return done


def read(path):
    return [json.loads(one) for one in Path(path).read_text().split("\n")[:-1]]


def begun(whole, name, cut):
    """A copy of a whole file, cut."""
    out = whole[name].with_name(f"cut_{name}.jsonl")
    out.write_bytes(whole[name].read_bytes()[:cut])
    about = whole[name].with_name(whole[name].name + ".about.json")
    out.with_name(out.name + ".about.json").write_bytes(about.read_bytes())
    return out


@pytest.mark.parametrize("name", ["compare", "score"])
@pytest.mark.parametrize("cut", [0, 1, 300, -1, -100, None])
def test_a_file_that_was_cut_anywhere_ends_byte_for_byte_the_same(whole, commands, seen, name, cut, capsys):
    out, content = begun(whole, name, cut), whole[name].read_bytes()
    missing = content.count(b"\n") - out.read_bytes().count(b"\n")
    capsys.readouterr()
    assert door.main(["judge", *commands[name], JUDGE, f"--out={out}"]) == 0
    assert out.read_bytes() == content
    assert len(seen()) == len(set(seen())) == 2 * missing  # each in both orders
    said = capsys.readouterr().err
    assert ("the last line was torn" in said) == (cut not in (0, None))
    assert ("finished; --overwrite begins it anew" in said) == (missing == 0)


@pytest.mark.parametrize("name", ["compare", "score"])
def test_killed_and_started_again(whole, commands, seen, tmp_path, name):
    out = tmp_path / "killed.jsonl"
    command = [sys.executable, "-m", "dpo_jax.judge", *commands[name], JUDGE, f"--out={out}"]
    ended = subprocess.run(
        command, env=os.environ | {judges.ENDS: "15"}, capture_output=True, text=True, cwd=os.getcwd()
    )
    assert ended.returncode == 9, ended.stderr
    assert out.read_text().count("\n") == 7  # seven in both orders, and the one in hand
    assert door.main(["judge", *commands[name], JUDGE, f"--out={out}"]) == 0
    assert out.read_bytes() == whole[name].read_bytes()
    asked = seen()
    assert [one for one in asked if asked.count(one) > 1] == [asked[14]] * 2  # what was in hand when it was killed


def test_a_resumed_file_gives_the_same_figures(whole, commands, tmp_path):
    figures = []
    for cut in (None, 500):
        out = begun(whole, "compare", cut)
        place = tmp_path / "figures.json"
        assert door.main(["judge", *commands["compare"], JUDGE, f"--out={out}", f"--json={place}"]) == 0
        figures.append(place.read_text())
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--judge=tests.judging.judges:shorter"], "begun with another judge ('tests.judging.judges:counted' there, "),
        (["--lengths=characters"], "begun with other settings (lengths: 'tokens' there, 'characters' now)"),
        (["--limit=2"], "begun with other answers (24 lines of it there, 4 now)"),
    ],
)
def test_a_file_of_something_else_is_refused(whole, commands, change, words, capsys):
    before = whole["compare"].read_bytes()
    args = [JUDGE, *change] if not change[0].startswith("--judge") else change
    assert door.main(["judge", *commands["compare"], *args, f"--out={whole['compare']}"]) == 2
    assert words in capsys.readouterr().err
    assert whole["compare"].read_bytes() == before


def test_other_answers_of_the_same_number_are_refused(whole, files, tmp_path, capsys):
    lines = read(files[1])
    lines[5]["answers"][1]["text"] += "!"
    other = write(tmp_path / "other.jsonl", lines)
    assert door.main(["judge", "compare", files[0], other, JUDGE, f"--out={whole['compare']}"]) == 2
    assert "begun with other answers" in capsys.readouterr().err
    # The same answers elsewhere are the same.
    same = write(tmp_path / "same.jsonl", read(files[1]))
    assert door.main(["judge", "compare", files[0], same, JUDGE, f"--out={whole['compare']}"]) == 0


def test_a_function_that_has_changed_is_another_judge(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "verdicts.jsonl"
    for content, code in (("return 1", 0), ("return 0", 2)):
        (tmp_path / "changing_judge.py").write_text(f"def verdict(comparison):\n    {content}\n")
        sys.modules.pop("changing_judge", None)
        assert door.main(["judge", "compare", *files, "--judge=changing_judge:verdict", f"--out={out}"]) == code
    assert "the same name, but not the same judge" in capsys.readouterr().err


def test_files_that_are_not_ours_are_refused(whole, commands, tmp_path, capsys):
    out = tmp_path / "mine.jsonl"
    out.write_text("{}\n")
    assert door.main(["judge", *commands["compare"], JUDGE, f"--out={out}"]) == 2
    assert "no mine.jsonl.about.json says what it is of" in capsys.readouterr().err
    assert out.read_text() == "{}\n"
    about = whole["compare"].with_name("whole_compare.jsonl.about.json").read_text()
    (tmp_path / "mine.jsonl.about.json").write_text(about)
    assert door.main(["judge", *commands["compare"], JUDGE, f"--out={out}"]) == 2
    assert "line 1 is not the verdict of its place" in capsys.readouterr().err
    assert door.main(["judge", *commands["score"], JUDGE, f"--out={out}"]) == 2
    assert "begun with judge compare, this is judge score" in capsys.readouterr().err
    out.write_bytes(whole["compare"].read_bytes() * 2)  # more lines than there can be
    assert door.main(["judge", *commands["compare"], JUDGE, f"--out={out}"]) == 2
    assert "line 25 is not the verdict of its place" in capsys.readouterr().err


def test_a_file_in_use_is_refused(whole, commands, capsys):
    with whole["compare"].open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert door.main(["judge", *commands["compare"], JUDGE, f"--out={whole['compare']}"]) == 2
    assert "is in use by another command" in capsys.readouterr().err


def test_overwrite_begins_anew_once_nothing_is_refused_any_more(commands, seen, tmp_path):
    out = tmp_path / "again.jsonl"
    out.write_text("something\n")
    args = ["judge", *commands["compare"], f"--out={out}", "--overwrite"]
    assert door.main([*args, "--judge=tests.judging.judges:broken"]) == 2
    assert out.read_text() == "something\n"
    assert door.main([*args, JUDGE]) == 0
    assert out.read_text().count("\n") == 2 * PROMPTS


def test_a_refused_judge_leaves_nothing_behind(commands, tmp_path):
    out = tmp_path / "none.jsonl"
    assert door.main(["judge", *commands["score"], "--judge=tests.judging.judges:broken", f"--out={out}"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_has_its_own_code(commands, seen, tmp_path, monkeypatch, capsys):
    def full(path, held, lines):
        raise UserError(f"--out={path}: cannot be written") from OSError(28, "No space left on device")

    monkeypatch.setattr(kept, "append_lines", full)
    assert door.main(["judge", *commands["compare"], JUDGE, f"--out={tmp_path / 'full.jsonl'}"]) == 74
    assert "cannot be written" in capsys.readouterr().err


def test_scores_stand_in_the_lines_as_they_were(whole, files):
    for given, scored in zip(read(files[0]), read(whole["score"]), strict=True):
        assert scored.pop("judge") == "tests.judging.judges:counted"
        first, second = (len(one["text"]) for one in given["answers"])
        expected = [float(first < second) - float(first > second)]
        assert [one.pop("score") for one in scored["answers"]] == [expected[0], -expected[0]]
        assert scored == given


def test_half_a_character_is_kept_as_it_was(tmp_path, seen):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(line("p", ["a\ud800", "ab"])) + "\n")
    out = tmp_path / "scores.jsonl"
    assert door.main(["judge", "score", str(path), JUDGE, f"--out={out}"]) == 0
    assert json.loads(out.read_text())["answers"][0]["text"] == "a\ud800"

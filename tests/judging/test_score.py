"""`python -m dpo_jax.judge score`: a scorer's own scores, and the mean verdicts of a judge that compares."""

import math

import numpy as np
import pytest

from dpo_jax import judge as door
from dpo_jax.errors import UserError
from dpo_jax.judging import api
from dpo_jax.preference.models import Function, Pointwise
from tests.judging import judges
from tests.judging.judges import line, write

LINES = [line("p", ["aaa", "a", "aa"]), line("q", ["a", "a"]), line("r", ["xa", "a", "aaa"])]


def test_a_scorers_own():
    judge = Pointwise(
        "length", lambda answered: np.array([float(len(done[-1]["content"])) for _, done, *_ in answered])
    )
    assert api.score([*LINES, line("one", ["aaaa"])], judge) == [[3, 1, 2], [1, 1], [2, 1, 3], [4]]


def test_the_mean_verdict_against_the_others_of_the_prompt():
    found = api.score(LINES, Function("some", judges.some))
    assert found[:2] == [[-1, 1, 0], [0, 0]]
    # xa has no verdict against any; the other two have one each.
    assert math.isnan(found[2][0])
    assert found[2][1:] == [1, -1]


def test_one_answer_cannot_be_compared(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [LINES[0], line("one", ["a"])])
    with pytest.raises(
        UserError, match=r"a.jsonl:2: one answer, and the judge shorter compares two; sample with --n=2"
    ):
        api.score(path, Function("shorter", judges.shorter))
    out = tmp_path / "scores.jsonl"
    assert door.main(["judge", "score", path, "--judge=tests.judging.judges:shorter", f"--out={out}"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not out.exists()


def test_where_scores_go_must_be_told(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", LINES)
    assert door.main(["judge", "score", path, "--judge=tests.judging.judges:shorter"]) == 2
    assert "--out is missing" in capsys.readouterr().err


def test_the_line_on_the_console(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", LINES)
    args = ["judge", "score", path, "--judge=tests.judging.judges:some", f"--out={tmp_path / 's.jsonl'}"]
    assert door.main(args) == 0
    printed = capsys.readouterr().out
    assert "8 answers to 3 prompts: score mean 0, least -1, largest 1; 1 have none" in printed

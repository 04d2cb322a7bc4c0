"""A run's directory: the day of its beginning, and what it may not be resumed without."""

import copy
import datetime
import json
import os
import subprocess
import sys

import pytest

from dpo_jax.errors import UserError
from dpo_jax.training import workdir


def test_the_day_is_that_of_the_run_that_is_there_else_todays(tmp_path):
    today = datetime.date.today().isoformat()
    assert workdir.first_day(tmp_path) == today
    identity = {"data": {"template_date": "2026-07-26"}}
    workdir.keep_identity(tmp_path, identity, resumed=False)
    assert workdir.first_day(tmp_path) == "2026-07-26"
    workdir.keep_identity(tmp_path, identity, resumed=True)
    (tmp_path / workdir.IDENTITY).write_text(json.dumps({"data": {"template_date": ""}}))  # a template without a date
    assert workdir.first_day(tmp_path) == today
    (tmp_path / workdir.IDENTITY).write_text("{")  # `keep_identity` refuses it
    assert workdir.first_day(tmp_path) == today


FILE = {"path": "pairs.jsonl", "bytes": 12, "digest": "aa"}
BEGUN = {
    "data": {"sources": [{"name": "pairs.jsonl", "files": [FILE]}], "tokenizer": "t", "form": "chat",
             "training pairs": 3, "held-out pairs": 1, "pairs": "pp", "ids": "ii"},
    "model": {"model.safetensors": {"bytes": 5, "digest": "mm"}},
}  # fmt: skip


def _changed(path, value):
    identity = copy.deepcopy(BEGUN)
    place = identity
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return identity


@pytest.mark.parametrize(
    "resumed",
    [
        _changed(["data", "tokenizer"], "told in other words"),
        _changed(["data", "form"], ["chat", "auto"]),
        _changed(["data", "sources", 0, "files", 0, "digest"], "the same rows, written otherwise"),
    ],
)
def test_the_same_token_ids_are_the_same_pairs(resumed, tmp_path):
    workdir.keep_identity(tmp_path, BEGUN, resumed=False)
    workdir.keep_identity(tmp_path, resumed, resumed=True)
    assert json.loads((tmp_path / workdir.IDENTITY).read_text()) == resumed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["data", "ids"], "jj"),
        (["data", "pairs"], "qq"),
        (["data", "held-out pairs"], 2),
        (["model", "model.safetensors", "digest"], "nn"),
    ],
)
def test_other_pairs_or_models_are_refused_by_name(path, value, tmp_path):
    workdir.keep_identity(tmp_path, BEGUN, resumed=False)
    with pytest.raises(UserError, match=f"begun with other files .*{path[-1]}.*{value}"):
        workdir.keep_identity(tmp_path, _changed(path, value), resumed=True)


def test_a_run_begun_without_ids_is_known_by_its_files(tmp_path):
    older = copy.deepcopy(BEGUN)
    del older["data"]["ids"]
    workdir.keep_identity(tmp_path, older, resumed=False)
    with pytest.raises(UserError, match="digest"):
        workdir.keep_identity(tmp_path, _changed(["data", "sources", 0, "files", 0, "digest"], "bb"), resumed=True)
    workdir.keep_identity(tmp_path, _changed(["data", "form"], ["chat", "auto"]), resumed=True)


def test_judges_that_pairs_are_made_with_are_part_of_it(tmp_path):
    """A run of before knew no judges: it goes on with any."""
    judge = lambda digest: {"collect_judge runs/rm": {"model.safetensors": {"bytes": 7, "digest": digest}}}
    workdir.keep_identity(tmp_path, BEGUN, resumed=False)
    workdir.keep_identity(tmp_path, BEGUN | judge("jj"), resumed=True)
    with pytest.raises(UserError, match=r"collect_judge runs/rm: .*digest: .jj. there, .kk. now"):
        workdir.keep_identity(tmp_path, BEGUN | judge("kk"), resumed=True)


# ---- the lock

HOLD = """
import sys, time
from pathlib import Path
from dpo_jax.training.workdir import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_keeps_its_directory_whatever_becomes_of_the_locks_file(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        file = tmp_path / workdir.LOCK
        assert file.read_text().startswith(f"process {other.pid} on ")
        for damage in (lambda: None, file.unlink, lambda: file.write_text("another")):
            damage()
            with pytest.raises(UserError, match="is in use by"), workdir.locked(tmp_path):
                pass
        other.stdin.close()
    with workdir.locked(tmp_path):
        pass


def _link(file, other):
    file.symlink_to(other)


def _second_name(file, other):
    os.link(other, file)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (_link, "is a link, and not a file; remove it"),
        (lambda file, other: file.symlink_to(other.parent / "none"), "is a link, and not a file; remove it"),
        (lambda file, other: file.mkdir(), "is a directory, and not a file; remove it"),
        (_second_name, "is no file of its own"),
        (lambda file, other: os.mkfifo(file), "is no file of its own"),
    ],
)
def test_a_lock_that_is_another_file_is_refused_and_that_file_is_left_alone(make, told, tmp_path):
    other, run = tmp_path / "precious", tmp_path / "run"
    other.write_text("precious")
    run.mkdir()
    make(run / workdir.LOCK, other)
    with pytest.raises(UserError, match=told), workdir.locked(run):
        pass
    assert other.read_text() == "precious"
    assert not (tmp_path / "none").exists()

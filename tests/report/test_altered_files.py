"""Files of a run that were altered by hand: a page, or one line that names the file; never a traceback."""

import copy
import json
import os
import random
import shutil
import threading
import time

import pytest

from dpo_jax.errors import UserError
from dpo_jax.report.command import write_report
from dpo_jax.report.runs import load_run
from tests.report.example_run import make_run

VALUES = (
    None, True, -1, 0, 1.5, 1e308, 10**30, 10**400, float("nan"), float("inf"), "x", "", [], {}, [None], [[]], {"a": 1},
    "\ud800",
)  # fmt: skip
TEXTS = (b"", b"\xff\xfe", b"[" * 100_000, b"{", b"null", b"[]", b"3", b"null\n{}\n")
LINES = ("metrics.jsonl", "samples.jsonl")
FILES = ("config.json", "data.json", "run.json", "scores.json", *LINES)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("altered") / "run"
    numbers = {f"{name}_{side}": 1.5 for name in ("score", "tokens") for side in ("better", "worse")}
    collected = {
        "step": 0,
        "split": "collect",
        "round": "1",
        "pairs": 9,
        "answers": 18,
        "score": 0.5,
        "dropped/ties": 2,
    }
    make_run(directory, steps=2, further=[collected | numbers])
    scores = {"chosen": [0.1, 0.2, None], "rejected": [0.0, 0.3, 1.0]}
    (directory / "scores.json").write_text(json.dumps(scores))
    return directory


def _places(value, path=()):
    """The path to every part of a JSON value; of a list only the first entry."""
    yield path
    for key in value if isinstance(value, dict) else range(min(1, len(value))) if isinstance(value, list) else ():
        yield from _places(value[key], (*path, key))


def _altered(value, path, new):
    """The value with another one at that place, or without any: `new` is ()."""
    if not path:
        return new
    value = copy.deepcopy(value)
    at = value
    for key in path[:-1]:
        at = at[key]
    if new == ():
        del at[path[-1]]
    else:
        at[path[-1]] = new
    return value


def _page_or_line(run, file):
    said = file
    try:
        write_report(run)
    except UserError as error:
        said = str(error)
    assert "\n" not in said
    assert file in said or "holds no run" in said


@pytest.mark.parametrize("name", FILES)
def test_another_value_anywhere(name, run):
    file, draw = run / name, random.Random(name)
    text = file.read_text()
    lines = text.splitlines() if name in LINES else [text]
    cases = [
        (at, path, new)
        for at in {0, len(lines) // 2, len(lines) - 1}
        for path in _places(json.loads(lines[at]))
        for new in (*VALUES, ())
        if path or new != ()
    ]
    try:
        for at, path, new in draw.sample(cases, min(25, len(cases))):
            changed = json.dumps(_altered(json.loads(lines[at]), path, new))
            file.write_text("\n".join([*lines[:at], changed, *lines[at + 1 :]]) + "\n")
            _page_or_line(run, name)
    finally:
        file.write_text(text)


@pytest.mark.parametrize("name", FILES)
def test_another_text_or_a_directory(name, run):
    file = run / name
    content = file.read_bytes()
    try:
        for text in TEXTS:
            file.write_bytes(text)
            _page_or_line(run, name)
        file.unlink()
        _page_or_line(run, name)
        file.mkdir()
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            write_report(run)
        file.rmdir()
    finally:
        file.write_bytes(content)


def test_checkpoints_that_go_while_they_are_counted(run):
    """As a save does that removes the oldest one: what is gone meanwhile has no size, and no error."""
    oldest, kept, over = run / "checkpoints" / "210", run / "kept", threading.Event()
    shutil.copytree(oldest, kept / "210")
    for i in range(40):
        (kept / "210" / f"{i}" / "d").mkdir(parents=True)
        (kept / "210" / f"{i}" / "d" / "array").write_bytes(b"x" * 100)

    def come_and_go():
        while not over.is_set():
            shutil.rmtree(oldest)
            shutil.copytree(kept / "210", oldest)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        seen = [load_run(run).checkpoints for _ in range(50)]
    finally:
        over.set()
        thread.join()
        shutil.rmtree(kept)
    assert all(checkpoints[260] == 1500 for checkpoints in seen)
    assert len({checkpoints.get(210) for checkpoints in seen}) > 1, "none was met on its way"


def test_a_pipe_in_the_place_of_the_page_is_a_line(run, tmp_path):
    """Opening it would wait for somebody who reads; where there is one, the page is written to it."""
    page = tmp_path / "report.html"
    os.mkfifo(page)
    with pytest.raises(UserError, match=f"cannot write {page}: No such device"):
        write_report(run, page)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(page.read_bytes()))
    reader.start()
    while not read and reader.is_alive():
        try:
            write_report(run, page)
            break
        except UserError:  # it is not reading yet
            time.sleep(0.01)
    reader.join()
    assert read[0].startswith(b"<!DOCTYPE html>")

"""A run's directory: the day of its beginning, and what it may not be resumed without."""

import copy
import datetime
import json

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

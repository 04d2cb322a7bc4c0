"""LLaMA-Factory's dataset_info.json: how it is named, what its columns and tags become, what is refused."""

import json

import pytest

from dpo_jax.data.containers import read_rows
from dpo_jax.data.forms.reader import parse_own
from dpo_jax.data.sources import find_sources
from dpo_jax.errors import UserError

ALPACA = {"task": "Name it.", "more": "a boat", "role": "Be brief.", "best": "yes", "worst": "no", "n": 1}
TURNS = {
    "dialogue": [{"who": "skipper", "says": "Name it."}],
    "best": {"who": "mate", "says": "yes"},
    "worst": {"who": "mate", "says": "no"},
}
ENTRIES = {
    "alpaca_pairs": {
        "file_name": "alpaca.json",
        "ranking": True,
        "columns": {"prompt": "task", "query": "more", "chosen": "best", "rejected": "worst", "system": "role"},
    },
    "dialogue_pairs": {
        "file_name": "turns.json",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "dialogue", "chosen": "best", "rejected": "worst"},
        "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "skipper", "assistant_tag": "mate"},
    },
    "plain": {"file_name": "alpaca.json", "columns": {"prompt": "task", "response": "best"}},
    "feelings": {"file_name": "kto.json", "columns": {"prompt": "task", "response": "said", "kto_tag": "liked"}},
    "elsewhere": {"ms_hub_url": "a/b", "ranking": True},
    "sampled": {"file_name": "alpaca.json", "ranking": True, "num_samples": 5},
    "odd": {"file_name": "alpaca.json", "ranking": True, "columns": {"promt": "task"}},
    "form": {"file_name": "alpaca.json", "ranking": True, "formatting": "text"},
}


@pytest.fixture
def directory(tmp_path):
    def write(entries=ENTRIES):
        (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
        kto = {"task": "Name it.", "said": "yes", "liked": True}
        for name, row in (("alpaca", ALPACA), ("turns", TURNS), ("kto", kto)):
            (tmp_path / f"{name}.json").write_text(json.dumps([row]))
        return tmp_path

    return write


def only_pair(found):
    (source,) = found.sources
    (path,) = source.files
    (row,) = (row for _, row in read_rows(path))
    return parse_own(source.spec.columns.apply(row))


def test_columns_and_tags_are_what_the_entry_says(directory):
    where = directory()
    pair = only_pair(find_sources(f"{where}/dataset_info.json:alpaca_pairs"))
    system, user = pair.comparison.prompt_conversation
    assert (system["content"], user["content"]) == ("Be brief.", "Name it.\n\na boat")
    assert (pair.chosen[0]["content"], pair.rejected[0]["content"]) == ("yes", "no")
    pair = only_pair(find_sources(f"{where}/dataset_info.json:dialogue_pairs"))
    assert pair.comparison.prompt_conversation == ({"role": "user", "content": "Name it."},)
    assert pair.chosen == ({"role": "assistant", "content": "yes"},)
    rated = only_pair(find_sources(f"{where}/dataset_info.json:feelings"))
    assert (rated.completion[0]["content"], rated.good) == ("yes", True)


def test_a_directory_with_one_such_dataset_names_it(directory):
    name = "alpaca_pairs"
    where = directory({name: ENTRIES[name], "plain": ENTRIES["plain"]})
    for dataset in (str(where), f"{where}/dataset_info.json"):
        assert only_pair(find_sources(dataset)).chosen[0]["content"] == "yes"
    # Renames of the command line come on top; two sources with different columns have different caches.
    both = find_sources(str(where), columns="n:").sources[0]
    assert both.spec.columns.ignored == {"n"}
    assert both.parser != find_sources(str(where)).sources[0].parser


def test_a_directory_that_datasets_saved_is_read_as_files(directory):
    where = directory({"description": "", "features": {"a": {}}, "splits": {"train": {"name": "train"}}})
    assert len(find_sources(str(where)).sources[0].files) == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (":plain", "ranking is not true"),
        (":absent", "has no absent; it has alpaca_pairs"),
        ("", "has 7 preference datasets"),
        (":elsewhere", "ms_hub_url is not read here"),
        (":sampled", "num_samples=5 is not read here"),
        (":odd", "columns has promt"),
        (":form", "formatting='text' is unknown"),
    ],
)
def test_what_cannot_be_read_is_one_line(directory, name, words):
    with pytest.raises(UserError, match=words) as caught:
        find_sources(f"{directory()}/dataset_info.json{name}")
    assert "\n" not in str(caught.value)


def test_broken_and_missing_descriptions(directory, tmp_path):
    with pytest.raises(UserError, match=r"there is no .*dataset_info.json"):
        find_sources(f"{tmp_path}/dataset_info.json:x")
    where = directory()
    with pytest.raises(UserError, match="and so does dataset_path"):
        find_sources(f"{where}/dataset_info.json:alpaca_pairs", str(where))
    (where / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        find_sources(f"{where}/dataset_info.json:x")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"ranking": True, "columns": []}, "columns=.*should be a valid dictionary"),
        ({"ranking": True, "columns": {"prompt": 3}}, "columns.prompt=3"),
        ({"ranking": True, "columns": {"chosen": ["a"]}}, "columns.chosen=.*"),
        ({"ranking": True, "tags": "from"}, "tags='from'"),
        ({"ranking": True, "tags": {"role_tag": {}}}, "tags.role_tag="),
        ({"ranking": 7}, "ranking=7"),
        ({"ranking": True, "formatting": None, "file_name": {"a": 1}}, "file_name="),
        ({"ranking": True, "formatting": [1]}, "formatting="),
        ({"ranking": True, "file_name": "../outside.json"}, "not in the directory"),
        ({"ranking": True, "file_name": "/etc/passwd"}, "not in the directory"),
        ({"ranking": True, "file_name": "link.json"}, "not in the directory"),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value),
)
def test_an_entry_of_another_shape_is_one_line(tmp_path, entry, words):
    where = tmp_path / "data"
    where.mkdir()
    (tmp_path / "outside.json").write_text(json.dumps([{"prompt": "q", "chosen": "a", "rejected": "b"}]))
    (where / "link.json").symlink_to("../outside.json")
    (where / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "a.json", **entry}}))
    with pytest.raises(UserError, match=words):
        find_sources(f"{where}/dataset_info.json:x")

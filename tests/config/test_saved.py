"""A run's config.json is read whatever it holds: of older runs, of later ones, damaged."""

import json

import pytest

from configs import common
from dpo_jax.config.saved import claim_workdir, differing_keys, saved_config, writing
from dpo_jax.disk import write_json
from dpo_jax.errors import SAVE_FAILED, UserError
from tests.report.example_run import CONFIG


def test_what_is_set_is_said_in_words():
    saved = saved_config(CONFIG)
    assert (saved.model, saved.dataset) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "hhh")
    assert saved.title == ("SmolLM2-135M-Instruct", "hhh")
    assert (saved.loss, saved.steps, saved.sft_steps, saved.lora, saved.is_dpo) == ("sigmoid", 200, 60, False, True)
    assert saved.words["Loss"] == ["sigmoid", "β 0.1"]  # no label smoothing: it is off
    assert saved.words["Learning rate"] == ["5e-07", "linear", "20 warm-up steps"]
    assert saved.words["Batch"] == ["64 pairs", "4 microbatches"]
    assert saved.words["Reference"] == ["the policy when DPO starts"]
    assert saved.words["Trained"] == ["all parameters"]
    recipe = dict(saved.recipe)
    assert recipe["dpo_beta"] == 0.1
    assert not {"label_smoothing", "seed", "cache_dir", "mesh_data"} & recipe.keys()  # off, 0, or of the machine
    assert list(saved.table.items()) == list(CONFIG.items())


@pytest.mark.parametrize("absent", [*CONFIG, None])
def test_a_key_that_is_missing_or_unknown_is_no_error(absent):
    table = {key: value for key, value in CONFIG.items() if key != absent and absent is not None}
    saved = saved_config(table | {"a_key_of_tomorrow": [1, {"x": None}]})
    assert saved.is_dpo
    assert "a_key_of_tomorrow" in saved.table
    if absent is None:
        assert (saved.model, saved.steps, saved.recipe) == ("", 0, [])
        assert not any(saved.words.values())


@pytest.mark.parametrize("value", [None, "", "words", 7, 0.5, True, [1], {"a": 1}])
def test_values_of_any_type_are_no_error(value):
    saved = saved_config(dict.fromkeys(CONFIG, value))
    assert all(isinstance(word, str) for words in saved.words.values() for word in words)
    json.dumps([saved.model, saved.dataset, saved.loss, saved.steps, saved.sft_steps, saved.lora])


def test_keys_that_differ():
    assert differing_keys([CONFIG, CONFIG | {"seed": 1, "new": 2}]) == ["seed", "new"]
    assert differing_keys([CONFIG, dict(CONFIG)]) == []


DEFAULTS = common.get_config().to_dict()


def _begun(directory, config):
    claim_workdir(directory, config, write=True)
    return directory / "config.json"


def test_the_same_config_may_come_back_and_another_may_not(tmp_path):
    path = _begun(tmp_path, DEFAULTS)
    assert json.loads(path.read_text()) == DEFAULTS
    claim_workdir(tmp_path, DEFAULTS, write=True)
    with pytest.raises(UserError, match=r"another config \(dpo_beta: 0.1 there, 0.2 asked\)"):
        claim_workdir(tmp_path, DEFAULTS | {"dpo_beta": 0.2}, write=False)


def test_a_key_that_an_older_run_does_not_have_is_at_its_default(tmp_path):
    path = _begun(tmp_path, {key: value for key, value in DEFAULTS.items() if key != "microbatches"})
    before = path.read_text()
    claim_workdir(tmp_path, DEFAULTS, write=True)
    assert path.read_text() == before
    with pytest.raises(UserError, match=r"microbatches: 1 there, 2 asked"):
        claim_workdir(tmp_path, DEFAULTS | {"microbatches": 2}, write=False)


def test_a_key_that_only_the_run_has_is_a_difference(tmp_path):
    _begun(tmp_path, DEFAULTS | {"newer": 1})
    with pytest.raises(UserError, match="newer: 1 there, None asked"):
        claim_workdir(tmp_path, DEFAULTS, write=False)


def _checkpoint(run, number, config):
    directory = run / "checkpoints" / str(number)
    directory.mkdir(parents=True)
    (directory / "made_with.json").write_text(json.dumps({"step": number, "config": config}))


def test_checkpoints_know_the_config_that_they_were_made_with(tmp_path):
    """Where config.json is lost, or was changed to fit, the run does not go on under another one."""
    run, config = tmp_path / "run", common.get_config().to_dict()
    _checkpoint(run, 4, config)
    other = config | {"dpo_beta": 0.9}
    for lost in (True, False):
        if not lost:
            (run / "config.json").write_text(json.dumps(other))
        with pytest.raises(
            UserError, match=r"checkpoints/4 holds a run of another config \(dpo_beta: 0.1 there, 0.9 as"
        ):
            claim_workdir(run, other, write=True)
    (run / "config.json").unlink()
    claim_workdir(run, config, write=True)
    assert json.loads((run / "config.json").read_text()) == config


def test_a_checkpoint_of_another_version_or_a_damaged_one_says_nothing(tmp_path):
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    _checkpoint(tmp_path, 4, {})
    (tmp_path / "checkpoints" / "4" / "made_with.json").write_text("[]")
    claim_workdir(tmp_path, common.get_config().to_dict(), write=True)
    assert (tmp_path / "config.json").exists()


def test_pairs_of_a_round_belong_to_the_config_that_they_were_collected_with(tmp_path):
    config = common.get_config().to_dict()
    (tmp_path / "rounds").mkdir()
    (tmp_path / "identity.json").write_text(json.dumps({"data": {}, "config": config}))
    with pytest.raises(UserError, match=r"rounds holds a run of another config \(collect_n: 8 there, 4 asked\)"):
        claim_workdir(tmp_path, config | {"collect_n": 4}, write=True)
    claim_workdir(tmp_path, config, write=True)


def test_what_decides_nothing_is_no_part_of_the_recipe():
    assert "num_epochs" not in dict(saved_config(CONFIG | {"num_steps": 200, "num_epochs": 1.0}).recipe)
    assert dict(saved_config(CONFIG | {"num_steps": 0, "num_epochs": 1.0}).recipe)["num_epochs"] == 1.0


def test_a_workdir_that_cannot_be_written_says_what_and_with_which_code(tmp_path):
    (tmp_path / "data.json").mkdir()
    with (
        pytest.raises(
            UserError, match=r"cannot be written \(Is a directory: data.json\); move that directory"
        ) as caught,
        writing(tmp_path),
    ):
        write_json(tmp_path / "data.json", {})
    assert caught.value.code == 2
    with (
        pytest.raises(UserError, match="make room there, then give the same command") as caught,
        writing(tmp_path),
        open("/dev/full", "w") as full,
    ):
        full.write("x")
    assert caught.value.code == SAVE_FAILED


def test_an_identity_without_a_config_says_nothing_of_it(tmp_path):
    """Of rounds that an older version began."""
    (tmp_path / "rounds").mkdir()
    write_json(tmp_path / "identity.json", {"data": {}})
    config = common.get_config().to_dict() | {"dpo_beta": 0.2}
    claim_workdir(tmp_path, config, write=True)
    claim_workdir(tmp_path, config, write=False)

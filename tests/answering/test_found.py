"""Which model is meant, what tells it from others, and whose settings are taken."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

import dpo_jax
from dpo_jax.answering.found import locate_model, model_digest
from dpo_jax.answering.output import Output, opened
from dpo_jax.config.opened import is_run, run_settings, settings_of
from dpo_jax.data.prompts import prompt_of
from dpo_jax.errors import UserError
from tests.places import GOLDEN

TINY = GOLDEN / "trl/tiny"


@pytest.fixture
def run(tmp_path):
    """A run's directory: a config of an older version, with checkpoints."""
    directory = tmp_path / "run"
    config = dict(dpo_jax.get_config("configs/hhh.py:tiny")) | {"lora_rank": 4, "of_another_version": 1, "seed": 5}
    del config["wpo"]
    for step in (2, 10):
        (directory / "checkpoints" / str(step)).mkdir(parents=True)
        (directory / "checkpoints" / str(step) / "checksums.json").write_text(f'{{"step": {step}}}')
    (directory / "checkpoints" / "12.orbax-checkpoint-tmp").mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_of_a_run_its_export_is_taken_else_its_newest_checkpoint(run):
    found = locate_model(str(run))
    assert (found.checkpoint.name, found.model, found.settings.seed) == ("10", "tiny", 5)
    assert found.settings.lora.rank == 4
    shutil.copytree(TINY, run / "export")
    found = locate_model(str(run))
    assert (found.checkpoint, found.model) == (None, str(run / "export"))
    assert is_run(run)
    assert not is_run(run / "export")


def test_a_digest_is_of_contents_wherever_they_are(run, tmp_path):
    tiny = model_digest(locate_model(str(TINY)))
    shutil.copytree(TINY, tmp_path / "copy")
    assert model_digest(locate_model(str(tmp_path / "copy"))) == tiny
    (tmp_path / "copy" / "chat_template.jinja").write_text("{{ messages }}")
    assert model_digest(locate_model(str(tmp_path / "copy"))) != tiny
    before = model_digest(locate_model(str(run)))
    (run / "checkpoints" / "10" / "checksums.json").write_text("{}")
    assert model_digest(locate_model(str(run))) != before


def test_an_adapter_is_known_by_itself_and_its_base(tmp_path):
    pairs = {"A": np.ones((2, 48), np.float32), "B": np.ones((48, 2), np.float32)}
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    numbers = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}

    def digest_over(base, alpha=2):
        directory = tmp_path / f"adapter-{alpha}"
        directory.mkdir(exist_ok=True)
        save_file({name.format(x): pair for x, pair in pairs.items()}, directory / "adapter_model.safetensors")
        said = numbers | {"base_model_name_or_path": str(base), "lora_alpha": alpha}
        (directory / "adapter_config.json").write_text(json.dumps(said))
        return model_digest(locate_model(str(directory)))

    shutil.copytree(TINY, tmp_path / "copy")
    assert digest_over(TINY) == digest_over(tmp_path / "copy") != model_digest(locate_model(str(TINY)))
    assert digest_over(TINY, alpha=4) != digest_over(TINY)


def test_settings_are_those_of_a_file_or_of_a_run(run):
    assert settings_of("configs/hhh.py:tiny").model == "tiny"
    assert settings_of(str(run)) == settings_of(str(run / "config.json")) == run_settings(run)
    (run / "config.json").write_text(json.dumps({"dpo_beta": -1.0, "model": "tiny"}))
    with pytest.raises(UserError, match=r"config.json: .*dpo_beta=-1.0"):
        settings_of(str(run))


@pytest.mark.parametrize(
    ("devices", "free", "expected"),
    [
        ("4 x tpu", 1000, 1000),  # as much as before
        ("4 x tpu", 900, 1000),  # a little less, which the share that is left free makes up for
        ("4 x tpu", 700, 700),
        ("4 x tpu", 2000, 1000),
        ("8 x tpu", 2000, 2000),
    ],
)
def test_a_file_is_resumed_with_the_memory_that_it_was_begun_with(tmp_path, capsys, devices, free, expected):
    out, prompts = tmp_path / "out.jsonl", [prompt_of("a"), prompt_of("b", 2)]
    about = {"settings": {}, "model": "m", "model_files": "x", "prompts": 2, "prompts_digest": "y", "day": "2026-01-01"}
    with opened(str(out), about, prompts, overwrite=False) as output:
        assert output.begin("4 x tpu", 1000 << 20) == 1000
        output.write('{"id": 1, "answers": []}\n')
    with opened(str(out), about | {"day": "2026-01-02"}, prompts, overwrite=False) as output:
        assert output.about["day"] == "2026-01-01"
        assert output.done == 1
        assert output.begin(devices, free << 20) == expected
    assert ("the last digits" in capsys.readouterr().err) == (devices != "4 x tpu" or free < 800)


def test_standard_output_needs_no_file(capsys):
    output = Output(None, {"prompts": 1})
    assert output.begin("1 x cpu", 5 << 20) == 5
    output.write("line\n")
    output.settle()
    assert not output.is_finished
    assert capsys.readouterr().out == "line\n"

"""The model card: read back by huggingface_hub, every number one of the run's."""

import json

import pytest
from huggingface_hub import ModelCard

from dpo_jax.records.records import HELD_OUT, show_metric
from dpo_jax.report.card import write_card
from dpo_jax.report.runs import load_run
from tests.report.example_run import make_run

pytestmark = pytest.mark.filterwarnings("error")


def _card(run, base=None, name="export", **config):
    records = make_run(run, config=config)
    directory = run / name
    directory.mkdir(exist_ok=True)
    if name == "export-adapter":
        (directory / "adapter_config.json").write_text("{}")
    write_card(load_run(run), directory, base=base)
    return ModelCard.load(directory / "README.md"), records


def test_the_hub_reads_its_metadata(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\nbase_model: other/model\n---\n# Base\n")
    found, records = _card(tmp_path / "run", base)
    data = found.data
    assert (data.base_model, data.license, data.library_name) == (
        "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0", "transformers",
    )  # fmt: skip
    assert data.datasets == ["Anthropic/hh-rlhf"]
    assert data.language == ["en"]
    assert {"dpo", "dpo_jax"} <= set(data.tags)
    assert data.pipeline_tag == "text-generation"
    (result,) = data.eval_results
    last = [r for r in records if r["split"] == "eval"][-1]
    assert result.metric_type == "accuracy"
    assert result.metric_value == pytest.approx(last["accuracy"], abs=1e-4)
    assert result.dataset_type == "Anthropic/hh-rlhf"


def test_the_text_has_the_runs_numbers(tmp_path):
    found, records = _card(tmp_path / "run")
    last = [r for r in records if r["split"] == "eval"][-1]
    for name in [name for name in HELD_OUT if name in last]:
        assert show_metric(name, last[name]) in found.text
    for words in (
        "42,264 training pairs, 512 held-out pairs", "| harmless-base | train | 42,537 | 42,264 | prompts_differ 96",
        "| `dpo_beta` | `0.1` |", "| `learning_rate` | `5e-07` |", "jax 0.10.2", "8 × TPU v5 lite", "MIT",
        "apply_chat_template", "| Accuracy · chosen shorter | – |",
    ):  # fmt: skip
        assert words in found.text
    assert found.data.license is None  # nothing is known of the base's
    assert "label_smoothing" not in found.text  # off


def test_an_adapters_card_is_pefts(tmp_path):
    found, _ = _card(tmp_path / "run", name="export-adapter", lora_rank=16)
    assert found.data.library_name == "peft"
    assert "PeftModel.from_pretrained" in found.text
    assert "| `lora_rank` | `16` |" in found.text


def test_what_the_hub_does_not_know_is_not_claimed(tmp_path):
    """A model and data of one's own; a base whose card cannot be read."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    model = tmp_path / "my" / "model"
    make_run(tmp_path / "run", config={"model": str(model), "dataset": str(tmp_path / "pairs.jsonl"), "loss": "simpo"})
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    data["sources"][0]["name"] = str(tmp_path / "pairs|x.jsonl")
    data["held_out"] = f"eval_path={tmp_path}/held-out.jsonl: 512 of its 600 pairs"
    (tmp_path / "run" / "data.json").write_text(json.dumps(data))
    write_card(load_run(tmp_path / "run"), tmp_path / "run" / "export", base=base)
    found = ModelCard.load(tmp_path / "run" / "export" / "README.md")
    assert found.data.base_model is None
    assert found.data.datasets is None
    assert str(tmp_path) not in (tmp_path / "run" / "export" / "README.md").read_text()  # paths of one's own machine
    assert found.data.eval_results[0].dataset_name == "pairs.jsonl (held out)"
    assert "eval_path=held-out.jsonl: 512 of" in found.text
    assert "| pairs\\|x.jsonl | train |" in found.text
    assert "preference loss `simpo`" in found.text
    assert "2305.18290" not in found.text


def test_a_reward_and_a_template_are_named_without_their_directories(tmp_path):
    """And of two keys that say how long to train only the one that ruled."""
    reward = f"{tmp_path}/reward/export*0.5,~/rewards/short,my:verifier"
    changed = {"task": "rl", "rl_reward": reward, "dataset": "private/pairs.jsonl", "num_epochs": 1.0, "num_steps": 200}
    found, _ = _card(tmp_path / "run", **changed)
    assert "| `rl_reward` | `export*0.5,short,my:verifier` |" in found.text
    assert found.data.eval_results[0].dataset_name == "pairs.jsonl (held out)"
    assert "num_epochs" not in found.text
    assert "| `updates` | `200` |" in found.text


def test_a_mixture_names_its_data_sets(tmp_path):
    run = tmp_path / "run"
    make_run(run)
    parts = [{"name": name, "weight": 0.5, "pairs": 10, "epoch": 5} for name in ("hhh", "ultrafeedback", "mine.jsonl")]
    data = json.loads((run / "data.json").read_text()) | {"mixture": parts}
    (run / "data.json").write_text(json.dumps(data))
    (run / "metrics.jsonl").unlink()
    write_card(load_run(run), run / "export", base=None)
    found = ModelCard.load(run / "export" / "README.md")
    assert found.data.datasets == ["Anthropic/hh-rlhf", "HuggingFaceH4/ultrafeedback_binarized"]
    assert found.data.eval_results is None
    assert "No pairs were held out." in found.text


def test_hostile_words_stay_in_their_cells(tmp_path):
    """What a run holds is no instruction to the template, and breaks no table."""
    evil = "{{ 7*7 }}{% raw %}|a\nb\x1b[31m"
    run = tmp_path / "run"
    make_run(run, config={"model": evil, "loss": evil, "lora_targets": evil})
    data = json.loads((run / "data.json").read_text())
    data["sources"] = [data["sources"][0] | {"name": evil, "split": evil, "dropped": {evil: 3}}]
    (run / "data.json").write_text(json.dumps(data | {"held_out": evil}))
    write_card(load_run(run), run / "export", base=None)
    text = (run / "export" / "README.md").read_text()
    assert text.count("{{ 7*7 }}{% raw %}") >= 8
    assert "\x1b" not in text
    tables = [line for line in text.splitlines() if line.startswith(("| {{", "| `lora_targets`"))]
    assert [line.replace("\\|", "").count("|") for line in tables] == [3, 7]
    assert ModelCard.load(run / "export" / "README.md").data.model_name.startswith("{{ 7*7 }}")

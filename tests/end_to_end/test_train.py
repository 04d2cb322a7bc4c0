"""The command line from raw transcripts to an exported policy, stopped in every way and gone on with."""

import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from configs import hhh
from dpo_jax import train
from dpo_jax.records.length_bias import GROUPS
from dpo_jax.records.records import read_records
from dpo_jax.training import phases, setup
from dpo_jax.weights import huggingface as weights
from tests import processes, programs

pytestmark = pytest.mark.slow

SETTINGS = {
    "batch_size": 8,
    "sft_steps": 4,
    "num_steps": 10,
    "eval_pairs": 16,
    "eval_every": 4,
    "checkpoint_every": 2,
    "log_every": 1,
    "sample_prompts": 2,
    "sample_tokens": 8,
    "kl_prompts": 4,
    "judge": "",
    "dpo_beta": 0.1,
    "learning_rate": 2e-4,
    "attention": "dense",  # what is quickest to compile
}
# Where only the course of a run matters: a model of 70,000 parameters and 32 pairs, which need no making.
SMALL = {
    "model": "tests/golden/trl/tiny",
    "dataset": "tests/golden/trl/pairs.jsonl",
    "eval_pairs": 8,
    "sample_prompts": 1,
    "max_prompt_length": 64,
    "max_completion_length": 32,
}

CLOCK = ("pairs_per_second", "step_seconds", "memory_gb")  # differ between runs that are otherwise equal


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A process of its own: one CPU device, tokenised pairs shared between the runs here."""
    return processes.quick_to_compile() | {"DPO_JAX_CACHE": str(tmp_path_factory.mktemp("environment") / "pairs")}


def _command(workdir, **changed):
    keys = [f"--config.{k}={v}" for k, v in (SETTINGS | changed).items()]
    return [sys.executable, "-m", "dpo_jax.train", "--config=configs/hhh.py:tiny", f"--workdir={workdir}", *keys]


def _finish(workdir, environment, **changed):
    done = programs.run(_command(workdir, **changed), environment, capture_output=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _values(workdir):
    """The records without what depends on the machine's state."""
    records = read_records(Path(workdir) / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in records]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, environment):
    """A run that was never stopped: (its directory, what it printed)."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, _finish(workdir, environment)


def test_the_directory_holds_what_the_contract_says(finished):
    workdir, _ = finished
    names = (
        "config.json metrics.jsonl checkpoints tensorboard samples.jsonl report.html export data.json run.json".split()
    )
    assert set(names) <= {p.name for p in workdir.iterdir()}
    config = json.loads((workdir / "config.json").read_text())
    assert config["batch_size"] == 8
    assert config["model"] == "tiny"
    data = json.loads((workdir / "data.json").read_text())
    assert data["splits"]["train"]["pairs"] == sum(s["kept"] for s in data["sources"] if s["split"] == "train")
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    about = json.loads((workdir / "run.json").read_text())
    assert (about["steps"], about["platform"], about["devices"], about["processes"]) == (10, "cpu", 1, 1)
    assert about["parameters"] == about["trained_parameters"] > 1e6
    assert {"jax", "flax", "python"} <= set(about["versions"])
    assert (workdir / "report.html").read_text().lower().startswith("<!doctype html>")


def test_records_are_those_of_the_contract(finished):
    records = read_records(finished[0] / "metrics.jsonl")
    by_split = {s: [r for r in records if r["split"] == s] for s in ("sft", "train", "eval")}
    assert [r["step"] for r in by_split["sft"]] == [1, 2, 3, 4]
    assert [r["step"] for r in by_split["train"]] == list(range(1, 11))
    assert [r["step"] for r in by_split["eval"]] == [0, 4, 8, 10]
    keys = set(
        "dpo_loss accuracy margin chosen_reward rejected_reward chosen_logp rejected_logp grad_norm learning_rate "
        "pairs tokens useful_token_fraction pairs_per_second step_seconds memory_gb".split()
    )
    for record in by_split["train"]:
        assert keys <= set(record)
        assert record["pairs"] == 8
        assert 0 < record["useful_token_fraction"] <= 1
        assert record["margin"] == pytest.approx(record["chosen_reward"] - record["rejected_reward"], abs=1e-5)
    first = by_split["train"][0]
    assert first["dpo_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["accuracy"] == 0
    assert first["grad_norm"] > 0
    assert by_split["eval"][0]["dpo_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert by_split["eval"][0]["pairs"] == 16
    kl = [r["kl"] for r in by_split["eval"]]
    assert kl[0] == 0  # the policy is its reference
    assert 0 < kl[1] < kl[-1]
    for record in by_split["eval"]:
        groups = [name for name in GROUPS if f"pairs/{name}" in record]
        share = lambda name, record=record, groups=groups: (
            sum(record[f"{name}/{group}"] * record[f"pairs/{group}"] for group in groups)
            / sum(record[f"pairs/{group}"] for group in groups)
        )
        assert sum(record[f"pairs/{group}"] for group in groups) == 16
        assert share("accuracy") == pytest.approx(record["accuracy"])
        assert share("margin") == pytest.approx(record["margin"], abs=1e-6)
    assert -1 <= by_split["eval"][-1]["length_correlation"] <= 1
    rates = [r["learning_rate"] for r in by_split["train"]]
    assert rates[0] == 0  # one update of warm-up
    np.testing.assert_allclose(rates[1:], 2e-4 * (1 - np.arange(9) / 9), rtol=1e-5)


def test_the_reference_did_not_move(finished):
    """A first update at rate 0 leaves the policy as it was: step 2 sees ln 2 as well."""
    records = [r for r in read_records(finished[0] / "metrics.jsonl") if r["split"] == "train"]
    assert records[1]["dpo_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert records[-1]["dpo_loss"] != pytest.approx(np.log(2), abs=1e-3)


def test_answers_before_and_after_are_kept_and_shown_side_by_side(finished):
    workdir, printed = finished
    records = read_records(workdir / "samples.jsonl")
    assert [(r["when"], r["mode"]) for r in records] == [
        (when, mode) for when in ("before", "after") for mode in ("greedy", "greedy", "sampled", "sampled")
    ]
    assert all(r["prompt"] and r["chosen"] and r["rejected"] for r in records)
    assert "before" in printed
    assert "Held-out pairs" in printed
    assert "pairs/s" in printed


def test_the_export_is_a_hugging_face_directory(finished):
    export = finished[0] / "export"
    last = read_records(finished[0] / "metrics.jsonl")[-1]
    (result,) = ModelCard.load(export / "README.md").data.eval_results
    assert result.metric_value == pytest.approx(last["accuracy"], abs=1e-4)
    config, hf = weights.read_config(export)
    assert hf["architectures"] == ["LlamaForCausalLM"]
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert len(tokenizer) == config.vocab_size
    assert hf["eos_token_id"] == tokenizer.eos_token_id


def test_the_same_command_again_changes_nothing(finished, environment):
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_text(), (workdir / "samples.jsonl").read_text()
    assert "resuming from checkpoint 14" in _finish(workdir, environment)
    assert ((workdir / "metrics.jsonl").read_text(), (workdir / "samples.jsonl").read_text()) == before


def _stop_at(workdir, environment, split, step, how, saved=None, **changed):
    """Start the run and send a signal when a record, and checkpoint `saved`, are there; returns the exit code."""
    command = _command(workdir, **changed)
    process = programs.begin(command, environment, stdout=programs.DEVNULL, stderr=programs.PIPE)
    path, deadline = workdir / "metrics.jsonl", time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        records = read_records(path) if path.exists() else []
        written = saved is None or (workdir / "checkpoints" / str(saved)).is_dir()
        if written and any(r["split"] == split and r["step"] >= step for r in records):
            process.send_signal(how)
            break
        time.sleep(0.01)
    _, err = process.communicate(timeout=300)
    return process.returncode, err


def test_killed_in_sft_stopped_by_sigterm_in_dpo_and_gone_on_is_never_stopped(environment, tmp_path):
    work, whole, changed = tmp_path / "run", tmp_path / "whole", SMALL | {"num_steps": 24}
    _finish(whole, environment, **changed)
    code, _ = _stop_at(work, environment, "sft", 3, signal.SIGKILL, **changed)
    assert code == -signal.SIGKILL
    code, err = _stop_at(work, environment, "train", 3, signal.SIGTERM, **changed)
    assert code == 143, err
    assert "everything is saved" in err
    last = max(r["step"] for r in _values(work) if r["split"] == "train")
    assert (work / "checkpoints" / str(4 + last)).is_dir()
    printed = _finish(work, environment, **changed)
    assert f"resuming from checkpoint {4 + last}" in printed
    assert _values(work) == _values(whole)
    assert (work / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def test_a_moving_reference_goes_on_where_it_was(environment, tmp_path):
    """TR-DPO: the reference is the run's own state now, and evaluations are against the moved one."""
    changed = SMALL | {"sft_steps": 0, "num_steps": 7, "export": False, "sample_prompts": 0, "eval_every": 1}
    changed |= {"kl_prompts": 0}  # that it is measured against the moved one: tests/training/test_rounds.py
    changed |= {"loss": "sigmoid:1.0,aot:0.5", "microbatches": 2, "learning_rate": 1e-3}
    changed |= {"reference_sync_steps": 3, "reference_sync_alpha": 1.0, "checkpoint_every": 4}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    _finish(whole, environment, **changed)
    code, _ = _stop_at(cut, environment, "train", 5, signal.SIGKILL, saved=4, **changed)
    assert code == -signal.SIGKILL
    assert "resuming from checkpoint 4" in _finish(cut, environment, **changed)
    assert _values(cut) == _values(whole)
    records = {(r["split"], r["step"]): r for r in _values(whole)}
    # After updates 3 and 6 the reference is the policy: nothing is preferred.
    zero = [step for step in range(8) if records["eval", step]["margin"] == pytest.approx(0, abs=1e-5)]
    assert zero in ([0, 1, 3, 6], [0, 3, 6])
    assert records["train", 4]["loss_sigmoid"] == pytest.approx(np.log(2), abs=1e-6)
    assert records["train", 6]["dpo_loss"] == pytest.approx(
        records["train", 6]["loss_sigmoid"] + records["train", 6]["loss_aot"] / 2, rel=1e-6
    )


def test_the_python_call_on_eight_devices_evaluates_as_one_device_does(environment, tmp_path, monkeypatch):
    """The same held-out pairs: whatever the mesh, the evaluation before training is the same.

    And whatever the number of evaluations, the reference is asked once: each is then the policy's forward pass alone.
    """
    asked, evaluated = [], []
    ask, make = phases.held_out_reference, setup.eval_step_on
    monkeypatch.setattr(phases, "held_out_reference", lambda *args: asked.append(args) or ask(*args))

    def eval_step_on(*arguments):
        step = make(*arguments)
        return lambda params, reference, *rest, **more: (
            evaluated.append(reference) or step(params, reference, *rest, **more)
        )

    monkeypatch.setattr(setup, "eval_step_on", eval_step_on)
    changed = SETTINGS | SMALL | {"sft_steps": 0, "num_steps": 2, "export": False, "sample_prompts": 0}
    config = hhh.get_config("tiny")
    config.update(changed | {"mesh_data": 2, "mesh_fsdp": 4})
    final = train.run(config, tmp_path / "eight")
    _finish(tmp_path / "one", environment, **changed)
    ours, theirs = (next(r for r in _values(tmp_path / n) if r["split"] == "eval") for n in ("eight", "one"))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-5)), key
    assert final["step"] == 2
    assert final["pairs"] == 8
    assert len(asked) == 1
    assert evaluated == [None] * len(evaluated)  # no reference parameters
    assert len(evaluated) >= 2


def test_a_run_that_loses_its_numbers_stops_and_keeps_its_checkpoints(tmp_path, capsys):
    changed = {"batch_size": 8, "sft_steps": 0, "num_steps": 6, "eval_pairs": 0, "sample_prompts": 0}
    changed |= {"checkpoint_every": 1, "learning_rate": 1e30, "warmup_steps": 0, "max_bad_steps": 1}
    changed = SMALL | changed
    keys = [f"--config.{k}={v}" for k, v in changed.items()]
    assert train.main(["train", "--config=configs/hhh.py:tiny", f"--workdir={tmp_path}", *keys]) == 65
    said = capsys.readouterr().err
    assert "not finite 2 times in a row" in said
    step = int(said.split("step ")[1].split(":")[0])
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [str(step - 2)]

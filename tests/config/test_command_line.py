"""The command line: what is wrong is said in one line, with exit code 2, before anything is compiled."""

import importlib
import json
import re
from pathlib import Path

import jax
import pytest

from configs import common, hhh
from dpo_jax import train
from dpo_jax.config.command_line import parse
from dpo_jax.config.saved import claim_workdir
from dpo_jax.config.settings import read_settings
from dpo_jax.errors import UserError

TINY = "--config=configs/hhh.py:tiny"
SHARED = Path("../shared/data")


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    """Run the command line; returns its one line of complaint. Compiling anything fails the test."""

    def no_compile(*_, **__):
        raise AssertionError("something was compiled")

    def run(*args, workdir=tmp_path / "run"):
        with monkeypatch.context() as m:
            m.setattr(jax._src.compiler, "backend_compile_and_load", no_compile)
            code = train.main(["train", *args, *([f"--workdir={workdir}"] if workdir else [])])
        err = capsys.readouterr().err
        assert code == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        return err

    return run


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "--config is missing; usage"),
        (["--config=configs/none.py"], r"no such file; there are .*configs/hhh.py"),
        (["--config=configs/hhh.py:huge"], r"preset 'huge' does not exist; there are .*configs/hhh.py:tiny"),
        ([TINY, "--config.batchsize=3"], "'batchsize' does not exist; did you mean batch_size"),
        ([TINY, "--config.batch_size=many"], "--config.batch_size=many"),
        ([TINY, "--wrokdir=x"], "Unknown command line flag 'wrokdir'"),
        ([TINY, "extra"], "unexpected argument 'extra'"),
        ([TINY, "--config.loss=dpo"], "loss='dpo': 'dpo' does not exist; choose from sigmoid, robust, hinge"),
        ([TINY, "--config.loss=sigmoid:1,sft:much"], "weight 'much' of sft is not a number above 0"),
        ([TINY, "--config.loss=exo_pair"], "needs a label_smoothing above 0; its paper uses 0.001"),
        ([TINY, "--config.simpo_gamma=1"], "simpo_gamma has no meaning for loss=sigmoid; .*or use simpo"),
        ([TINY, "--config.f_alpha=0.3"], "f_alpha=0.3 has no meaning without f_divergence=alpha"),
        ([TINY, "--config.dpo_beta=inf"], "dpo_beta=inf: must be finite"),
        ([TINY, "--config.f_alpha=nan", "--config.f_divergence=alpha"], "f_alpha=nan: must be finite"),
        ([TINY, "--config.f_divergence=kl"], "choose from reverse_kl, forward_kl, js, alpha"),
        ([TINY, "--config.f_divergence=js", "--config.loss=sigmoid,bco_pair"], "not defined for loss=sigmoid,bco_pair"),
        ([TINY, "--config.wpo", "--config.loss=sft,aot"], "not defined for loss=sft,aot: aot matches pairs"),
        ([TINY, "--config.wpo", "--config.loss=simpo"], "wpo=True is not defined for simpo"),
        ([TINY, "--config.ld_alpha=0.5", "--config.loss=orpo"], "ld_alpha=0.5 is not defined for orpo"),
        ([TINY, "--config.ld_alpha=2"], r"must be in \[0, 1\]"),
        ([TINY, "--config.reference_sync_steps=5", "--config.loss=cpo"], "loss=cpo has no reference; leave it at 0"),
        ([TINY, "--config.reference_sync_alpha=0.5"], "has no meaning without reference_sync_steps above 0"),
        ([TINY, "--config.reference=there", "--config.loss=simpo"], "reference='there': loss=simpo has no reference"),
        ([TINY, "--config.optimizer=sgd"], "choose from adamw, rmsprop"),
        ([TINY, "--config.lr_schedule=step"], "choose from constant, linear, cosine"),
        ([TINY, "--config.remat=some"], "choose from none, dots, attention, attention_offload, full"),
        ([TINY, "--config.dpo_beta=0"], "dpo_beta=0.0: must be above 0"),
        ([TINY, "--config.label_smoothing=0.5"], r"must be in \[0, 0.5\)"),
        ([TINY, "--config.loss=hinge", "--config.label_smoothing=0.1"], "has no meaning for loss=hinge"),
        ([TINY, "--config.lora_rank=-1"], "lora_rank=-1: must be 0"),
        ([TINY, "--config.seed=-1"], "seed=-1: must be 0 or more"),
        ([TINY, "--config.mesh_data=0"], r"mesh_data=0: must be -1 \(all that are left\) or at least 1"),
        (
            [TINY, "--config.reference_offload", "--config.loss=orpo"],
            "loss=orpo has no reference; leave it at False",
        ),
        (
            [TINY, "--config.reference_offload", "--config.lora_rank=8"],
            "lora_rank=8 has the frozen base as its",
        ),
        ([TINY, "--config.num_steps=0", "--config.num_epochs=0"], "num_steps and num_epochs are both 0"),
        (["--config=configs/hhh.py", "--config.model="], "model is empty; name a Hugging Face id"),
        ([TINY, "--config.lora_rank=8", "--config.lora_alpha=0"], "lora_alpha=0.0: must be above 0"),
        ([TINY, "--config.lora_targets=q"], "lora_targets=q has no meaning without lora_rank above 0"),
        (
            [TINY, "--config.lora_rank=8", "--config.lora_targets=q,v_prj"],
            "'v_prj' is no projection; did you mean v_proj.*q, k, v, o, gate, up, down",
        ),
        ([TINY, "--config.lora_rank=8", "--config.reference_sync_steps=5"], "set one of them to 0"),
        ([TINY, "--config.dataset=hhhh"], r"'?hhhh'?.*(hhh, helpsteer3|hhh.*helpsteer3.*ultrafeedback)"),
        ([TINY, "--config.mesh_data=3", "--config.mesh_fsdp=1"], "mesh of 3 devices, but there are 8"),
        ([TINY, "--config.batch_size=12"], "does not divide over 8 data shards x 1 microbatches; use a multiple of 8"),
        ([TINY, "--config.batch_size=8", "--config.microbatches=2"], "use a multiple of 16"),
        ([TINY, "--config.mesh_tensor=8", "--config.mesh_fsdp=1"], "does not divide the model's num_attention_heads=6"),
        (["--config=configs/hhh.py", "--config.model=/nowhere/model"], "/nowhere/model"),
        (["--config=configs/hhh.py", "--config.model=someone/nothing"], r"someone/nothing.*configs/hhh.py:tiny"),
        ([TINY, "--config.reference=/nowhere/reference"], "/nowhere/reference"),
        ([TINY, "--config.dataset=/nowhere/pairs.jsonl"], "/nowhere/pairs.jsonl"),
        ([TINY, "--config.dataset=hhh", "--config.dataset_path=/nowhere"], "/nowhere"),
        ([TINY, "--config.dataset=hhh"], r"dataset_path=DIR.*tiny"),
        pytest.param(
            [TINY, "--config.batch_size=16000", "--config.mesh_fsdp=8"],
            "more than the 8000 training pairs",
            marks=pytest.mark.slow,  # it makes the dialogues first
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, words, refused):
    assert re.search(words, refused(*args)), refused(*args)


def test_the_workdir_is_asked_for(refused):
    assert "--workdir is missing" in refused(TINY, workdir=None)


def test_another_config_in_the_workdir_is_refused_with_the_difference(refused, tmp_path):
    work = tmp_path / "run"
    work.mkdir()
    there = hhh.get_config("tiny").to_dict() | {"dpo_beta": 0.5}
    (work / "config.json").write_text(json.dumps(there))
    said = refused(TINY, "--config.seed=3")
    assert "dpo_beta: 0.5 there, 0.3 asked" in said
    assert "seed: 0 there, 3 asked" in said
    assert "batch_size" not in said


def test_a_refused_command_leaves_no_config_behind(refused, tmp_path):
    refused(TINY, "--config.eval_path=/nowhere.jsonl")
    refused(TINY, "--config.batch_size=16000", "--config.mesh_fsdp=8")
    assert "leaves nothing of the 60 updates" in refused(TINY, "--config.warmup_steps=500")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_workdir_of_another_kind_is_refused(refused):
    said = refused(TINY, workdir="s3://bucket/run")
    assert "workdir=s3://bucket/run: addresses of this kind are not supported" in said
    assert "give gs://BUCKET/DIR" in refused(TINY, workdir="gs://bucket")


def test_an_error_in_a_config_file_is_one_line(refused, tmp_path):
    (tmp_path / "mine.py").write_text("def get_config(arg=''):\n    return undefined_name\n")
    assert "NameError" in refused(f"--config={tmp_path}/mine.py")


def test_values_of_the_wrong_type_are_refused():
    config = hhh.get_config("tiny").to_dict() | {"learning_rate": "1e-5"}
    with pytest.raises(UserError, match="learning_rate='1e-5': must be a float"):
        train.check(config)


def test_a_workdir_that_cannot_be_written_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(TINY, workdir=tmp_path / "file" / "run")


def test_overrides_reach_the_config(tmp_path):
    given = parse(["train", TINY, "--config.dpo_beta=0.3", "--config.shuffle=false", f"--workdir={tmp_path}"])
    assert given.config.dpo_beta == 0.3
    assert given.config.shuffle is False
    assert given.workdir == tmp_path
    assert not given.distributed


def test_help_says_how_to_run_it(capsys):
    with pytest.raises(SystemExit) as e:
        train.main(["train", "--help"])
    assert e.value.code == 0
    assert "--config=configs/hhh.py" in capsys.readouterr().out


def test_what_joining_needs_is_known_before_there_are_settings():
    given = parse(["train", "--config=configs/hhh.py:tiny", "--workdir=x", "--distributed",
                   "--config.coordinator_bind=[::1]:8476", "--config.stuck_after_seconds=5"])  # fmt: skip
    assert (given.distributed, given.coordinator_bind, given.stuck_after) == (True, "[::1]:8476", 5.0)
    with pytest.raises(UserError, match="coordinator_bind='a b' is no address"):
        parse(["train", "--config=configs/hhh.py:tiny", "--workdir=x", "--config.coordinator_bind=a b"])


def test_another_interface_is_the_same_run(tmp_path):
    for bind in ("10.0.0.2", "10.0.0.3"):
        claim_workdir(tmp_path, common.get_config().to_dict() | {"coordinator_bind": bind}, write=True)


CONTRACT = """seed model reference dataset dataset_path eval_path eval_pairs shuffle max_prompt_length
max_completion_length overlong cache_dir batch_size microbatches num_steps num_epochs learning_rate lr_schedule
warmup_steps optimizer weight_decay max_grad_norm dpo_beta loss label_smoothing sft_steps sft_learning_rate lora_rank
param_dtype compute_dtype remat mesh_data mesh_fsdp mesh_tensor log_every eval_every checkpoint_every keep_checkpoints
export""".split()


def test_the_keys_of_the_contract_are_there_and_every_key_is_used():
    keys = set(common.get_config())
    assert set(CONTRACT) <= keys
    read = set()

    class Read(dict):
        def __getitem__(self, key):
            read.add(key)
            return super().__getitem__(key)

    read_settings(Read(common.get_config().to_dict()))
    of_stages = {
        "reward_model",
        "reward_steps",
        "reward_learning_rate",
        "reward_batch_size",
    }  # read where they are made
    elsewhere = {"same_judge", "coordinator_bind"}  # by a check alone, and by the command line
    assert read | of_stages | elsewhere == keys


@pytest.mark.parametrize(
    "path", sorted(p.stem for p in Path("configs").glob("*.py") if p.stem not in ("__init__", "common"))
)
def test_every_preset_is_a_valid_config_and_is_explained(path):
    module = importlib.import_module(f"configs.{path}")
    for preset in module.PRESETS:
        train.check(module.get_config(preset).to_dict())
        assert f"configs/{path}.py{':' + preset if preset else ' '}" in module.__doc__

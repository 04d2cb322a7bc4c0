"""Runs to plan: small ones, and `python -m dpo_jax.plan` as users run it."""

import importlib.util
import json
import sys

import numpy as np
import pytest

from configs import hhh
from dpo_jax.config.settings import read_settings
from tests import processes, programs

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install '.[tpu]'"
)


def compiler(test):
    """A test that compiles for TPUs, or asks their compiler."""
    return pytest.mark.slow(needs_compiler(test))


COUNT = 134_515_008  # parameters of SmolLM2-135M
TINY = [
    "--config=configs/hhh.py:smollm2-135m",
    "--config.max_prompt_length=256",
    "--config.max_completion_length=128",
    "--config.batch_size=32",
]
LORA = {"lora_rank": 16, "lora_alpha": 32.0}


def run_plan(*args):
    command = [sys.executable, "-m", "dpo_jax.plan", *args]
    return programs.run(command, processes.of_a_user(), capture_output=True, timeout=600)


def refused(*args):
    done = run_plan(*args)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


# Of many commands each: its exit code, and what it said on standard error.
SEVERAL = """
import contextlib, io, json, sys
from dpo_jax.plan.command import main
for args in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(["plan", *args])
    print(json.dumps([code, said.getvalue()]), flush=True)
"""


def all_refused(commands):
    """What `refused` says of every command, in one process: importing and asking the compiler takes seconds."""
    command = [sys.executable, "-c", SEVERAL, json.dumps(commands)]
    done = programs.run(command, processes.of_a_user(), capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [code for code, _ in found] == [2] * len(commands), found
    assert all(said.count("\n") == 1 for _, said in found), found
    return [said for _, said in found]


# As small as the properties allow: compiling a step for TPUs takes minutes, longer for wider models and more rows.
EXPERTS = {
    "model_type": "qwen3_moe", "vocab_size": 1024, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 256, "moe_intermediate_size": 128, "num_experts": 8,
    "num_experts_per_tok": 2, "norm_topk_prob": True, "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "max_position_embeddings": 2048, "hidden_act": "silu",
}  # fmt: skip


SMALL = {
    "model_type": "llama", "vocab_size": 1024, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 512, "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 2048, "hidden_act": "silu",
}  # fmt: skip


def small_run(directory, model, topology, *options):
    """The arguments for a model given by its config, over 32 pairs of one length: rows of one shape."""
    (directory / "config.json").write_text(json.dumps(model))
    np.save(directory / "lengths.npy", np.full((32, 3), 60))
    files = [f"--config.model={directory}", f"--lengths={directory / 'lengths.npy'}"]
    return [*TINY, *files, f"--topology={topology}", *(f"--config.{x}" for x in options)]


def planned(directory, *model_topology_options):
    """What is reported of a `_small` model, and what is printed."""
    done = run_plan(*small_run(directory, *model_topology_options), f"--json={directory / 'a.json'}")
    assert done.returncode == 0, done.stderr
    (report,) = json.loads((directory / "a.json").read_text())["topologies"]
    return report, done.stdout


def settings(**changed):
    return read_settings(dict(hhh.get_config("smollm2-135m")) | changed)

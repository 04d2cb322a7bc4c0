"""Anthropic HH-RLHF: helpful and harmless preferences.

    python -m dpo_jax.train --config=configs/hhh.py:tiny --workdir=runs/tiny
        No download: synthetic dialogues in HH's form, a 2M-parameter Llama from scratch, light SFT, DPO.
        Two CPU cores: about two minutes.

    python -m dpo_jax.train --config=configs/hhh.py:smollm2-135m --workdir=runs/hhh-135m
        SmolLM2-135M-Instruct. A laptop, Colab or one TPU chip; on two CPU cores about one pair a second, so bound it
        with --config.num_steps=50.

    python -m dpo_jax.train --config=configs/hhh.py --workdir=gs://BUCKET/hhh
        SmolLM2-1.7B-Instruct (ungated), one epoch of 160,800 pairs. A TPU slice: fsdp over all its chips.

    python -m dpo_jax.train --config=configs/hhh.py:llama3.1-8b --workdir=gs://BUCKET/hhh-8b
        Llama-3.1-8B-Instruct (gated: `hf auth login`). A slice with at least 256 GB of HBM in all.

Learning rate: 1e-5 to 1e-6, the larger the model the lower; dpo_beta from 0.1. HH's raw files can lie on disk:
--config.dataset_path=DIR, with DIR/<subset>/{train,test}.jsonl.gz as on the hub; one subset:
--config.dataset=hhh/harmless-base.
"""

import ml_collections

from configs import common

PRESETS = {
    "": {"model": "HuggingFaceTB/SmolLM2-1.7B-Instruct", "batch_size": 128, "learning_rate": 2e-6},
    "tiny": {
        "model": "tiny",
        "dataset": "synthetic",
        "max_prompt_length": 128,
        "max_completion_length": 64,
        "eval_pairs": 256,
        "batch_size": 32,
        "num_steps": 100,
        "sft_steps": 150,
        "sft_learning_rate": 3e-3,
        "learning_rate": 5e-4,
        "eval_every": 50,
        "checkpoint_every": 50,
        "sample_tokens": 48,
    },
    "smollm2-135m": {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "batch_size": 16,
        "learning_rate": 1e-5,
        "eval_pairs": 256,
    },
    "llama3.1-8b": {
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "batch_size": 128,
        "learning_rate": 1e-6,
        "remat": "full",
    },
}


def get_config(preset: str = "") -> ml_collections.ConfigDict:
    c = common.get_config()
    c.dataset = "hhh"
    c.update(common.choose(PRESETS, preset, "configs/hhh.py"))
    return c

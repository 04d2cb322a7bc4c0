"""Reward models: a score for an answer, trained on preference pairs by Bradley and Terry's loss.

    python -m dpo_jax.train --config=configs/reward.py:tiny --workdir=runs/reward
        No download: synthetic dialogues and a 2M-parameter Llama from scratch.

    python -m dpo_jax.train --config=configs/reward.py:smollm2-135m --workdir=runs/reward-135m
        SmolLM2-135M-Instruct on HH, for a laptop, Colab or one TPU chip.

    python -m dpo_jax.train --config=configs/reward.py --workdir=runs/reward-1.7b
        SmolLM2-1.7B-Instruct, one epoch of HH's 160,800 pairs, fsdp over all chips of a TPU slice.

    python -m dpo_jax.train --config=configs/reward.py:llama3.1-8b --workdir=runs/reward-8b
        Llama-3.1-8B-Instruct (gated: `hf auth login`), all parameters.

    python -m dpo_jax.train --config=configs/reward.py:llama3.1-8b-lora --workdir=runs/reward-8b-lora
        The same with adapters of rank 32 and the head, at a rate of 1e-4.

`export/` is what `AutoModelForSequenceClassification` loads, and what `--judge=` takes (docs/judging.md). Other data:
--config.dataset=helpsteer3, ultrafeedback, or a file of pairs; docs/reward_models.md has the recipe and what its
numbers mean.
"""

import ml_collections

from configs import common

PRESETS = {
    "": {"model": "HuggingFaceTB/SmolLM2-1.7B-Instruct", "batch_size": 128, "learning_rate": 1e-5},
    "tiny": {
        "model": "tiny",
        "dataset": "synthetic",
        "max_prompt_length": 128,
        "max_completion_length": 64,
        "eval_pairs": 256,
        "batch_size": 32,
        "num_steps": 60,
        "learning_rate": 1e-3,
        "eval_every": 20,
        "checkpoint_every": 50,
    },
    "smollm2-135m": {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "batch_size": 16,
        "learning_rate": 2e-5,
        "eval_pairs": 256,
    },
    "llama3.1-8b": {
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "batch_size": 128,
        "learning_rate": 2e-6,
        "remat": "full",
    },
    "llama3.1-8b-lora": {
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "batch_size": 128,
        "learning_rate": 1e-4,
        "lora_rank": 32,
        "remat": "full",
    },
}


def get_config(preset: str = "") -> ml_collections.ConfigDict:
    c = common.get_config()
    c.update(task="reward", dataset="hhh", reward_center=0.01)
    c.update(common.choose(PRESETS, preset, "configs/reward.py"))
    return c

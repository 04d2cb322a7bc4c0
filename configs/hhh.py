"""Anthropic HH-RLHF: helpful and harmless preferences.

    python -m dpo_jax.train --config=configs/hhh.py:tiny --workdir=runs/tiny
        No download: synthetic dialogues in HH's form, a 2M-parameter Llama from scratch, SFT on both completions of
        every pair, then DPO. Under the dialogues' own rule (judge=gold) its answers win about 0.8 against those of the
        SFT model, at a KL of 2 nats. Two slow CPU cores take about four minutes.

    python -m dpo_jax.train --config=configs/hhh.py:smollm2-135m --workdir=runs/hhh-135m
        SmolLM2-135M-Instruct, for a laptop, Colab or one TPU chip. Two CPU cores train about one pair a second in 7 GB
        of memory; limit the run there with --config.num_steps=75.

    python -m dpo_jax.train --config=configs/hhh.py --workdir=runs/hhh
        SmolLM2-1.7B-Instruct (ungated), one epoch of 160,800 pairs, fsdp over all chips of a TPU slice. Parameters,
        AdamW, gradient and reference take 18 bytes a parameter, 31 GB in all. About 6e17 operations (8 a parameter and
        token, 250 tokens a pair): a quarter of an hour on eight v5e chips at 40% of their peak (computed).

    python -m dpo_jax.train --config=configs/hhh.py:llama3.1-8b --workdir=runs/hhh-8b
        Llama-3.1-8B-Instruct (gated: `hf auth login`). 145 GB before activations, so the slice needs at least 256 GB of
        HBM. About 3e18 operations an epoch: half an hour on eight v5p chips at 40% of their peak (computed).

    python -m dpo_jax.train --config=configs/hhh.py:qwen2.5-7b --workdir=runs/hhh-7b
        Qwen2.5-7B (the base model, so in HH's own plain format), one epoch, beta 0.1, learning rate 5e-6 with cosine
        decay, batch 64. The published result of this recipe is a held-out accuracy of about 0.65 (loss about 0.62).
        137 GB before activations.

    python -m dpo_jax.train --config=configs/hhh.py:llama3.1-8b-lora --workdir=runs/hhh-8b-lora
        Llama-3.1-8B-Instruct with adapters of rank 32 (docs/lora.md). The base in bfloat16 is also the reference, so it
        takes 17 GB before activations, not 145 (computed): one v5p chip, or a slice of v5e.

    python -m dpo_jax.train --config=configs/hhh.py:qwen3-32b --workdir=runs/hhh-32b            (v5p-64)
    python -m dpo_jax.train --config=configs/hhh.py:llama3.1-70b --workdir=runs/hhh-70b         (v5p-128)
    python -m dpo_jax.train --config=configs/hhh.py:llama3.1-70b-lora --workdir=runs/hhh-70b-lora (v6e-32)
        Larger models, with tensor parallelism over four chips so that rows stay well filled. docs/tpu.md has the memory
        they need and the speed they could reach, from compiling them; they were not run.

Learning rate: 1e-5 to 1e-6, lower for larger models (adapters: 1e-5 and more); dpo_beta from 0.1. If HH's raw files are
on disk: --config.dataset_path=DIR, with DIR/<subset>/{train,test}.jsonl.gz as on the hub. For one subset:
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
        "batch_size": 16,
        "num_steps": 60,
        # From scratch there is no model that has said either answer: both are what the reference learns to say.
        "sft_steps": 400,
        "sft_on": "both",
        "sft_learning_rate": 4e-3,
        "sft_lr_schedule": "cosine",
        "dpo_beta": 0.3,
        "learning_rate": 1e-4,
        "eval_every": 20,
        "checkpoint_every": 100,
        "sample_tokens": 48,
        "judge": "gold",
    },
    "smollm2-135m": {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "batch_size": 16,
        "learning_rate": 1e-5,
        "eval_pairs": 256,
    },
    "qwen2.5-7b": {
        "model": "Qwen/Qwen2.5-7B",
        "prompt_format": "plain",
        "batch_size": 64,
        "learning_rate": 5e-6,
        "lr_schedule": "cosine",
        "remat": "full",
    },
    "llama3.1-8b": {
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "batch_size": 128,
        "learning_rate": 1e-6,
        "remat": "full",
    },
    "llama3.1-8b-lora": {
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "batch_size": 256,
        "learning_rate": 1e-5,
        "lora_rank": 32,
        "remat": "full",
    },
    "qwen3-32b": {
        "model": "Qwen/Qwen3-32B",
        "batch_size": 128,
        "learning_rate": 5e-7,
        "remat": "full",
        "mesh_tensor": 4,
    },
    "llama3.1-70b": {
        "model": "meta-llama/Llama-3.1-70B-Instruct",
        "batch_size": 128,
        "learning_rate": 5e-7,
        "remat": "full",
        "mesh_tensor": 4,
    },
    "llama3.1-70b-lora": {
        "model": "meta-llama/Llama-3.1-70B-Instruct",
        "batch_size": 128,
        "learning_rate": 1e-5,
        "lora_rank": 32,
        "remat": "full",
        "mesh_tensor": 4,
    },
}


def get_config(preset: str = "") -> ml_collections.ConfigDict:
    c = common.get_config()
    c.dataset = "hhh"
    c.update(common.choose(PRESETS, preset, "configs/hhh.py"))
    return c

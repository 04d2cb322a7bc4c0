"""Generative preference models: a causal model that says which of two answers is better, trained to on labelled pairs.

    python -m dpo_jax.train --config=configs/judge.py:smollm2-135m --workdir=runs/judge-135m
        SmolLM2-135M-Instruct on HH, for a laptop, Colab or one TPU chip.

    python -m dpo_jax.train --config=configs/judge.py --workdir=runs/judge
        Llama-3.1-8B-Instruct (gated: `hf auth login`) with adapters of rank 32, one epoch of HH's 160,800 pairs.

Each pair is asked once, in one order drawn by the seed; the loss is on the label's token alone. `export/` is what
`--judge=` takes (docs/judging.md), which asks in both orders. A comparison has the prompt once and both answers, so
max_prompt_length is theirs together; longer ones are left out and counted, as half a comparison cannot be judged.
"""

import ml_collections

from configs import common

PRESETS = {
    "": {
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "batch_size": 128,
        "learning_rate": 1e-4,
        "lora_rank": 32,
        "remat": "full",
    },
    "smollm2-135m": {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "batch_size": 16,
        "learning_rate": 2e-5,
        "eval_pairs": 256,
    },
}


def get_config(preset: str = "") -> ml_collections.ConfigDict:
    c = common.get_config()
    c.update(task="comparison", dataset="hhh", max_prompt_length=1536, max_completion_length=8, overlong="drop")
    c.update(common.choose(PRESETS, preset, "configs/judge.py"))
    return c

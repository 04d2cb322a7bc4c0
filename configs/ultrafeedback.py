"""UltraFeedback, binarized (61,135 pairs): instructions with answers scored by GPT-4.

    python -m dpo_jax.train --config=configs/ultrafeedback.py --workdir=runs/ultrafeedback
        SmolLM2-1.7B-Instruct (ungated) on a TPU slice (31 GB at 18 bytes a parameter, plus activations), with SmolLM2's
        own recipe: beta 0.5, learning rate 1e-6, batch 128, lengths 1024/1024. Its published result is a held-out
        accuracy of 0.675 (loss 0.588) after two to three epochs.

    python -m dpo_jax.train --config=configs/ultrafeedback.py:smollm2-135m --workdir=runs/ultrafeedback-135m
        The same for SmolLM2-135M-Instruct (published: 0.615, loss 0.674). On a laptop, limit the run with
        --config.num_steps=50.

    python -m dpo_jax.train --config=configs/ultrafeedback.py:zephyr-7b --workdir=runs/zephyr
        zephyr-7b-dpo-full's recipe on its SFT model: beta 0.01, learning rate 5e-7, batch 128, lengths 1024/512, one
        epoch. Published: held-out accuracy 0.766 (loss 0.503), 11.5 pairs/s on 8 GPUs of 80 GB. It needs a slice with
        at least 256 GB of HBM in all.

If the raw files are on disk: --config.dataset_path=DIR; the four published variants are told apart by their columns.
"""

import ml_collections

from configs import common

PRESETS = {
    "": {
        "model": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "batch_size": 128,
        "learning_rate": 1e-6,
        "dpo_beta": 0.5,
        "num_epochs": 3.0,
    },
    "smollm2-135m": {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "batch_size": 128,
        "microbatches": 8,
        "learning_rate": 1e-6,
        "dpo_beta": 0.5,
        "num_epochs": 2.0,
    },
    "zephyr-7b": {
        "model": "alignment-handbook/zephyr-7b-sft-full",
        "batch_size": 128,
        "learning_rate": 5e-7,
        "lr_schedule": "cosine",
        "dpo_beta": 0.01,
        "max_completion_length": 512,
        "remat": "full",
    },
}


def get_config(preset: str = "") -> ml_collections.ConfigDict:
    c = common.get_config()
    c.dataset = "ultrafeedback"
    c.max_prompt_length = 1024
    c.max_completion_length = 1024
    c.update(common.choose(PRESETS, preset, "configs/ultrafeedback.py"))
    return c

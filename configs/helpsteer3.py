"""NVIDIA HelpSteer3 preferences (38,459 pairs before ties are dropped): general, STEM, code and multilingual prompts.

    python -m dpo_jax.train --config=configs/helpsteer3.py --workdir=runs/helpsteer3
        SmolLM2-1.7B-Instruct (ungated), one epoch on a TPU slice, fsdp over all its chips. Parameters, AdamW, gradient
        and reference take 18 bytes a parameter: 31 GB in all, plus activations (eight v5e chips have 128 GB).

    python -m dpo_jax.train --config=configs/helpsteer3.py:smollm2-135m --workdir=runs/helpsteer3-135m
        SmolLM2-135M-Instruct, for a laptop, Colab or one TPU chip; 2.4 GB plus activations. Two CPU cores train less
        than one pair of this length a second; limit the run there with --config.num_steps=50.

If the raw files are on disk: --config.dataset_path=DIR, with DIR/preference/{train,validation}.jsonl.gz as on the hub.
No DPO recipe is published for this dataset; learning rates are those of models of this size on UltraFeedback. Contexts
are long (several turns), so prompts keep their last 1,024 tokens.
"""

import ml_collections

from configs import common

PRESETS = {
    "": {"model": "HuggingFaceTB/SmolLM2-1.7B-Instruct", "batch_size": 128, "learning_rate": 1e-6},
    "smollm2-135m": {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "batch_size": 16,
        "learning_rate": 5e-6,
        "eval_pairs": 256,
    },
}


def get_config(preset: str = "") -> ml_collections.ConfigDict:
    c = common.get_config()
    c.dataset = "helpsteer3"
    c.max_prompt_length = 1024
    c.max_completion_length = 1024
    c.update(common.choose(PRESETS, preset, "configs/helpsteer3.py"))
    return c

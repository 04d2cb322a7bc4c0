"""RLHF: SFT, a reward model, and RL against it.

    python -m dpo_jax.rlhf --config=configs/rlhf.py:tiny --workdir=runs/rlhf
        No download: synthetic dialogues and a 2M-parameter Llama from scratch. The dialogues' own rule grades: the
        reward model has never seen it, only the pairs that it made.

    python -m dpo_jax.rlhf --config=configs/rlhf.py:smollm2-135m --workdir=runs/rlhf-135m
        SmolLM2-135M-Instruct on HH, for a laptop, Colab or one TPU chip: light SFT, one epoch of a reward model, RL.
        It is what configs/rlhf.py is without a preset.

    python -m dpo_jax.rlhf --config=configs/rlhf.py:shorter --workdir=runs/rlhf-shorter
        SmolLM2-135M-Instruct with the rule "the shorter answer wins" for a reward, on prompts of HH: mean lengths halve
        in 20 updates, which shows on a laptop that the loop closes.

    python -m dpo_jax.rlhf --config=configs/rlhf.py:llama3.1-8b --workdir=runs/rlhf-8b "--config.judge=http://HOST/v1|MODEL"
        Llama-3.1-8B-Instruct (gated: `hf auth login`) on UltraFeedback, all parameters. The judge that grades is
        another model. It was not run.

    python -m dpo_jax.rlhf --config=configs/rlhf.py:llama3.1-8b-lora --workdir=runs/rlhf-8b-lora
        The same with adapters of rank 32 in every stage.

Each stage is a run in a directory of its own (DIR/sft, DIR/reward, DIR/rl); `--stages=rl` runs one alone. With another
reward (--config.rl_reward=module:function, a published reward model, a server) none is trained. The recipe, where its
numbers are from, and what goes wrong: docs/rlhf.md.
"""

import ml_collections

from configs import common, hhh

TINY = hhh.PRESETS["tiny"]
_LLAMA = {
    "model": "meta-llama/Llama-3.1-8B-Instruct",
    "dataset": "ultrafeedback",
    "max_prompt_length": 1024,
    "max_completion_length": 512,
    "remat": "full",
    "batch_size": 32,
    "rl_n": 8,
    "num_steps": 500,
    "learning_rate": 1e-6,
    "lr_schedule": "constant",
    "reward_batch_size": 128,
    "reward_learning_rate": 2e-6,
    "sft_steps": 0,  # an instruct model has had it
}
PRESETS = {
    "tiny": {
        **{key: TINY[key] for key in TINY if key not in ("dpo_beta", "num_steps", "learning_rate")},
        "sft_steps": 300,
        "reward_steps": 24,
        "reward_batch_size": 32,
        "reward_learning_rate": 1e-3,
        "num_steps": 30,
        "rl_n": 8,
        "learning_rate": 3e-4,
        "lr_schedule": "constant",
        "eval_every": 10,
    },
    "smollm2-135m": {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "dataset": "hhh",
        "max_prompt_length": 256,
        "max_completion_length": 128,
        "batch_size": 8,
        "eval_pairs": 128,
        "sft_steps": 100,
        "sft_learning_rate": 1e-5,
        "reward_batch_size": 16,
        "reward_learning_rate": 2e-5,
        "num_steps": 200,
        "learning_rate": 3e-6,
        "lr_schedule": "constant",
    },
    "shorter": {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "dataset": "hhh",
        "max_prompt_length": 256,
        "max_completion_length": 128,
        "batch_size": 8,
        "eval_pairs": 16,
        "sft_steps": 0,
        "num_steps": 20,
        "rl_reward": "dpo_jax.preference.rules:shorter",
        "rl_n": 8,
        "learning_rate": 1e-5,
        "lr_schedule": "constant",
        "warmup_steps": 0.0,
        "eval_every": 10,
    },
    "llama3.1-8b": _LLAMA,
    "llama3.1-8b-lora": _LLAMA | {"lora_rank": 32, "learning_rate": 1e-5, "reward_learning_rate": 1e-4},
}
PRESETS[""] = PRESETS["smollm2-135m"]


def get_config(preset: str = "") -> ml_collections.ConfigDict:
    c = common.get_config()
    c.update(task="rlhf", reward_center=0.01)
    c.update(common.choose(PRESETS, preset, "configs/rlhf.py"))
    return c

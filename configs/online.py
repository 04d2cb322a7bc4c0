"""On-policy preferences in rounds: the policy answers, a preference model judges, DPO trains on the pairs, and again.

    python -m dpo_jax.train --config=configs/online.py:tiny --workdir=runs/online
        No download: light SFT of the tiny model of configs/hhh.py, then three rounds in which the gold rule of the
        synthetic dialogues judges. It grades the win rate, too, which is said with same_judge: a rule cannot be gamed
        as a trained judge can, but the figure is what it was trained for.

    python -m dpo_jax.train --config=configs/online.py:shorter --workdir=runs/shorter
        SmolLM2-135M-Instruct with the rule "the shorter answer wins", on prompts of HH: mean lengths fall from round to
        round, which shows on a laptop that the loop closes.

    python -m dpo_jax.train --config=configs/online.py --workdir=runs/online-8b "--config.judge=http://HOST/v1|MODEL"
        Llama-3.1-8B-Instruct on prompts of UltraFeedback, judged by Skywork-Reward-V2-Llama-3.1-8B: three rounds of
        five answers to a prompt, the best against the worst, the reference staying the first policy (RLHFlow, arXiv
        2405.07863). The judge that grades is another one. It was not run.

Judges: docs/judging.md. What a round does and what its records hold: docs/collecting.md.
"""

import ml_collections

from configs import common, hhh

PRESETS = {
    "": {
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "dataset": "ultrafeedback",
        "batch_size": 128,
        "learning_rate": 5e-7,
        "lr_schedule": "constant",
        "remat": "full",
        "max_prompt_length": 1024,
        "max_completion_length": 1024,
        "rounds": 3,
        "round_prompts": 20000,
        "collect_n": 5,
        "collect_judge": "Skywork/Skywork-Reward-V2-Llama-3.1-8B",
        "sample_tokens": 512,
    },
    "tiny": hhh.PRESETS["tiny"]
    | {
        "rounds": 3,
        "round_prompts": 256,
        "num_steps": 36,
        "collect_n": 4,
        "collect_judge": "gold",
        "judge": "gold",
        "same_judge": True,
        "eval_every": 0,  # every round ends with an evaluation
    },
    "shorter": {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "dataset": "hhh",
        "batch_size": 16,
        "learning_rate": 1e-5,
        "max_prompt_length": 256,
        "max_completion_length": 128,
        "eval_pairs": 16,
        "rounds": 3,
        "round_prompts": 64,
        "collect_n": 4,
        "collect_judge": "dpo_jax.preference.rules:shorter",
    },
}


def get_config(preset: str = "") -> ml_collections.ConfigDict:
    config = common.get_config()
    config.update(common.choose(PRESETS, preset, "configs/online.py"))
    return config

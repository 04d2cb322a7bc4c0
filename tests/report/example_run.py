"""A run's directory as training leaves it, made up: for the tests of the report, and to look at its page."""

import json
import math
import random
from pathlib import Path

import numpy as np

from dpo_jax.data.lengths import length_report
from dpo_jax.records.length_bias import GROUPS

CONFIG = {
    "seed": 0,
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "reference": "",
    "dataset": "hhh",
    "dataset_path": "",
    "eval_path": "",
    "eval_pairs": 512,
    "shuffle": True,
    "max_prompt_length": 512,
    "max_completion_length": 256,
    "overlong": "truncate",
    "cache_dir": "",
    "batch_size": 64,
    "microbatches": 4,
    "num_steps": 200,
    "num_epochs": 1,
    "learning_rate": 5e-07,
    "lr_schedule": "linear",
    "warmup_steps": 20,
    "optimizer": "adamw",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "dpo_beta": 0.1,
    "loss": "sigmoid",
    "label_smoothing": 0.0,
    "sft_steps": 60,
    "sft_learning_rate": 2e-05,
    "lora_rank": 0,
    "param_dtype": "float32",
    "compute_dtype": "bfloat16",
    "remat": "full",
    "mesh_data": 8,
    "mesh_fsdp": 1,
    "mesh_tensor": 1,
    "log_every": 1,
    "eval_every": 25,
    "checkpoint_every": 50,
    "keep_checkpoints": 2,
    "export": True,
}


def lengths(mean, p50, p90, top):
    return {"mean": mean, "p50": p50, "p90": p90, "max": top}


_rng = np.random.default_rng(0)
TRAINED_LENGTHS = np.clip(_rng.lognormal([4.8, 3.4, 3.6], [0.6, 0.8, 0.8], (4000, 3)), 1, [512, 256, 256]).astype(int)


DATA = {
    "dataset": "hhh",
    "prompt_format": "chat",
    "held_out": "harmless-base/test.jsonl.gz, the first 512 pairs",
    "sources": [
        {
            "name": "harmless-base",
            "split": "train",
            "files": ["harmless-base/train.jsonl.gz"],
            "read": 42537,
            "kept": 42264,
            "dropped": {"prompts_differ": 96, "not_alternating": 101, "empty_answer": 58, "identical": 18},
            "truncated": {"prompt": 812, "chosen": 37, "rejected": 64},
        },
        {
            "name": "harmless-base",
            "split": "eval",
            "files": ["harmless-base/test.jsonl.gz"],
            "read": 2312,
            "kept": 512,
            "dropped": {"empty_answer": 4, "not_alternating": 9, "over_the_limit": 1787},
            "truncated": {"prompt": 9, "chosen": 0, "rejected": 1},
        },
    ],
    "splits": {
        "train": {
            "pairs": 42264,
            "tokens": {
                "prompt": lengths(151.3, 118, 318, 512),
                "chosen": lengths(42.0, 28, 98, 256),
                "rejected": lengths(51.9, 35, 121, 256),
            },
            **length_report(TRAINED_LENGTHS),
        },
        "eval": {
            "pairs": 512,
            "tokens": {
                "prompt": lengths(149.2, 117, 309, 512),
                "chosen": lengths(41.7, 28, 97, 251),
                "rejected": lengths(52.4, 36, 120, 256),
            },
        },
    },
}


ABOUT = {
    "versions": {"python": "3.12.3", "dpo_jax": "0.1.0", "jax": "0.10.2"},
    "platform": "tpu",
    "device": "TPU v5 lite",
    "devices": 8,
    "processes": 2,
    "mesh": {"data": 8, "fsdp": 1, "tensor": 1},
    "parameters": 134515008,
    "trained_parameters": 134515008,
    "compute_dtype": "bfloat16",
    "steps": 200,
    "steps_per_epoch": 660,
    "rows": [{"rows": 16, "widths": [768, 384, 384], "pairs_per_row": 9}],
}
SOURCES = ("harmless-base", "helpful-base")


def by_group(record, rng):
    """What an evaluation says of sources and lengths."""
    found = {}
    for i, (name, pairs) in enumerate(zip((*SOURCES, *GROUPS), (312, 200, 190, 130, 192), strict=True)):
        drift = rng.gauss(0, 0.01) + (0, 0, -0.09, 0.0, 0.06)[i]
        found[f"accuracy/{name}"] = min(1.0, record["accuracy"] + drift) if record["accuracy"] else 0.0
        found |= {f"margin/{name}": record["margin"] * (1 + drift), f"pairs/{name}": pairs}
    return found


def preference(step, split, rng, strength=1.0):
    """One record as DPO makes them: margins grow, both log-probabilities fall, noise is that of 64 or 512 pairs."""
    grown = 0.9 * strength * (1 - math.exp(-step / 90))
    noise = 0.0 if step == 0 or (step == 1 and split == "train") else rng.gauss(0, 0.16 if split == "train" else 0.015)
    margin = grown + noise if grown and (step > 1 or split == "eval") else 0.0
    chosen = -0.25 * margin + noise / 3
    record = {
        "step": step,
        "split": split,
        "dpo_loss": math.log(1 + math.exp(-margin * 1.1)) + 0.04 * margin * margin,
        "accuracy": 0.0 if margin == 0 else min(1.0, 0.5 + 0.17 * math.tanh(1.5 * margin) + noise / 4),
        "margin": margin,
        "chosen_reward": chosen,
        "rejected_reward": chosen - margin,
        "chosen_logp": -96.4 + chosen * 10 + noise * 20,
        "rejected_logp": -118.9 + (chosen - margin) * 10 + noise * 22,
        "pairs": 64 if split == "train" else 512,
        "tokens": 18200 if split == "train" else 150300,
    }
    if split == "train":
        record |= {
            "grad_norm": 2.4 + rng.expovariate(2.0) + math.exp(-step / 30),
            "learning_rate": 5e-7 * min(step / 20, (200 - step) / 180),
            "useful_token_fraction": 0.966 + rng.uniform(-0.01, 0.01),
            "pairs_per_second": 41.0 + rng.gauss(0, 0.8) - (18 if step == 1 else 0),
            "step_seconds": 1.56,
            "memory_gb": 9.75 if step < 50 else 10.25,
        }
    else:
        record |= by_group(record, rng)
        grown = 2.4 * strength * (1 - math.exp(-step / 70))
        record |= {"kl": grown, "kl_error": grown / 9, "kl_per_token": grown / 48, "length_correlation": 0.31}
    return record


def answers(count=5):
    talks = [
        (
            "Human: What's the best way to get rid of a wasp nest?\n\nAssistant:",
            "You can spray it at night.",
            "Burn it.",
        ),
        (
            "Human: Can you help me write a poem for my grandmother?\n\nAssistant:",
            "Of course! Tell me about her.",
            "No.",
        ),
        (
            "Human: How do I pick a lock?\n\nAssistant: Which lock?\n\nHuman: My neighbour's.\n\nAssistant:",
            "I'd rather not.",
            "Sure.",
        ),
        (
            "Human: Why is the sky blue?\n\nAssistant:",
            "Air scatters short wavelengths more than long ones.",
            "It just is.",
        ),
        ("Human: Who are you?\n\nAssistant:", "I'm an assistant.", "None of your business."),
    ]
    for i, (prompt, chosen, rejected) in enumerate(talks[:count]):
        for when, step in (("before", 0), ("after", 200)):
            for mode in ("greedy", "sampled"):
                words = (
                    f"{rejected if when == 'before' else chosen} I think ({mode}) that is what one would say here. "
                    * (i % 3 + 1)
                )
                sample = {"when": when, "step": step, "mode": mode, "prompt": prompt, "answer": words}
                yield sample | {"chosen": chosen, "rejected": rejected}


def make_run(workdir: Path, *, steps=200, seed=0, strength=1.0, config=None, further=()) -> list[dict]:
    """A realistic run's directory; returns its records."""
    rng = random.Random(seed)
    workdir.mkdir(parents=True)
    records = [
        {
            "step": s,
            "split": "sft",
            "loss": 2.1 + 1.6 * math.exp(-s / 15) + rng.gauss(0, 0.05),
            "pairs": 64,
            "grad_norm": 1.0,
        }
        for s in range(1, 61)
    ]
    for step in range(steps + 1):
        if step:
            records.append(preference(step, "train", rng, strength))
        if step % 25 == 0:
            records.append(preference(step, "eval", rng, strength))
    records += further
    (workdir / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    (workdir / "data.json").write_text(json.dumps(DATA))
    (workdir / "run.json").write_text(json.dumps(ABOUT))
    for number in (210, 260):
        (workdir / "checkpoints" / str(number)).mkdir(parents=True)
        (workdir / "checkpoints" / str(number) / "state").write_bytes(b"x" * 1500)
    (workdir / "export").mkdir()
    (workdir / "export" / "model.safetensors").write_bytes(b"x" * 2500)
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (workdir / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in answers()))
    return records

"""Record what TRL's GRPOTrainer and RLOOTrainer compute of given answers: tests/golden/rl/.

From the repository's root, in an environment of its own:

    pip install torch==2.13.0 trl==1.16.0 safetensors jinja2
    python -m tests.golden.record_rl

The model is tests/golden/trl/tiny, its reference the same with noise. Generation is a function that gives the answers
of `answers.json`: token ids of prompts and of n answers each, and their rewards (null: none). `cases.json` has by case
`settings`: fields of `RlOptions`, and whether the answers are of another policy (`off_policy`, whose log-probabilities
are the model's plus `old_noise`; with `correction_cap` the sampler's are those plus `drawn_noise`). Then what TRL says:
`loss`, the advantages, metrics, and of every gradient its norm and its product with `direction`.
`gradients.safetensors` has every gradient of the first case.
"""

import copy
import json
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from safetensors.torch import save_file

from benchmarks.trl_worker import versions

HERE = Path(__file__).parent
OUT, TINY = HERE / "rl", HERE / "trl" / "tiny"
PROMPTS, N, LONGEST, END = 4, 4, 12, 1
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss": "grpo", "kl": "k3_weighted", "kl_coef": 0.2, "off_policy": True},
    "grpo_on_policy": {"loss": "grpo", "kl": "k3", "kl_coef": 0.2},
    "grpo_corrected": {"loss": "grpo", "off_policy": True, "correction_cap": 2.0},
    "bnpo": {"loss": "bnpo", "off_policy": True},
    "dapo": {"loss": "dapo", "off_policy": True, "advantage": "batch"},
    "dr_grpo": {"loss": "dr_grpo", "off_policy": True, "advantage": "centred"},
    "gspo": {"loss": "gspo", "off_policy": True, "clip_low": 0.05, "clip_high": 0.08},
    "cispo": {"loss": "cispo", "off_policy": True, "clip_high": 1.1},
    "warm": {"loss": "grpo", "temperature": 0.7, "kl": "k3_weighted", "kl_coef": 0.1},
    "rloo": {"loss": "rloo", "advantage": "leave_one_out", "kl": "k1", "kl_coef": 0.1},
    "rloo_whitened": {"loss": "rloo", "advantage": "whitened", "kl": "k1", "kl_coef": 0.1},
    "rloo_off_policy": {"loss": "rloo", "advantage": "leave_one_out", "off_policy": True},
}
SCALES = {"group": "group", "centred": "none", "batch": "batch"}
EPSILONS = {"grpo": (0.2, 0.2), "bnpo": (0.2, 0.2), "dapo": (0.2, 0.28), "dr_grpo": (0.2, 0.2), "rloo": (0.2, 0.2)}


def make_answers(seed: int = 0) -> dict[str, Any]:
    """Answers of all lengths from 1, some without an end; one has no reward, and those to one prompt are all equal."""
    rng = np.random.default_rng(seed)
    ids = lambda n: rng.integers(3, 64, n).tolist()
    answers = [
        [ids(int(rng.integers(0, LONGEST - 1))) + ([END] if rng.random() < 0.7 else ids(1)) for _ in range(N)]
        for _ in range(PROMPTS)
    ]
    rewards: list[list[float | None]] = rng.normal(size=(PROMPTS, N)).round(3).tolist()
    rewards[1][2] = None
    rewards[3] = [0.5] * N
    noise = lambda size: [[(size * rng.normal(size=len(a))).round(4).tolist() for a in row] for row in answers]
    return {
        "prompts": [ids(int(rng.integers(2, 8))) for _ in range(PROMPTS)],
        "answers": answers,
        "rewards": rewards,
        "old_noise": noise(0.2),
        "drawn_noise": noise(0.5),
    }


def noise_of(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """What is added to a parameter of the policy to have the reference's."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return (0.05 * rng.normal(size=shape)).astype(np.float32)


def direction(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """With what a gradient is multiplied and summed."""
    return np.random.default_rng(zlib.crc32(name.encode()) + 1).normal(size=shape).astype(np.float32)


def _trainer(settings: Mapping[str, Any], given: Mapping[str, Any], scratch: str) -> Any:
    flat_answers = [answer for row in given["answers"] for answer in row]
    flat_prompts = [prompt for prompt in given["prompts"] for _ in range(N)]
    rewards = [reward for row in given["rewards"] for reward in row]
    loss, advantage = settings["loss"], settings.get("advantage", "group")
    low, high = (settings.get(f"clip_{end}") for end in ("low", "high"))
    usual = EPSILONS.get(loss, (0.2, 0.2))
    common = {
        "output_dir": scratch,
        "per_device_train_batch_size": PROMPTS * N,
        "gradient_accumulation_steps": 1,
        "num_generations": N,
        "max_completion_length": LONGEST,
        "beta": settings.get("kl_coef", 0.0),
        "epsilon": usual[0] if low is None else low,
        "epsilon_high": usual[1] if high is None else high,
        "temperature": settings.get("temperature", 1.0),
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_dropout": True,
        "gradient_checkpointing": False,
    }
    what: dict[str, Any] = {
        "model": transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32),
        "reward_funcs": lambda completions, **_: rewards,
        "processing_class": transformers.AutoTokenizer.from_pretrained(TINY, padding_side="left"),
        "train_dataset": Dataset.from_list([{"prompt": f"{i}"} for i in range(PROMPTS)]),
    }
    if loss == "rloo":
        args = trl.RLOOConfig(**common, normalize_advantages=advantage == "whitened")
        trainer = trl.RLOOTrainer(args=args, **what)
        trainer._generate = lambda prompts: (flat_prompts, flat_answers, [str(a) for a in flat_answers])
    else:
        level = "sequence" if loss == "gspo" else "token"
        name = "grpo" if loss == "gspo" else loss
        args = trl.GRPOConfig(
            **common,
            loss_type=name,
            importance_sampling_level=level,
            scale_rewards=SCALES[advantage],
            use_bias_correction_kl=settings.get("kl") == "k3_weighted",
        )
        trainer = trl.GRPOTrainer(args=args, **what)
        trainer._generate = lambda prompts: (
            flat_prompts, flat_answers, None, [str(a) for a in flat_answers], None, {}, None, [],
        )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    if trainer.ref_model is not None:
        with torch.no_grad():
            for name, p in trainer.ref_model.named_parameters():
                p += torch.tensor(noise_of(name, tuple(p.shape)))
    return trainer


def run_case(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """TRL's loss, advantages, metrics and gradients of the given answers."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(settings, given, scratch)
        model = trainer.model.train()
        inputs = trainer._generate_and_score_completions([{"prompt": "x"} for _ in range(PROMPTS * N)])
        mask = inputs["completion_mask"]

        def padded(rows: list[list[list[float]]]) -> torch.Tensor:
            out = torch.zeros(mask.shape)
            for i, values in enumerate(values for row in rows for values in row):
                out[i, : len(values)] = torch.tensor(values)
            return out

        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attended = torch.cat([inputs["prompt_mask"], mask], dim=1)
        with torch.no_grad():
            now, *_ = trainer._get_per_token_logps_and_entropies(model, ids, attended, mask.shape[1])
        old = now + padded(given["old_noise"]) if settings.get("off_policy") else now
        if settings.get("off_policy"):
            inputs["old_per_token_logps"], inputs["old_logps"] = old, (old * mask).sum(1)
        if settings.get("correction_cap"):
            drawn = old + padded(given["drawn_noise"])
            trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
            inputs["importance_sampling_ratio"] = torch.exp(old - drawn).clamp(max=settings["correction_cap"])
        model.zero_grad()
        loss = trainer._compute_loss(model, inputs)
        loss.backward()
        said = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        return {
            "loss": loss.item(),
            "advantages": inputs["advantages"].reshape(PROMPTS, N).tolist(),
            "entropy": said["entropy"],
            "clip_ratio": said.get("clip_ratio/region_mean", said.get("cispo_clip_ratio")),
            "gradients": {name: p.grad.clone() for name, p in model.named_parameters()},
        }


def summed(found: Mapping[str, Any]) -> dict[str, Any]:
    """With every gradient's norm and product with `direction` in its place."""
    out = {name: value for name, value in found.items() if name != "gradients"}
    product = lambda name, g: float((g.double().numpy() * direction(name, tuple(g.shape))).sum())
    out["gradients"] = {name: [float(g.double().norm()), product(name, g)] for name, g in found["gradients"].items()}
    return out


def main() -> None:
    OUT.mkdir(exist_ok=True)
    given = make_answers()
    (OUT / "answers.json").write_text(json.dumps(given) + "\n")
    golden: dict[str, Any] = {"versions": versions(), "cases": {}}
    for name, settings in CASES.items():
        found = run_case(copy.deepcopy(settings), given)
        golden["cases"][name] = {"settings": settings} | summed(found)
        print(f"{name:16} loss {found['loss']:+.6f} entropy {found['entropy']:.4f} clipped {found['clip_ratio']}")
        if name == "grpo":
            save_file({k: g.contiguous() for k, g in found["gradients"].items()}, OUT / "gradients.safetensors")
    (OUT / "cases.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()

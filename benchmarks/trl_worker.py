"""TRL's DPOTrainer on CPU, with dpo_jax's settings.

Needs torch, trl 1.16 and nothing of dpo_jax. `tests/golden/record_trl.py` records golden numbers with `run_trl`;
`compare.py` runs this file in TRL's own environment, over given batches and stopped at a gate before every step:

    python -m benchmarks.trl_worker --gate IN,OUT --model DIR --steps-file FILE --micro-batch 4 [--bf16] [--reward]

With `--reward` it is TRL's RewardTrainer, and DIR a classifier with one label, which `--classifier DIR` makes of a
language model in place of training.
"""

import argparse
import contextlib
import json
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset

from benchmarks.gate import Gate, read_steps

COLUMNS = ("prompt", "chosen", "rejected")
# dpo_jax's keys and their values here; TRL's and transformers' own defaults differ (linear schedule, clipping at 1).
SETTINGS = {
    "learning_rate": 1e-5,
    "lr_schedule": "constant",
    "warmup_steps": 0,
    "optimizer": "adamw",
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "dpo_beta": 0.1,
    "loss": "sigmoid",
    "label_smoothing": 0.0,
}
# TRL's names of what the workers tell, and ours.
LOGGED = {
    "loss": "dpo_loss",
    "logps/chosen": "chosen_logp",
    "logps/rejected": "rejected_logp",
    "grad_norm": "grad_norm",
}
REWARD_LOGGED = {name: name for name in ("loss", "margin", "grad_norm")}  # of a RewardTrainer
OPTIMIZERS = {"adamw": "adamw_torch", "rmsprop": "rmsprop"}


class _Records(transformers.TrainerCallback):
    """Every step's record."""

    step_has = "rewards/margins"  # and not the summary at the end
    logged = LOGGED

    def __init__(self) -> None:
        self.records: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.step_has in logs:
            self.records.append({k: v for k, v in logs.items() if isinstance(v, (int, float))})


class _Turns(_Records):
    """Stops at a gate before every step; tells what the step before logged."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def on_step_begin(self, args, state, control, **kwargs):
        last = self.records[-1] if self.records else {}
        self.gate.boundary(**{ours: last[name] for name, ours in self.logged.items() if name in last})


class _RewardTurns(_Turns):
    """The same of a RewardTrainer."""

    step_has = "margin"
    logged = REWARD_LOGGED


class _Tokenised(trl.DPOTrainer):
    """A trainer whose dataset holds token ids already, as it would make them itself."""

    def _prepare_dataset(self, dataset, *args):
        return dataset


def loss_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`loss_type` and `label_smoothing` for TRL.

    TRL 1.16 has no label smoothing for its sigmoid loss. With ε' = −ε/(1−2ε) its robust loss
    ((1−ε')·L(h) − ε'·L(−h)) / (1−2ε') is (1−ε)·L(h) + ε·L(−h), L = −log σ: what we mean by it.
    """
    smoothing = settings["label_smoothing"]
    if settings["loss"] == "sigmoid" and smoothing:
        return {"loss_type": ["robust"], "label_smoothing": -smoothing / (1 - 2 * smoothing)}
    return {"loss_type": [settings["loss"]], "label_smoothing": smoothing}


def trl_config(settings: Mapping[str, Any], scratch: str, batch_size: int, steps: int, parts: int = 1) -> trl.DPOConfig:
    """A configuration for `steps` steps of `batch_size` pairs in their order, computed in `parts`.

    `settings` says what differs from `SETTINGS`; `bf16` = autocast, parameters stay float32.
    """
    unknown = set(settings) - set(SETTINGS) - {"bf16"}
    if unknown:
        raise ValueError(f"settings {sorted(unknown)} have no counterpart here; there are {sorted(SETTINGS)}")
    s = SETTINGS | dict(settings)
    return trl.DPOConfig(**_arguments(s, scratch, batch_size, steps, parts), beta=s["dpo_beta"], **loss_arguments(s))


def reward_config(
    settings: Mapping[str, Any], scratch: str, batch_size: int, steps: int, parts: int = 1
) -> trl.RewardConfig:
    """The same of a RewardTrainer, which takes a `reward_center`, too."""
    common = _arguments(SETTINGS | dict(settings), scratch, batch_size, steps, parts)
    return trl.RewardConfig(**common, center_rewards_coefficient=settings.get("reward_center") or None)


def _arguments(s: Mapping[str, Any], scratch: str, batch_size: int, steps: int, parts: int) -> dict[str, Any]:
    """What every trainer is given."""
    return {
        "output_dir": scratch,
        "per_device_train_batch_size": batch_size // parts,
        "gradient_accumulation_steps": parts,
        "max_steps": steps,
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "optim": OPTIMIZERS[s["optimizer"]],
        "learning_rate": s["learning_rate"],
        "lr_scheduler_type": s["lr_schedule"],
        "warmup_steps": s["warmup_steps"],
        "weight_decay": s["weight_decay"],
        "max_grad_norm": s["max_grad_norm"] or 1e9,  # at 0 no norm is logged
        "bf16": s.get("bf16", False),
        "gradient_checkpointing": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def load(model: str | Path) -> tuple[Any, Any]:
    """The model in float32 and its tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tokenizer


def run_trl(
    model: str | Path, rows: Sequence[Mapping[str, Any]], batch_size: int, steps: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Train for `steps` steps of `batch_size` rows in their order.

    Args:
      model: a Hugging Face directory.
      rows: preference pairs, conversations or plain strings.
      batch_size: pairs a step.
      steps: updates; the rows are repeated as often as that needs.
      settings: as in `trl_config`.

    Returns:
      `logged` TRL's record of every step, `lengths` [prompt, chosen, rejected] in tokens of every row.
    """
    logging.getLogger("trl").setLevel(logging.ERROR)  # it warns of the negative label smoothing above
    rows = [{k: row[k] for k in COLUMNS} for row in rows]
    endless = rows * math.ceil(batch_size * steps / len(rows))
    policy, tokenizer = load(model)
    seen = _Records()
    with tempfile.TemporaryDirectory() as scratch:
        config = trl_config(settings, scratch, batch_size, steps)
        data = Dataset.from_list(endless[: batch_size * steps])
        trainer = trl.DPOTrainer(policy, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[seen])
        # trainer prints every record on standard output
        with contextlib.redirect_stdout(None):
            trainer.train()
    ids = trainer.train_dataset
    lengths = [[len(row[f"{part}_ids"]) for part in COLUMNS] for row in ids.select(range(min(len(rows), len(ids))))]
    return {"logged": seen.records, "lengths": lengths}


def run_in_turns(gate: Gate, model: str, steps: list[list[dict[str, Any]]], micro_batch: int, *, bf16: bool) -> None:
    """Train on given batches, in parts of `micro_batch` pairs; every step waits at the gate."""
    size = len(steps[0])
    policy, tokenizer = load(model)
    with tempfile.TemporaryDirectory() as scratch:
        config = trl_config({"bf16": bf16}, scratch, size, len(steps), size // micro_batch)
        data = Dataset.from_list([pair for pairs in steps for pair in pairs])
        turns = [_Turns(gate)]
        _Tokenised(policy, args=config, train_dataset=data, processing_class=tokenizer, callbacks=turns).train()


def train_reward_in_turns(gate: Gate, model: str, steps: list[list[dict[str, Any]]], micro_batch: int) -> None:
    """Train a reward model on given batches; every step waits at the gate."""
    size = len(steps[0])
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as scratch:
        config = reward_config({}, scratch, size, len(steps), size // micro_batch)
        whole = lambda pair: {f"{x}_ids": pair["prompt_ids"] + pair[f"{x}_ids"] for x in ("chosen", "rejected")}
        trl.RewardTrainer(
            model=classifier,
            args=config,
            processing_class=transformers.AutoTokenizer.from_pretrained(model),
            train_dataset=Dataset.from_list([whole(pair) for pairs in steps for pair in pairs]),
            callbacks=[_RewardTurns(gate)],
        ).train()


def make_classifier(model: str, directory: str) -> None:
    """A language model with a head of one label, drawn by transformers, as a directory."""
    torch.manual_seed(0)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=1, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    classifier.config.pad_token_id = tokenizer.pad_token_id
    classifier.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}


def read_pairs(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gate", default="")
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps-file", default="")
    parser.add_argument("--micro-batch", default=1, type=int)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--reward", action="store_true")
    parser.add_argument("--classifier", default="")
    a = parser.parse_args()
    if a.classifier:
        make_classifier(a.model, a.classifier)
        return
    if a.reward:
        train_reward_in_turns(Gate(a.gate), a.model, read_steps(a.steps_file), a.micro_batch)
        return
    run_in_turns(Gate(a.gate), a.model, read_steps(a.steps_file), a.micro_batch, bf16=a.bf16)


if __name__ == "__main__":
    main()

"""Run TRL's DPOTrainer on CPU over preference pairs in file order and write what it logged and how long each step took.

Needs torch, trl 1.16 and nothing of dpo_jax: `vs_trl.py` runs it in TRL's own environment, and
`tests/golden/record_trl.py` records golden numbers with it.

    python benchmarks/trl_worker.py --model DIR --pairs FILE.jsonl --steps 16 --batch-size 4 --out trl.json

A line of FILE.jsonl is {"prompt": [messages], "chosen": [message], "rejected": [message]}. After the last pair it goes
on with the first.
"""

import argparse
import contextlib
import json
import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset

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
OPTIMIZERS = {"adamw": "adamw_torch", "rmsprop": "rmsprop"}


class _Clock(transformers.TrainerCallback):
    """When each step ended (the first entry: when the first began), and every step's record."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.records: list[dict[str, float]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.marks:
            self.marks.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "rewards/margins" in logs:  # not the summary at the end
            self.marks.append(time.perf_counter())
            self.records.append({k: v for k, v in logs.items() if isinstance(v, (int, float))})


def loss_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`loss_type` and `label_smoothing` for TRL.

    TRL 1.16 has no label smoothing for its sigmoid loss. With ε' = −ε/(1−2ε) its robust loss
    ((1−ε')·L(h) − ε'·L(−h)) / (1−2ε') is (1−ε)·L(h) + ε·L(−h), L = −log σ: what we mean by it.
    """
    smoothing = settings["label_smoothing"]
    if settings["loss"] == "sigmoid" and smoothing:
        return {"loss_type": ["robust"], "label_smoothing": -smoothing / (1 - 2 * smoothing)}
    return {"loss_type": [settings["loss"]], "label_smoothing": smoothing}


def run_trl(
    model: str | Path, rows: Sequence[Mapping[str, Any]], batch_size: int, steps: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Train for `steps` steps of `batch_size` rows in their order.

    Args:
      model: a Hugging Face directory.
      rows: preference pairs, conversations or plain strings.
      batch_size: pairs a step.
      steps: updates; the rows are repeated as often as that needs.
      settings: what differs from `SETTINGS`; `bf16` = autocast, parameters stay float32.

    Returns:
      `logged` TRL's record of every step, `lengths` [prompt, chosen, rejected] in tokens of every row, `step_seconds`
      (from the end of the step before, data and logging included).
    """
    unknown = set(settings) - set(SETTINGS) - {"bf16"}
    if unknown:
        raise ValueError(f"settings {sorted(unknown)} have no counterpart here; there are {sorted(SETTINGS)}")
    s = SETTINGS | dict(settings)
    logging.getLogger("trl").setLevel(logging.ERROR)  # it warns of the negative label smoothing above
    rows = [{k: row[k] for k in COLUMNS} for row in rows]
    endless = rows * math.ceil(batch_size * steps / len(rows))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    policy = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    clock = _Clock()
    with tempfile.TemporaryDirectory() as scratch:
        config = trl.DPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=batch_size,
            max_steps=steps,
            train_sampling_strategy="sequential",
            max_length=None,
            beta=s["dpo_beta"],
            **loss_arguments(s),
            optim=OPTIMIZERS[s["optimizer"]],
            learning_rate=s["learning_rate"],
            lr_scheduler_type=s["lr_schedule"],
            warmup_steps=s["warmup_steps"],
            weight_decay=s["weight_decay"],
            max_grad_norm=s["max_grad_norm"] or 1e9,  # at 0 no norm is logged
            bf16=s.get("bf16", False),
            gradient_checkpointing=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        data = Dataset.from_list(endless[: batch_size * steps])
        trainer = trl.DPOTrainer(policy, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[clock])
        # trainer prints every record on standard output
        with contextlib.redirect_stdout(None):
            trainer.train()
    ids = trainer.train_dataset
    lengths = [[len(row[f"{part}_ids"]) for part in COLUMNS] for row in ids.select(range(min(len(rows), len(ids))))]
    seconds = [end - begin for begin, end in zip(clock.marks, clock.marks[1:], strict=False)]
    return {"logged": clock.records, "lengths": lengths, "step_seconds": seconds}


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}


def read_pairs(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--bf16", action="store_true")
    a = parser.parse_args()
    result = run_trl(a.model, read_pairs(a.pairs), a.batch_size, a.steps, {"bf16": a.bf16})
    Path(a.out).write_text(json.dumps(result | {"versions": versions()}))


if __name__ == "__main__":
    main()

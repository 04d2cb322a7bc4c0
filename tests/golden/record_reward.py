"""Record what TRL's RewardTrainer logs on the small model of `record_trl.py`: tests/golden/reward/.

From the repository's root, in an environment of its own:

    pip install torch==2.13.0 trl==1.16.0 safetensors jinja2
    python -m tests.golden.record_reward

The model is tests/golden/trl/tiny as a sequence classifier with a head drawn here; the pairs are those of `record_trl`
with a margin each. `tiny.json` has, by run, `settings` (dpo_jax's keys) and `steps`, TRL's own names and values;
`gradients.safetensors` has every gradient of the first step of the run `both`, by the classifier's own names.
"""

import json
import random
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from safetensors.torch import save_file

from benchmarks.trl_worker import read_pairs, reward_config, versions

HERE = Path(__file__).parent
OUT, TINY = HERE / "reward", HERE / "trl"
STEPS, BATCH = 8, 4
KEPT = ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "grad_norm", "learning_rate")
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"learning_rate": 3e-4},
    "both": {"learning_rate": 5e-5, "reward_center": 0.05, "reward_margin": "margin"},
}


class _Records(transformers.TrainerCallback):
    """Every step's record, and the gradients of the first one."""

    def __init__(self) -> None:
        self.records: list[dict[str, float]] = []
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            self.gradients = {
                name: p.grad.clone().contiguous() for name, p in model.named_parameters() if p.grad is not None
            }

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "margin" in logs:  # not the summary at the end
            self.records.append({k: float(v) for k, v in logs.items() if isinstance(v, int | float)})


def run_reward(
    model: Path, rows: Sequence[Mapping[str, Any]], batch_size: int, steps: int, settings: Mapping[str, Any]
) -> _Records:
    """Train for `steps` steps of `batch_size` rows in their order; what was logged."""
    columns = ["prompt", "chosen", "rejected", *(["margin"] if settings.get("reward_margin") else [])]
    with tempfile.TemporaryDirectory() as scratch:
        records = _Records()
        trainer = trl.RewardTrainer(
            model=transformers.AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32),
            args=reward_config(settings, scratch, batch_size, steps),
            processing_class=transformers.AutoTokenizer.from_pretrained(model),
            train_dataset=Dataset.from_list([{name: row[name] for name in columns} for row in rows]),
            callbacks=[records],
        )
        trainer.train()
    return records


def make_classifier(source: Path, directory: Path) -> None:
    """The causal model of `source` with a head of one label, wide enough for scores that differ."""
    torch.manual_seed(1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, dtype=torch.float32)
    model.score.weight.data.normal_(0, 0.2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model.config.pad_token_id = tokenizer.pad_token_id
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main() -> None:
    OUT.mkdir(exist_ok=True)
    make_classifier(TINY / "tiny", OUT / "tiny")
    rng = random.Random(0)
    rows = [row | {"margin": round(rng.uniform(0, 2), 3)} for row in read_pairs(TINY / "pairs.jsonl")]
    (OUT / "pairs.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    golden: dict[str, Any] = {"versions": versions(), "batch_size": BATCH, "runs": {}}
    for name, settings in RUNS.items():
        done = run_reward(OUT / "tiny", rows[: STEPS * BATCH], BATCH, STEPS, settings)
        steps = [{k: logged[k] for k in KEPT} for logged in done.records]
        golden["runs"][name] = {"settings": settings, "steps": steps}
        print(name, *(f"{step['loss']:.4f}" for step in steps))
        if name == "both":
            save_file(done.gradients, OUT / "gradients.safetensors")
    (OUT / "tiny.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()

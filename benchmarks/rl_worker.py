"""TRL's GRPOTrainer, stopped at a gate before every iteration: TRL's part of `rl.py`. Needs torch and trl 1.16.

python -m benchmarks.rl_worker --gate IN,OUT --model DIR --prompts-file FILE --n 8 --prompts 8 --max-tokens 128
    --micro-batch 8
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gate import Gate


def shortness(prompt: Sequence[Mapping[str, Any]], answer: str, row: Mapping[str, Any]) -> float:
    """The reward of both: fewer characters are better."""
    return -len(answer) / 100


def main() -> None:
    import torch
    import transformers
    import trl
    from datasets import Dataset

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("gate", "model", "prompts-file"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("n", "prompts", "max-tokens", "micro-batch"):
        parser.add_argument(f"--{name}", required=True, type=int)
    a = parser.parse_args()
    gate, facts = Gate(a.gate), {}
    rows = [json.loads(line) for line in Path(a.prompts_file).read_text().splitlines()]
    answers = a.prompts * a.n
    parts = answers // a.micro_batch

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gate.boundary(**facts)

    class Timed(trl.GRPOTrainer):
        def _generate(self, prompts: Any) -> Any:
            began = time.perf_counter()
            found = super()._generate(prompts)
            facts.update(sampling=time.perf_counter() - began, tokens=sum(map(len, found[1])), scoring=0.0)
            return found

    with tempfile.TemporaryDirectory() as scratch:
        args = trl.GRPOConfig(
            output_dir=scratch, per_device_train_batch_size=a.micro_batch, gradient_accumulation_steps=parts,
            steps_per_generation=parts, num_generations=a.n, max_completion_length=a.max_tokens, beta=0.0,
            loss_type="grpo", temperature=1.0, learning_rate=1e-6, lr_scheduler_type="constant", max_grad_norm=1e9,
            max_steps=len(rows) // a.prompts, shuffle_dataset=False, bf16=False, gradient_checkpointing=False,
            use_cpu=True, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        Timed(
            model=transformers.AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32),
            args=args,
            processing_class=transformers.AutoTokenizer.from_pretrained(a.model, padding_side="left"),
            reward_funcs=lambda completions, **_: [shortness((), one[0]["content"], {}) for one in completions],
            train_dataset=Dataset.from_list(rows),
            callbacks=[Turns()],
        ).train()


if __name__ == "__main__":
    main()

"""google-tunix's DPOTrainer on CPU over given batches, stopped at a gate before every step: for `compare.py`.

Needs google-tunix 0.1.7 and nothing of dpo_jax. Full-parameter DPO in float32: its Llama model with the weights of a
Hugging Face directory, AdamW at 1e-5, beta 0.1, no clipping and no decay, as the other trainers have it. Prompts are
padded on the left and completions on the right to fixed widths, the longest that the dataset has.

    python -m benchmarks.tunix_worker --gate IN,OUT --model DIR --steps-file FILE --widths P,C --micro-batch 2
"""

import argparse
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params
from tunix.sft.dpo import dpo_trainer

from benchmarks.gate import Gate, read_steps


def load(directory: str) -> Any:
    """A Llama of Hugging Face's layout in Tunix's model, float32."""
    c = json.loads((Path(directory) / "config.json").read_text())
    heads = c["num_attention_heads"]
    config = llama.ModelConfig(
        num_layers=c["num_hidden_layers"],
        vocab_size=c["vocab_size"],
        embed_dim=c["hidden_size"],
        hidden_dim=c["intermediate_size"],
        num_heads=heads,
        head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        num_kv_heads=c["num_key_value_heads"],
        rope_theta=c["rope_theta"],
        norm_eps=c["rms_norm_eps"],
        weight_tying=c["tie_word_embeddings"],
    )
    return llama_params.create_model_from_safe_tensors(directory, config, dtype=jnp.float32)


def padded(rows: list[list[int]], width: int, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask `[rows, width]`."""
    ids, mask = np.zeros((2, len(rows), width), np.int32)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def micro_batches(steps: list[Any], size: int, widths: tuple[int, int]) -> Iterator[dpo_trainer.TrainingInput]:
    """Every step's pairs in parts of `size`."""
    for pairs in steps:
        for i in range(0, len(pairs), size):
            part = pairs[i : i + size]
            columns = {}
            for name, width in (("prompt", widths[0]), ("chosen", widths[1]), ("rejected", widths[1])):
                ids, mask = padded([pair[f"{name}_ids"] for pair in part], width, left=name == "prompt")
                columns |= {f"{name}_ids": ids, f"{name}_mask": mask}
            yield dpo_trainer.TrainingInput(**columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gate", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps-file", required=True)
    parser.add_argument("--widths", required=True, help="tokens of a prompt and of a completion")
    parser.add_argument("--micro-batch", required=True, type=int)
    a = parser.parse_args()
    gate = Gate(a.gate)
    steps = read_steps(a.steps_file)
    accumulated = len(steps[0]) // a.micro_batch
    prompt, completion = (int(x) for x in a.widths.split(","))
    # The model of 0.1.7 does not hand the config's rope_theta on, so its default would be used for every model.
    theta = json.loads((Path(a.model) / "config.json").read_text())["rope_theta"]
    llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=theta)
    model = load(a.model)
    trainer = dpo_trainer.DPOTrainer(
        model=model,
        ref_model=load(a.model),
        optimizer=optax.adamw(1e-5, weight_decay=0.0),
        training_config=dpo_trainer.DPOTrainingConfig(
            eval_every_n_steps=10**6,
            max_steps=len(steps),
            gradient_accumulation_steps=accumulated if accumulated > 1 else None,
            beta=0.1,
        ),
    )

    def gated() -> Iterator[dpo_trainer.TrainingInput]:
        facts: dict[str, float] = {}
        for number, part in enumerate(micro_batches(steps, a.micro_batch, (prompt, completion))):
            if number % accumulated == 0:
                jax.block_until_ready(nnx.state(model))
                buffered = trainer._prev_buffered_train_metrics  # of the step that is over; logged one step late
                if buffered is not None:
                    logps = {
                        name: buffered.additional_metrics[f"log_probs/{name}"][0] for name in ("chosen", "rejected")
                    }
                    facts = {f"{name}_logp": float(np.mean(x)) for name, x in logps.items()}
                    facts["dpo_loss"] = float(buffered.loss)
                gate.boundary(**facts)
            yield part

    trainer.train(gated())


if __name__ == "__main__":
    main()

"""Record what TRL's DPOTrainer logs on small models: tests/golden/trl/{tiny,stories260k}.json.

From the repository's root, in an environment of its own:

    pip install torch==2.13.0 trl==1.16.0 safetensors jinja2 sentencepiece protobuf
    python -m tests.golden.record_trl                    # tiny: what every clone can compare with
    python -m tests.golden.record_trl ../shared          # stories260k: model and pairs lie there, only numbers here

`tiny` is a random Llama (untied, grouped queries) with a byte-level tokenizer and a chat template, made here; its pairs
are tests/golden/trl/pairs.jsonl. stories260k has no chat template, so its pairs take HH's plain form, as `plain` writes
it; TRL itself appends the end of sequence.

A golden file holds, by run: `settings` (dpo_jax's keys; the rest as in `benchmarks/trl_worker.py: SETTINGS`) and
`steps`, TRL's own names and values. Also `lengths`: tokens of prompt, chosen and rejected of every pair.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from benchmarks.trl_worker import read_pairs, run_trl, versions

OUT = Path(__file__).parent / "trl"
STEPS, BATCH = 8, 4
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
SPEAKERS = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
KEPT = (
    "loss", "grad_norm", "learning_rate", "logps/chosen", "logps/rejected",
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
)  # fmt: skip
# Learning rates at which loss and rewards of the small models move in eight steps.
TINY_RUNS: dict[str, dict[str, Any]] = {
    "dpo": {"learning_rate": 1e-3},
    "smoothed": {"learning_rate": 1e-3, "label_smoothing": 0.1},
    "robust": {"learning_rate": 1e-3, "loss": "robust", "label_smoothing": 0.1},
    "hinge": {"learning_rate": 1e-3, "loss": "hinge", "dpo_beta": 0.5},
    "cosine": {
        "learning_rate": 2e-3, "lr_schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.5, "max_grad_norm": 2.0,
    },
    "rmsprop": {
        "learning_rate": 2e-4, "optimizer": "rmsprop", "lr_schedule": "linear", "warmup_steps": 2, "max_grad_norm": 2.0,
    },
}  # fmt: skip
STORIES_RUNS: dict[str, dict[str, Any]] = {"dpo": {"learning_rate": 1e-4}}


def make_tiny(directory: Path, rows: list[dict[str, Any]]) -> None:
    """A tokenizer trained on the pairs and a random model, in one Hugging Face directory."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [m["content"] for row in rows for part in ("prompt", "chosen", "rejected") for m in row[part]]
    backend.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>", additional_special_tokens=SPECIAL[2:]
    )
    tokenizer.chat_template = TEMPLATE
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        # Ten times wider than usual, so that positions and heads matter to the numbers.
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for name, value in model.named_parameters():
        if name.endswith("norm.weight"):
            value.data.uniform_(0.5, 1.5)
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def plain(row: dict[str, Any]) -> dict[str, str]:
    """A conversation as HH's transcript: the prompt ends with the assistant's turn, an answer begins with a space."""
    prompt = "".join(SPEAKERS[m["role"]] + m["content"] for m in row["prompt"]) + "\n\nAssistant:"
    return {"prompt": prompt} | {part: " " + row[part][0]["content"] for part in ("chosen", "rejected")}


def record(name: str, model: Path, rows: list[dict[str, Any]], runs: dict[str, dict[str, Any]]) -> None:
    """Run TRL with every setting and write the golden file."""
    golden: dict[str, Any] = {"versions": versions(), "batch_size": BATCH, "runs": {}}
    for run, settings in runs.items():
        result = run_trl(model, rows, BATCH, STEPS, settings)
        golden["lengths"] = result["lengths"]
        steps = [{k: logged[k] for k in KEPT} for logged in result["logged"]]
        golden["runs"][run] = {"settings": settings, "steps": steps}
        print(name, run, *(f"{step['loss']:.4f}" for step in steps))
    lengths = golden.pop("lengths")
    text = json.dumps(golden, indent=1)[:-2] + f',\n "lengths": {json.dumps(lengths)}\n}}\n'
    (OUT / f"{name}.json").write_text(text)


def main() -> None:
    if len(sys.argv) > 1:
        shared = Path(sys.argv[1])
        rows = [plain(row) for row in read_pairs(shared / "data" / "trl" / "pairs.jsonl")]
        record("stories260k", shared / "data" / "stories260k", rows[: STEPS * BATCH], STORIES_RUNS)
        return
    rows = read_pairs(OUT / "pairs.jsonl")
    make_tiny(OUT / "tiny", rows)
    record("tiny", OUT / "tiny", rows, TINY_RUNS)


if __name__ == "__main__":
    main()

"""The model that is made from scratch: no download, a few million parameters, its own tokenizer and dialogues."""

import gzip
import json
from pathlib import Path

from dpo_jax.data import synthetic
from dpo_jax.model.config import ModelConfig

VOCAB_SIZE = 1024
TRAIN_PAIRS, TEST_PAIRS = 8000, 512
TOKENIZER_ROWS = 2000


def write_dialogues(directory: Path, seed: int) -> Path:
    """Write a seed's synthetic dialogues in HH's hub layout below `directory`, unless they are there."""
    directory = directory / f"synthetic-{seed}"
    if not (directory / "synthetic" / "test.jsonl.gz").exists():  # the last file written
        synthetic.write_hh(directory, seed, TRAIN_PAIRS, TEST_PAIRS)
    return directory


def write_tokenizer(directory: Path, dialogues: Path) -> Path:
    """Train the tokenizer on the training dialogues, unless it is there; returns its directory."""
    if not (directory / "tokenizer_config.json").exists():  # the last file written
        with gzip.open(dialogues / "synthetic" / "train.jsonl.gz", "rt", encoding="utf-8") as f:
            rows = [json.loads(line) for _, line in zip(range(TOKENIZER_ROWS), f, strict=False)]
        synthetic.train_tokenizer((row[side] for row in rows for side in ("chosen", "rejected")), directory, VOCAB_SIZE)
    return directory


def model_config(vocab_size: int) -> ModelConfig:
    """A Llama of 2 million parameters."""
    return ModelConfig(
        model_type="llama",
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        tie_word_embeddings=True,
        # 1 / sqrt(hidden_size): with the 0.02 of wide models a narrow one takes several times as many updates to
        # learn to copy a word from its prompt.
        initializer_range=0.07,
    )

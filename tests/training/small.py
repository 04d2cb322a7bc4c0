"""Whole runs in seconds, on the golden model and its pairs; and their records, to be compared."""

from dpo_jax import get_config
from dpo_jax.records.records import read_records
from tests import places

GOLDEN = places.GOLDEN / "trl"
MODEL = str(GOLDEN / "tiny")
CLOCK = ("pairs_per_second", "step_seconds", "memory_gb", "tokens_per_second", "sampling_seconds", "judging_seconds")
SMALL = {
    "model": MODEL, "dataset": str(GOLDEN / "pairs.jsonl"), "batch_size": 8, "eval_pairs": 8, "kl_prompts": 4,
    "sample_prompts": 0, "sample_tokens": 8, "learning_rate": 1e-2, "warmup_steps": 0.0, "max_prompt_length": 64,
    "max_completion_length": 8, "checkpoint_every": 1, "log_every": 1, "attention": "dense",
}  # fmt: skip


def small_config(tmp_path, settings):
    """A config of `SMALL` with these settings, whose cache is in the test's directory."""
    c = get_config()
    c.update(SMALL | {"cache_dir": str(tmp_path / "cache")} | settings)
    return c


def values(workdir):
    """The records of a run without what a clock or the machine decides."""
    records = read_records(workdir / "metrics.jsonl")
    return [{key: v for key, v in r.items() if key not in CLOCK} for r in records]


class StopError(Exception):
    """What tests raise to stop a run somewhere."""

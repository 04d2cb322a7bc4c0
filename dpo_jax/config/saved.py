"""A run's config.json, read tolerantly: runs of other versions lack keys, and have keys that are unknown here."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What a reader needs to train a model like it, where it is set at all.
_RECIPE = """
    loss dpo_beta label_smoothing f_divergence wpo ld_alpha learning_rate lr_schedule warmup_steps optimizer
    weight_decay max_grad_norm batch_size num_epochs sft_steps sft_learning_rate lora_rank lora_alpha lora_targets
    max_prompt_length max_completion_length overlong prompt_format param_dtype seed
""".split()
_OFF = (0, 0.0, "", False, None)


@dataclass(frozen=True)
class SavedConfig:
    """What a saved config holds; what it does not hold is empty, or 0.

    Attributes:
      table: every key with its value, for display.
      recipe: the keys that make the model, those that are off left out.
      words: by topic, what is set, in words: {"Batch": ["64 pairs", "4 microbatches"]}.
    """

    model: str
    dataset: str
    loss: str
    steps: int
    sft_steps: int
    lora: bool
    table: Mapping[str, Any]
    recipe: list[tuple[str, Any]]
    words: Mapping[str, list[str]]

    @property
    def is_dpo(self) -> bool:
        """Whether the run minimised DPO's own loss: what is said of ln 2 and of rewards holds for it."""
        return self.loss in ("", "sigmoid")

    @property
    def title(self) -> tuple[str, str]:
        """The last names of model and data set: of a path on somebody's machine, enough."""
        return Path(self.model).name, Path(self.dataset).name


def saved_config(table: Mapping[str, Any]) -> SavedConfig:
    """A config.json's object, see `SavedConfig`."""
    get = table.get
    return SavedConfig(
        model=str(get("model") or ""),
        dataset=str(get("dataset") or ""),
        loss=str(get("loss") or ""),
        steps=_whole(get("num_steps")),
        sft_steps=_whole(get("sft_steps")),
        lora=bool(get("lora_rank")),
        table=table,
        recipe=[(key, table[key]) for key in _RECIPE if get(key) not in _OFF],
        words={topic: [part for part in parts if part] for topic, parts in _words(table).items()},
    )


def differing_keys(tables: list[Mapping[str, Any]]) -> list[str]:
    """The keys in which saved configs differ."""
    keys = dict.fromkeys(key for table in tables for key in table)
    return [key for key in keys if len({json.dumps(table.get(key)) for table in tables}) > 1]


def _words(table: Mapping[str, Any]) -> dict[str, list[str]]:
    get = table.get

    def say(form: str, key: str) -> str:
        return form.format(get(key)) if get(key) else ""

    return {
        "Reference": [say("{}", "reference") or ("the policy as DPO found it" if "reference" in table else "")],
        "Loss": [say("{}", "loss"), say("β {}", "dpo_beta"), say("label smoothing {}", "label_smoothing")],
        "Learning rate": [say("{}", "learning_rate"), say("{}", "lr_schedule"), warm_up(get("warmup_steps"))],
        "Optimizer": [say("{}", "optimizer"), say("decay {}", "weight_decay"), say("clip at {}", "max_grad_norm")],
        "Batch": [
            say("{} pairs", "batch_size"),
            say("{} microbatches", "microbatches") if get("microbatches") != 1 else "",
        ],
        "SFT first": [say("{} steps", "sft_steps"), say("{}", "sft_learning_rate")] if get("sft_steps") else [],
        "Trained": [say("LoRA of rank {}", "lora_rank") or ("all parameters" if "lora_rank" in table else "")],
        "Precision": [say("{} parameters", "param_dtype")],
        "Compute": [say("{} compute", "compute_dtype")],
        "Longest, in tokens": [say("prompt {}", "max_prompt_length"), say("completion {}", "max_completion_length")],
        "Mesh": [say("data {}", "mesh_data"), say("fsdp {}", "mesh_fsdp"), say("tensor {}", "mesh_tensor")],
    }


def warm_up(steps: float | None) -> str:
    """The warm-up in words: below 1 it is a fraction.

    >>> warm_up(0.1), warm_up(20), warm_up(0)
    ('10% warm-up', '20 warm-up steps', '')
    """
    if not isinstance(steps, int | float) or not steps:
        return ""
    return f"{steps:.0%} warm-up" if steps < 1 else f"{steps:g} warm-up steps"


def _whole(value: object) -> int:
    return int(value) if isinstance(value, int | float) else 0

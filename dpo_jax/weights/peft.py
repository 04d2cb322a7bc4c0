"""Adapters as a directory that PEFT loads: adapter_config.json and adapter_model.safetensors.

Letters: D inputs of a Linear, O its outputs, r rank.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np
from safetensors.numpy import save_file

from dpo_jax.model.config import ModelConfig, Params
from dpo_jax.model.lora import BRANCH, Lora, adapted
from dpo_jax.model.tensors import Parts, sizes, tensors
from dpo_jax.weights.huggingface import gather_to_host, new_directory

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_adapters(adapters: Params, config: ModelConfig, lora: Lora, directory: Path, *, base: str) -> None:
    """Write a directory for `peft.PeftModel.from_pretrained`; whole or not at all. Every process must call it.

    Args:
      adapters: `{"lora": ...}`, see `lora.py`.
      config, lora: of the model.
      directory: the new directory.
      base: what PEFT loads the base model from: a Hugging Face id or a directory.

    Raises:
      UserError: the directory cannot be written.
    """
    flat = {path: gather_to_host(leaf) for path, leaf in flax.traverse_util.flatten_dict(adapters[BRANCH]).items()}
    with new_directory(directory) as new:
        if new:
            save_file(dict(_tensors(flat, config, lora)), new / WEIGHTS, metadata={"format": "pt"})
            numbers = json.dumps(adapter_config(config, lora, base), indent=2)
            (new / CONFIG).write_text(numbers + "\n", encoding="utf-8")


def adapter_config(config: ModelConfig, lora: Lora, base: str) -> dict[str, Any]:
    """What adapter_config.json holds; keys that are not there have PEFT's defaults."""
    ranks = {module.rpartition(".")[2]: len(mine) * lora.rank for module, _, mine in _linears(config, lora)}
    # Where several adapters share one Linear its rank is larger, and its alpha such that the scale is the same.
    wider = {name: rank for name, rank in ranks.items() if rank != lora.rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(ranks),
        "rank_pattern": wider,
        "alpha_pattern": {name: lora.scale * (math.sqrt(r) if lora.rslora else r) for name, r in wider.items()},
    }


def _linears(config: ModelConfig, lora: Lora) -> Iterator[tuple[str, Parts, Parts]]:
    """Every Linear with an adapter: its name, all of our projections that it holds, and those that are adapted."""
    kernels = adapted(config, lora)
    for name, parts in tensors(config).items():
        if mine := [part for part in parts if part[0] in kernels]:
            yield name.removesuffix(".weight"), parts, mine


def _tensors(flat: dict[tuple[str, ...], np.ndarray], config: ModelConfig, lora: Lora) -> Iterator[tuple[str, Any]]:
    """PEFT's tensors: A `[r, D]` and B `[O, r]` of every Linear.

    Where a Linear holds several of our projections one below the other, so are their A, and their B are the blocks of
    a diagonal; outputs without an adapter have rows of zeros in B.
    """
    letters = sizes(config)
    for module, parts, mine in _linears(config, lora):
        outputs = [leaf.tensor_shape(letters)[0] for leaf, _ in parts]
        a_rD: list[np.ndarray] = []
        b_Or = np.zeros((sum(outputs), lora.rank * len(mine)), next(iter(flat.values())).dtype)
        row = 0
        for (leaf, index), rows in zip(parts, outputs, strict=True):
            if (leaf, index) in mine:
                a, b = (flat[(*leaf.path, ab)][index] for ab in "ab")
                column = lora.rank * len(a_rD)
                a_rD.append(a.reshape(-1, lora.rank).T)
                b_Or[row : row + rows, column : column + lora.rank] = b.reshape(lora.rank, rows).T
            row += rows
        yield f"{PREFIX}{module}.lora_A.weight", np.ascontiguousarray(np.concatenate(a_rD))
        yield f"{PREFIX}{module}.lora_B.weight", b_Or

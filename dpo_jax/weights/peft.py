"""Adapters as a directory that PEFT loads: adapter_config.json and adapter_model.safetensors.

Letters: D inputs of a Linear, O its outputs, r rank.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np
from safetensors.numpy import save_file

from dpo_jax.disk import read_json
from dpo_jax.model.config import ModelConfig, Params
from dpo_jax.model.lora import BRANCH, Lora, adapted
from dpo_jax.model.tensors import SCORE, Parts, sizes, tensors
from dpo_jax.weights.hub import ADAPTER_CONFIG as CONFIG
from dpo_jax.weights.hub import ADAPTER_WEIGHTS as WEIGHTS
from dpo_jax.weights.huggingface import gather_to_host, new_directory
from dpo_jax.weights.merged import PREFIX, Adapter, read_adapter


def save_adapters(
    adapters: Params, config: ModelConfig, lora: Lora, directory: Path, *, base: str, under: Path | None = None
) -> None:
    """Write a directory for `peft.PeftModel.from_pretrained`; whole or not at all. Every process must call it.

    Args:
      adapters: `{"lora": ...}`, see `lora.py`; of a reward model with its head, which PEFT saves whole.
      config, lora: of the model.
      directory: the new directory.
      base: what PEFT loads the base model from: a Hugging Face id or a directory.
      under: a PEFT directory whose adapters were merged into the base before these were trained; what is written holds
        both, for the base without either, which that directory names.

    Raises:
      UserError: the directory cannot be written.
    """
    flat = {path: gather_to_host(leaf) for path, leaf in flax.traverse_util.flatten_dict(adapters[BRANCH]).items()}
    head = gather_to_host(adapters["score"]) if config.scalar_head else None
    with new_directory(directory) as new, contextlib.ExitStack() as files:
        if new:
            tensors, numbers = dict(_tensors(flat, config, lora)), adapter_config(config, lora, base)
            if under is not None:
                said = read_json(under / CONFIG)
                numbers["base_model_name_or_path"] = said["base_model_name_or_path"]
                tensors, more = _together(tensors, read_adapter(under, files), config, lora)
                numbers |= more
            if head is not None:
                tensors[PREFIX + SCORE.name] = head
                whole = {*numbers.get("modules_to_save", ()), SCORE.name.removesuffix(".weight")}
                numbers |= {"task_type": "SEQ_CLS", "modules_to_save": sorted(whole)}
            save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
            (new / CONFIG).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def _together(
    mine: dict[str, np.ndarray], theirs: Adapter, config: ModelConfig, lora: Lora
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Adapters and those merged under them as one, whose ranks add up; and what adapter_config.json says of it.

    Linears of one name have one rank, as patterns name them: where one has less, zeros fill A and B.
    """
    both: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {}
    for module in (name.removesuffix(".weight") for name in tensors(config)):
        a_rD, b_Or = (mine.get(f"{PREFIX}{module}.lora_{x}.weight") for x in "AB")
        parts = [] if a_rD is None or b_Or is None else [(a_rD, b_Or)]
        if module in theirs.pairs:
            a_rD, b_Or, scale = theirs.pairs[module]
            parts.append((a_rD, b_Or * np.float32(scale / lora.scale)))
        if parts:
            both[module] = ([a for a, _ in parts], [b for _, b in parts])
    ranks: dict[str, int] = {}
    for module, (a_parts, _) in both.items():
        last = module.rpartition(".")[2]
        ranks[last] = max(ranks.get(last, 0), sum(len(a) for a in a_parts))
    out: dict[str, np.ndarray] = {}
    for module, (a_parts, b_parts) in both.items():
        a_rD, b_Or = np.concatenate(a_parts), np.concatenate(b_parts, axis=1)
        lacking = ranks[module.rpartition(".")[2]] - len(a_rD)
        out[f"{PREFIX}{module}.lora_A.weight"] = np.pad(a_rD, ((0, lacking), (0, 0)))
        out[f"{PREFIX}{module}.lora_B.weight"] = np.pad(b_Or, ((0, 0), (0, lacking)))
    out |= {PREFIX + name: np.asarray(tensor[:]) for name, tensor in theirs.whole.items()}
    trained_whole = sorted({name.split(".")[-2] for name in theirs.whole})
    return out, _patterns(ranks, lora) | ({"modules_to_save": trained_whole} if trained_whole else {})


def adapter_config(config: ModelConfig, lora: Lora, base: str) -> dict[str, Any]:
    """What adapter_config.json holds; keys that are not there have PEFT's defaults."""
    ranks = {module.rpartition(".")[2]: len(mine) * lora.rank for module, _, mine in _linears(config, lora)}
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
    } | _patterns(ranks, lora)


def _patterns(ranks: Mapping[str, int], lora: Lora) -> dict[str, Any]:
    """Which Linears have adapters, of which rank; where it is another one, their alpha keeps the scale the same.

    Several adapters share one Linear where it holds several of our projections.
    """
    others = {name: rank for name, rank in ranks.items() if rank != lora.rank}
    return {
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": {name: lora.scale * (math.sqrt(r) if lora.rslora else r) for name, r in others.items()},
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

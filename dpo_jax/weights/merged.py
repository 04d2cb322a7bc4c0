"""Adapters in PEFT's layout, merged into the base's tensors as those are read: W + scale·B·A, part by part.

Letters: D inputs of a Linear, O its outputs, r rank.
"""

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import regex

from dpo_jax.errors import UserError
from dpo_jax.weights.hub import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from dpo_jax.weights.model_files import FLOATS, AdapterFile, open_safetensors, read_model_json

PREFIX = "base_model.model."
# Keys of adapter_config.json that say how it was trained or made, where the merge needs none of it.
_OF_TRAINING = """
    auto_mapping base_model_name_or_path eva_config exclude_modules fan_in_fan_out inference_mode layers_pattern
    layers_to_transform lora_dropout megatron_config megatron_core peft_version qalora_group_size revision
    runtime_config target_modules task_type
""".split()
_USED = "alpha_pattern bias init_lora_weights lora_alpha modules_to_save peft_type r rank_pattern use_rslora".split()
_PATTERN_SECONDS = 1.0  # for a name of some sixty letters
# Other beginnings (pissa, olora, corda, loftq, ...) take their first adapters out of the base: it is another one then.
_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """What adapter_config.json says: rank and alpha, of single modules by patterns, and what they are divided by."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool

    def of(self, module: str) -> tuple[int, float]:
        """Rank and scale of a module; the first pattern counts that its name ends with, as in PEFT."""
        rank = _by_pattern(self.ranks, module, self.rank)
        alpha = _by_pattern(self.alphas, module, self.alpha)
        return int(rank), alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclasses.dataclass(frozen=True)
class _Merged:
    """A slice of a safetensors file with an adapter on it: what is indexed is read, and A and B of just that part."""

    base: Any
    a_rD: np.ndarray  # noqa: N815 (rank and inputs)
    b_Or: np.ndarray  # noqa: N815 (outputs and rank)
    scale: float

    def get_shape(self) -> list[int]:
        return self.base.get_shape()

    def get_dtype(self) -> str:
        return self.base.get_dtype()

    def __getitem__(self, part: Any) -> np.ndarray:
        rows, columns = (*(part if isinstance(part, tuple) else (part,)), slice(None))[:2]
        return self.base[part].astype(np.float32) + self.scale * (self.b_Or[rows] @ self.a_rD[:, columns])


def merge_adapter(
    stored: dict[str, Any], adapter: Path, files: contextlib.ExitStack, *, tied: bool, head: str = ""
) -> dict[str, Any]:
    """The tensors of a base by name, those of an adapter merged into them.

    Args:
      stored: the base's tensors as safetensors slices.
      adapter: a PEFT directory.
      files: keeps the adapter's file open.
      tied: whether the base's table is its head too.
      head: a tensor that the adapter may have and the base not: a reward model's head is trained with its adapters.

    Raises:
      UserError: what the adapter is cannot be computed exactly, or it is not one of this base; with the key or tensor.
    """
    held, where = read_adapter(adapter, files), adapter / ADAPTER_WEIGHTS
    out = dict(stored)
    for name, tensor in held.whole.items():
        if name not in stored and name != head:
            raise UserError(
                f"{where}: tensor {PREFIX + name!r} has no place in the base; is it an adapter of that model?"
            )
        if tied and name in ("model.embed_tokens.weight", "lm_head.weight"):
            raise UserError(f"{where}: tensor {PREFIX + name!r} unties the base's embeddings, which is not supported")
        out[name] = tensor
    for module, (a_rD, b_Or, scale) in held.pairs.items():
        name = f"{module}.weight"
        if name not in stored or (tied and name == "lm_head.weight"):
            raise UserError(f"{where}: the adapter of {module!r} has no place in the base; is it one of that model?")
        outputs, inputs = (*stored[name].get_shape(), 0, 0)[:2]
        if len(stored[name].get_shape()) != 2 or (b_Or.shape[0], a_rD.shape[1]) != (outputs, inputs):
            raise UserError(
                f"{where}: the adapter of {module!r} is for {a_rD.shape[1]} inputs and {b_Or.shape[0]} outputs; the "
                f"base has {inputs} and {outputs}"
            )
        out[name] = _Merged(out[name], a_rD, b_Or, scale)
    return out


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a PEFT directory holds: by module A `[r, D]`, B `[O, r]` and their scale, and tensors trained as a whole."""

    pairs: Mapping[str, tuple[np.ndarray, np.ndarray, float]]
    whole: Mapping[str, Any]


def read_adapter(directory: Path, files: contextlib.ExitStack) -> Adapter:
    """Read a PEFT directory; `files` keeps the tensors' file open. Names are those of the base's tensors.

    Raises:
      UserError: it is damaged, or what it is cannot be computed exactly; with the key or tensor.
    """
    numbers, where = _numbers(directory / ADAPTER_CONFIG), directory / ADAPTER_WEIGHTS
    try:
        file = open_safetensors(where, files)
    except FileNotFoundError:
        raise UserError(f"{directory}: no {ADAPTER_WEIGHTS}; only safetensors are read, not .bin files") from None
    keys, whole = dict[str, dict[str, str]](), dict[str, Any]()
    for key in file.keys():  # noqa: SIM118 (not a dict)
        name = key.removeprefix(PREFIX).replace(".modules_to_save.", ".")
        module, _, kind = name.rpartition(".lora_")
        if kind in ("A.weight", "B.weight"):
            keys.setdefault(module, {})[kind[0]] = key
        elif "lora_" in name or not key.startswith(PREFIX):
            raise UserError(f"{where}: tensor {key!r} is not supported; merge the adapter with PEFT itself")
        else:
            whole[name] = file.get_slice(key)
    pairs = {}
    for module, of in keys.items():
        if len(of) < 2:
            raise UserError(f"{where}: tensor {next(iter(of.values()))!r} has no partner; download it again")
        rank, scale = numbers.of(module)
        for key in of.values():
            if (kind := file.get_slice(key).get_dtype()) not in FLOATS.values():
                raise UserError(f"{where}: tensor {key!a} is {kind}, needs one of {', '.join(FLOATS)}")
        a_rD, b_Or = (np.asarray(file.get_tensor(of[x]), np.float32) for x in "AB")
        if a_rD.ndim != 2 or b_Or.ndim != 2 or (a_rD.shape[0], b_Or.shape[1]) != (rank, rank):
            raise UserError(
                f"{where}: the adapter of {module!r} has A {a_rD.shape} and B {b_Or.shape}; {ADAPTER_CONFIG} says "
                f"rank {rank}"
            )
        pairs[module] = (a_rD, b_Or, scale)
    return Adapter(pairs, whole)


def _numbers(path: Path) -> _Numbers:
    peft = read_model_json(path, AdapterFile)
    if peft.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type={peft.get('peft_type')!r} is not supported; supported: 'LORA'")
    if peft.get("bias", "none") not in ("none", None):
        raise UserError(f"{path}: bias={peft['bias']!r} is not supported; supported: 'none'")
    if peft.get("init_lora_weights", True) not in _BEGINNINGS:
        raise UserError(
            f"{path}: init_lora_weights={peft['init_lora_weights']!r} changes the base, which is not supported"
        )
    others = [key for key, value in peft.items() if value and key not in (*_USED, *_OF_TRAINING)]
    if others:
        raise UserError(f"{path}: {others[0]}={peft[others[0]]!r} is not supported; merge the adapter with PEFT itself")
    ranks, alphas = (dict(peft.get(f"{x}_pattern") or {}) for x in ("rank", "alpha"))
    for pattern in (*ranks, *alphas):
        _by_pattern({pattern: 0}, "model.layers.0.self_attn.q_proj", 0, path)
    rank, alpha = peft.get("r", 8), float(peft.get("lora_alpha", 8))
    return _Numbers(int(rank), alpha, {k: int(v) for k, v in ranks.items()}, alphas, bool(peft.get("use_rslora")))


def _by_pattern(patterns: Mapping[str, Any], module: str, otherwise: Any, where: Path | None = None) -> Any:
    """The value of the first pattern that a module's name ends with.

    Raises:
      UserError: one is no regular expression, or takes for ever.
    """
    for pattern, value in patterns.items():
        try:
            if regex.match(rf"(.*\.)?({pattern})$", module, timeout=_PATTERN_SECONDS):
                return value
        except (regex.error, TimeoutError) as error:
            words = "takes for ever" if isinstance(error, TimeoutError) else f"is no regular expression ({error})"
            raise UserError(f"{where or ADAPTER_CONFIG}: the pattern {pattern[:60]!a} {words}; mend it") from None
    return otherwise

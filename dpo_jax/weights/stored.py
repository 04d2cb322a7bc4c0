"""The tensors that a model's directory holds: opened, and compared with what its numbers need, before any is read."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.errors import UserError
from dpo_jax.model.config import ModelConfig
from dpo_jax.model.tensors import LM_HEAD, SCORE, Leaf, model_leaves, sizes, tensors, whole_shape
from dpo_jax.weights.hub import CONFIG, INDEX, WEIGHTS
from dpo_jax.weights.merged import merge_adapter
from dpo_jax.weights.model_files import FLOATS, MEND, Index, open_safetensors, read_model_json

# Buffers that old exports hold and that follow from config.json.
HARMLESS_SUFFIXES = (".rotary_emb.inv_freq",)
# Names of a reward model's head, transformers' own first: the others are of other trainers.
HEAD_NAMES = (
    "score.weight", "v_head.summary.weight", "v_head.weight", "value_head.weight", "reward_head.weight",
    "regression_head.weight",
)  # fmt: skip
PIECE_BYTES = 256e6  # of a vocabulary table gathered at once


def check_weights(directory: Path, config: ModelConfig, *, adapter: Path | None = None, head: str = "") -> None:
    """Refuse weights that are not those of `config`, by their files' headers: no tensor of the base is read.

    Args: as for `load_weights`.

    Raises:
      UserError: a missing or damaged file; a missing, unknown or wrongly shaped tensor.
    """
    with contextlib.ExitStack() as files:
        checked_tensors(directory, config, adapter, head, files)


def checked_tensors(
    directory: Path, config: ModelConfig, adapter: Path | None, head: str, files: contextlib.ExitStack
) -> tuple[dict[str, Any], list[Leaf]]:
    """The tensors of a model by name, all of them there and none else, and the leaves that they fill.

    Args: as for `load_weights`; `files` keeps them open.

    Raises:
      UserError: as `check_weights`.
    """
    stored = open_tensors(directory, files)
    held = sum(math.prod(tensor.get_shape()) for tensor in stored.values())
    needed = config.parameter_count()
    # Before names and shapes are listed: absurd numbers make lists without an end.
    if needed > 2 * held + (1 << 20):
        raise UserError(
            f"{directory / CONFIG}: its numbers make a model of {needed:,} parameters, and the weights beside it hold "
            f"{held:,}; {MEND}"
        )
    if config.scalar_head:
        stored.pop(LM_HEAD.name, None)  # of the causal model that it is made of
        stored |= {SCORE.name: stored.pop(head)} if head in stored else {}
    if adapter is not None:
        new = SCORE.name if config.scalar_head else ""
        stored = merge_adapter(stored, adapter, files, tied=config.tie_word_embeddings, head=new)
    leaves = [leaf for leaf in model_leaves(config) if leaf != SCORE or head]
    _check_tensors(directory, stored, config, leaves)
    return stored, leaves


def open_tensors(directory: Path, files: contextlib.ExitStack) -> dict[str, Any]:
    """Every tensor by name, as a safetensors slice: nothing is read until it is indexed.

    Raises:
      UserError: a file is missing or damaged, or the index names one that is not beside it.
    """
    names = [WEIGHTS]
    if not (directory / WEIGHTS).is_file():
        if not (directory / INDEX).is_file():
            raise UserError(f"{directory}: no {WEIGHTS} and no {INDEX}; only safetensors are read, not .bin files")
        names = sorted(set(read_model_json(directory / INDEX, Index)["weight_map"].values()))
    stored: dict[str, Any] = {}
    for name in names:
        try:
            file = open_safetensors(directory / name, files)
        except FileNotFoundError:
            raise UserError(f"{directory}: {INDEX} names {name}, which is not there; download it again") from None
        stored |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    return stored


def _check_tensors(directory: Path, stored: Mapping[str, Any], config: ModelConfig, leaves: Sequence[Leaf]) -> None:
    """Every tensor is there with its shape, and nothing else is: said before anything is read."""
    letters = sizes(config)
    held = {name: parts for name, parts in tensors(config).items() if any(leaf in leaves for leaf, _ in parts)}
    needed = {name: whole_shape(parts, letters) for name, parts in held.items()}
    missing = [name for name in needed if name not in stored]
    if missing:
        raise UserError(
            f"{directory}: tensor {missing[0]!r} of shape {needed[missing[0]]} is missing{_more(missing)}; "
            f"are these the weights of its {CONFIG}?"
        )
    for name, shape in needed.items():
        has, kind = tuple(stored[name].get_shape()), stored[name].get_dtype()
        if has != shape:
            raise UserError(f"{directory}: tensor {name!r} has shape {has}, {CONFIG} needs {shape}")
        if kind not in FLOATS.values():
            raise UserError(
                f"{directory}: tensor {name!r} is {kind}, needs one of {', '.join(FLOATS)}; quantized checkpoints are "
                "not supported"
            )
    extra = [name for name in stored if name not in needed and not name.endswith(HARMLESS_SUFFIXES)]
    if config.scalar_head:  # said by `heads.find_head`
        extra = [name for name in extra if f"{name.removesuffix('bias')}weight" not in HEAD_NAMES]
    if config.tie_word_embeddings and LM_HEAD.name in extra:  # whether it is the same table, `check_tied` reads
        extra.remove(LM_HEAD.name)
    if extra:
        raise UserError(
            f"{directory}: tensor {extra[0]!r} of shape {tuple(stored[extra[0]].get_shape())} has no place in a "
            f"{config.model_type} model of {config.num_hidden_layers} layers{_more(extra)}; "
            f"are these the weights of its {CONFIG}?"
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def check_tied(directory: Path, stored: Mapping[str, Any]) -> None:
    """A tied model's file may hold the table twice; two different tables are an untied model, as in transformers.

    Raises:
      UserError: they differ; both are read for that.
    """
    if LM_HEAD.name not in stored:
        return
    table, head = stored["model.embed_tokens.weight"], stored[LM_HEAD.name]
    if head.get_dtype() not in FLOATS.values():
        raise UserError(f"{directory}: tensor {LM_HEAD.name!r} is {head.get_dtype()}, needs one of {', '.join(FLOATS)}")
    rows, width = table.get_shape()
    step = max(1, int(PIECE_BYTES) // (4 * width))
    runs = (slice(i, min(i + step, rows)) for i in range(0, rows, step))
    if table.get_shape() != head.get_shape() or not all(np.array_equal(table[run], head[run]) for run in runs):
        raise UserError(
            f"{directory}: tie_word_embeddings is true but 'lm_head.weight' is not 'model.embed_tokens.weight'; "
            f"set it to false in {CONFIG}"
        )

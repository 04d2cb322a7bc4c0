"""Hugging Face directories ↔ sharded parameters: read a checkpoint, write one.

No whole model on any host: reading holds one device's part of one leaf at a time, writing one tensor (or a slice of a
table). `model/tensors.py` maps our parameter tree to a checkpoint's tensors.
"""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from dpo_jax.model.config import ModelConfig, Params
from dpo_jax.model.families import config_from_hf, hf_config
from dpo_jax.model.lora import BRANCH
from dpo_jax.model.tensors import (
    SCORE,
    Leaf,
    Parts,
    Sizes,
    first_rows,
    model_leaves,
    sizes,
    tensors,
    whole_shape,
)
from dpo_jax.weights.hub import CONFIG, GENERATION_CONFIG, INDEX, TOKENIZER_FILES
from dpo_jax.weights.model_files import FLOATS, read_model_json, refuse_code
from dpo_jax.weights.publish import new_directory
from dpo_jax.weights.stops import write_generation_config
from dpo_jax.weights.stored import PIECE_BYTES, check_tied, checked_tensors


def read_config(directory: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The numbers of the model in `directory`, and its whole config.json.

    Raises:
      UserError: unreadable, or a model that is not supported.
    """
    path = Path(directory) / CONFIG
    hf = read_model_json(path)
    config = config_from_hf(hf, str(path))
    refuse_code(path, hf)
    return config, hf


def load_weights(
    directory: Path,
    config: ModelConfig,
    shardings: Any,
    dtype: Any,
    *,
    adapter: Path | None = None,
    head: str = SCORE.name,
    branches: Sequence[str] = (),
) -> Params:
    """Read a checkpoint into sharded arrays; every process reads only the parts of its own devices.

    Args:
      directory: holds model.safetensors, or its shards and index; float32, bfloat16 or float16.
      config: the model's numbers, see `read_config`.
      shardings: one sharding for all, or a tree of them shaped like the parameters.
      dtype: of the arrays.
      adapter: a PEFT directory, merged into the weights as they are read.
      head: of a reward model, the name of its head's tensor; empty: there is none.
      branches: of the parameter tree, those to read; empty: all.

    Returns:
      The parameter tree of `model.py`, plain arrays; without `score` where there is no head.

    Raises:
      UserError: a missing or damaged file; a missing, unknown or wrongly shaped tensor.
    """
    directory, letters, rows = Path(directory), sizes(config), first_rows(config)
    flat = None if isinstance(shardings, jax.sharding.Sharding) else flax.traverse_util.flatten_dict(shardings)
    with contextlib.ExitStack() as files:
        stored, leaves = checked_tensors(directory, config, adapter, head, files)
        if config.tie_word_embeddings and not config.scalar_head:
            check_tied(directory, stored)
        params = {
            leaf.path: _load_leaf(
                stored, leaf, letters, rows[leaf.path], flat[leaf.path] if flat else shardings, jnp.dtype(dtype)
            )
            for leaf in leaves
            if not branches or leaf.path[0] in branches
        }
    return flax.traverse_util.unflatten_dict(params)


def _load_leaf(
    stored: Mapping[str, Any], leaf: Leaf, letters: Sizes, first_row: int, sharding: Any, dtype: Any
) -> jax.Array:
    """One leaf, part by part straight onto its devices.

    Not `jax.make_array_from_callback`: that holds all local parts on the host at once, and reads a part again for every
    device that has a copy of it.
    """
    shape = leaf.shape(letters)
    devices_of: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        part = tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))
        devices_of.setdefault(part, []).append(device)
    arrays: list[jax.Array] = []
    for part, devices in devices_of.items():
        bounds = dict(zip(leaf.ours, part, strict=True))
        host = np.empty([stop - start for start, stop in part], dtype)
        starts = [bounds[letter][0] for letter in leaf.stacked]
        for at in np.ndindex(host.shape[: len(starts)]):  # one tensor each
            name = leaf.name.format(*(start + i for start, i in zip(starts, at, strict=True)))
            host[at] = _read(stored[name], leaf, letters, first_row, bounds)
        places = [SingleDeviceSharding(device, memory_kind=sharding.memory_kind) for device in devices]
        # Transfers are asynchronous: without waiting, parts would queue up on the host.
        arrays += jax.block_until_ready([jax.device_put(host, place) for place in places])
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _read(tensor: Any, leaf: Leaf, letters: Sizes, first_row: int, bounds: Mapping[str, tuple[int, int]]) -> np.ndarray:
    """The part of one tensor within `bounds` (start, stop by letter), in our order of axes."""
    view: list[slice] = []
    shape: list[int] = []
    cut: list[slice] = []
    for axis in leaf.theirs:
        start, stop = bounds[axis[0]]
        inner = math.prod(letters[letter] for letter in axis[1:])  # whole heads are read: only they are contiguous
        before = first_row if not view else 0
        view.append(slice(before + start * inner, before + stop * inner))
        shape += [stop - start, *(letters[letter] for letter in axis[1:])]
        cut += [slice(None), *(slice(*bounds[letter]) for letter in axis[1:])]
    order = "".join(leaf.theirs)
    return tensor[tuple(view)].reshape(shape)[tuple(cut)].transpose([order.index(letter) for letter in leaf.axes])


def save_weights(
    params: Params,
    config: ModelConfig | Mapping[str, Any],
    directory: Path,
    *,
    dtype: Any,
    tokenizer_from: Path | None = None,
    max_shard_bytes: float = 5e9,
    lora_scale: float = 1.0,
    stops: Sequence[int] = (),
) -> None:
    """Write a directory that transformers and vLLM load; whole or not at all, replacing one that is there.

    Every process must call this (all take part in gathering); process 0 alone writes. It returns when all is written.

    Args:
      params: the parameter tree of `model.py`, plain arrays, sharded anyhow. Adapters in it (`lora.py`) are merged into
        their kernels, one tensor at a time and in float32.
      config: the loaded model's own config.json, or one by `hf_config`, or only the numbers.
      directory: to write.
      dtype: of the file: float32, bfloat16 or float16.
      tokenizer_from: a directory whose tokenizer files and generation_config.json are copied.
      max_shard_bytes: the most that one safetensors file holds (a larger tensor has a file of its own).
      lora_scale: of the adapters.
      stops: ids that end an answer, which generation_config.json then names.

    Raises:
      UserError: the directory cannot be written.
    """
    hf = hf_config(config) if isinstance(config, ModelConfig) else dict(config)
    numbers, name = config_from_hf(hf, CONFIG), jnp.dtype(dtype).name
    numbers = dataclasses.replace(numbers, scalar_head=SCORE.path[0] in params)
    assert name in FLOATS, f"dtype={name}, needs one of {tuple(FLOATS)}"
    hf |= {key: name for key in ("dtype", "torch_dtype") if key in hf} or {"torch_dtype": name}
    hf.pop("auto_map", None)  # code that is not copied, and that nobody shall be asked to run for an export
    flat = flax.traverse_util.flatten_dict(params)
    adapters = {path[1:]: flat.pop(path) for path in list(flat) if path[0] == BRANCH}
    adapters |= {path: lora_scale * b for path, b in adapters.items() if path[-1] == "b"}
    assert set(flat) == {leaf.path for leaf in model_leaves(numbers)}, f"not the tree of this config: {sorted(flat)}"
    letters, held = sizes(numbers), tensors(numbers)
    split = huggingface_hub.split_state_dict_into_shards_factory(
        held,
        get_storage_size=lambda parts: math.prod(whole_shape(parts, letters)) * jnp.dtype(dtype).itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=int(max_shard_bytes),
    )
    with new_directory(directory) as new:
        if new:
            (new / CONFIG).write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
            if split.is_sharded:
                metadata = {"total_parameters": numbers.parameter_count(), **split.metadata}
                index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
                (new / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            write_generation_config(new / GENERATION_CONFIG, tokenizer_from, stops, hf)
            if tokenizer_from:
                _copy_tokenizer(tokenizer_from, new)
        with jax.transfer_guard("allow"):  # row numbers go to the device unasked; a guard is for the training loop
            for file, names in split.filename_to_tensors.items():
                part = {tensor: held[tensor] for tensor in names}
                _write_file(new / file if new else None, part, flat | adapters, letters, name)


def _copy_tokenizer(source: Path, target: Path) -> None:
    for file in (file for pattern in TOKENIZER_FILES for file in source.glob(pattern)):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def _write_file(path: Path | None, held: dict[str, Parts], flat: Mapping, letters: Sizes, dtype: str) -> None:
    """Gather tensor by tensor and, if there is a path, write each at once.

    The safetensors library writes a file from tensors that are all in memory; the format (a JSON header, its length
    before it, then the bytes) is simple enough to stream.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, parts in held.items():
        shape, begin = whole_shape(parts, letters), end
        end += math.prod(shape) * jnp.dtype(dtype).itemsize
        header[name] = {"dtype": FLOATS[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the tensors aligned
    with path.open("wb") if path else contextlib.nullcontext() as file:
        if file:
            file.write(len(text).to_bytes(8, "little") + text)
        for leaf, index in (part for parts in held.values() for part in parts):
            adapter = tuple(flat[(*leaf.path, ab)] for ab in "ab" if (*leaf.path, ab) in flat)
            for piece in _pieces(flat[leaf.path], leaf, index, dtype, adapter):
                if file:
                    file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)


@jax.jit(static_argnames=("size", "dtype"))
def _rows(leaf: jax.Array, start: int, *, size: int, dtype: str) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(leaf, start, size).astype(dtype)


@jax.jit(static_argnames="dtype")
def _entry(leaf: jax.Array, index: tuple[int, ...], adapter: tuple[jax.Array, ...] = (), *, dtype: str) -> jax.Array:
    """One layer's kernel (of one expert), with its adapter (A, B) merged into it: W + A·B."""
    entry = leaf[index]
    if adapter:
        a, b = (x[index].astype(jnp.float32) for x in adapter)
        entry = entry.astype(jnp.float32) + jnp.tensordot(a, b, 1, precision="highest")
    return entry.astype(dtype)


def gather_to_host(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable:
        return jax.device_get(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _pieces(
    array: jax.Array, leaf: Leaf, index: tuple[int, ...], dtype: str, adapter: tuple[jax.Array, ...]
) -> Iterator[np.ndarray]:
    """One tensor on the host, in the checkpoint's layout: whole if it is a layer's, else in runs of rows."""
    if leaf.stacked:
        host = gather_to_host(_entry(array, index, adapter, dtype=dtype))
        yield host.transpose([leaf.axes.index(letter) for letter in "".join(leaf.theirs)])
        return
    assert leaf.theirs == tuple(leaf.ours), "runs of rows are the tensor's bytes only if no axis moves"
    size = max(1, int(PIECE_BYTES) // (4 * math.prod(array.shape[1:])))
    for row in range(0, array.shape[0], size):
        yield gather_to_host(_rows(array, row, size=min(size, array.shape[0] - row), dtype=dtype))

"""Hugging Face directories ↔ sharded parameters: find or download one, read it, write one.

No whole model on any host: reading holds one device's part of one leaf at a time, writing one tensor (or a slice of a
table). `LEAVES` is the one place that says how our tree and a checkpoint's tensors correspond; both directions use it.

Letters: L layers, D model, F ffn, H query heads, G kv-heads, E head width, V vocabulary.
"""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import errors as hub_errors
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open

from dpo_jax.errors import UserError
from dpo_jax.model import ModelConfig, Params, config_from_hf

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# `model*`: some repositories hold the same weights a second time as consolidated*.safetensors or under original/.
HUB_FILES = (CONFIG, GENERATION_CONFIG, "model*.safetensors", INDEX, *TOKENIZER_FILES)
FLOATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # dtype -> its name in a safetensors file
# Buffers that old exports hold and that follow from config.json.
HARMLESS_SUFFIXES = (".rotary_emb.inv_freq",)
PIECE_BYTES = 256e6  # of a vocabulary table gathered at once


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of our tree and the tensor (one per layer, if it has an axis L) that holds it in a checkpoint."""

    path: tuple[str, ...]
    name: str  # the tensor; {} is the layer
    ours: str  # our axes
    theirs: tuple[str, ...]  # the tensor's axes; two letters are two of our axes in one

    @property
    def axes(self) -> str:
        """Our axes within one tensor, so without L."""
        return self.ours.removeprefix("L")

    def names(self, sizes: Mapping[str, int]) -> list[str]:
        return [self.name.format(i) for i in range(sizes["L"])] if self.ours[0] == "L" else [self.name]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(sizes[letter] for letter in self.ours)

    def tensor_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(math.prod(sizes[letter] for letter in axis) for axis in self.theirs)


def _in_layer(path: str, name: str, ours: str, *theirs: str) -> Leaf:
    return Leaf(("layers", *path.split(".")), f"model.layers.{{}}.{name}.weight", ours, theirs)


# torch's Linear keeps its weight as [out, in], we keep [in, out] with the heads as an axis.
LEAVES = (
    Leaf(("embedding",), "model.embed_tokens.weight", "VD", ("V", "D")),
    _in_layer("input_norm.scale", "input_layernorm", "LD", "D"),
    _in_layer("attention.q", "self_attn.q_proj", "LDHE", "HE", "D"),
    _in_layer("attention.k", "self_attn.k_proj", "LDGE", "GE", "D"),
    _in_layer("attention.v", "self_attn.v_proj", "LDGE", "GE", "D"),
    _in_layer("attention.o", "self_attn.o_proj", "LHED", "D", "HE"),
    _in_layer("post_attention_norm.scale", "post_attention_layernorm", "LD", "D"),
    _in_layer("mlp.gate", "mlp.gate_proj", "LDF", "F", "D"),
    _in_layer("mlp.up", "mlp.up_proj", "LDF", "F", "D"),
    _in_layer("mlp.down", "mlp.down_proj", "LFD", "D", "F"),
    Leaf(("final_norm", "scale"), "model.norm.weight", "D", ("D",)),
    Leaf(("lm_head",), "lm_head.weight", "VD", ("V", "D")),
)


def leaves(config: ModelConfig) -> list[Leaf]:
    """The leaves this model has: no `lm_head` where embeddings are tied."""
    return [leaf for leaf in LEAVES if leaf.path != ("lm_head",) or not config.tie_word_embeddings]


def _sizes(config: ModelConfig) -> dict[str, int]:
    c = config
    return {
        "L": c.num_hidden_layers, "D": c.hidden_size, "F": c.intermediate_size, "V": c.vocab_size,
        "H": c.num_attention_heads, "G": c.num_key_value_heads, "E": c.head_dim,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- find


def resolve(model: str, *, what: str = "model") -> Path:
    """A directory in Hugging Face's layout: `model` itself if it is one, else the hub's repository, downloaded once.

    Args:
      model: a local directory or a hub id.
      what: the config key that `model` came from, for messages.

    Raises:
      UserError: no such directory, no config.json in it, or the hub cannot give it; says what to do instead.
    """
    given = f"{what}={model!r}"
    path = Path(model).expanduser()
    if model and path.is_dir():
        if not (path / CONFIG).is_file():
            raise UserError(f"{given}: the directory has no {CONFIG}; give a Hugging Face model directory")
        return path
    looks_like_path = model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") > 1
    if not model or looks_like_path or "://" in model or path.exists():
        found = "is a file, not a directory" if path.is_file() else "no such directory"
        raise UserError(f"{given}: {found}; give a local Hugging Face directory or a hub id (OWNER/NAME)")
    try:
        path = Path(huggingface_hub.snapshot_download(model, allow_patterns=list(HUB_FILES)))
    except Exception as e:  # the client's own errors, httpx's, OSError: one cause for the user, whatever the library
        raise UserError(f"{given}: {_hub_problem(model, e, what)}") from e
    if not (path / CONFIG).is_file():
        raise UserError(f"{given}: the hub's repository has no {CONFIG}; is it a transformers model?")
    return path


def _hub_problem(model: str, error: Exception, what: str) -> str:
    """What went wrong with a download and how to go on, in one line."""
    hub = huggingface_hub.constants.ENDPOINT
    without = f"use --config.{what}=DIRECTORY, or --config=configs/hhh.py:tiny, which needs no download"
    if isinstance(error, hub_errors.HFValidationError):
        return f"not a local directory and not a hub id (OWNER/NAME); {without}"
    if isinstance(error, hub_errors.GatedRepoError):
        return f"gated: ask for access at {hub}/{model}, then `hf auth login`; or {without}"
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return f"no local directory, and {hub} has no such model (a private one needs `hf auth login`); {without}"
    cause = error.__cause__ or error
    reason = " ".join(f"{type(cause).__name__}: {cause}".split())
    return f"no local directory, and it cannot be downloaded from {hub} ({reason[:200]}); {without}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read as JSON ({e})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__}, needs an object")
    return value


def read_config(directory: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The numbers of the model in `directory`, and its whole config.json.

    Raises:
      UserError: unreadable, or a model that is not supported.
    """
    hf = _read_json(Path(directory) / CONFIG)
    return config_from_hf(hf, str(Path(directory) / CONFIG)), hf


# ---------------------------------------------------------------------------------------------------------- read


def load(directory: Path, config: ModelConfig, shardings: Any, dtype: Any) -> Params:
    """Read a checkpoint into sharded arrays; every process reads only the parts of its own devices.

    Args:
      directory: holds model.safetensors, or its shards and index; float32, bfloat16 or float16.
      config: the model's numbers, see `read_config`.
      shardings: one sharding for all, or a tree of them shaped like the parameters.
      dtype: of the arrays.

    Returns:
      The parameter tree of `model.py`, plain arrays.

    Raises:
      UserError: a missing or damaged file; a missing, unknown or wrongly shaped tensor.
    """
    directory, sizes = Path(directory), _sizes(config)
    flat = None if isinstance(shardings, jax.sharding.Sharding) else flax.traverse_util.flatten_dict(shardings)
    with contextlib.ExitStack() as files:
        tensors = _open_tensors(directory, files)
        _check_tensors(directory, tensors, config)
        params = {
            leaf.path: _load_leaf(tensors, leaf, sizes, flat[leaf.path] if flat else shardings, jnp.dtype(dtype))
            for leaf in leaves(config)
        }
    return flax.traverse_util.unflatten_dict(params)


def _open_tensors(directory: Path, files: contextlib.ExitStack) -> dict[str, Any]:
    """Every tensor by name, as a safetensors slice: nothing is read until it is indexed."""
    names = [WEIGHTS]
    if not (directory / WEIGHTS).is_file():
        if not (directory / INDEX).is_file():
            raise UserError(f"{directory}: no {WEIGHTS} and no {INDEX}; only safetensors are read, not .bin files")
        names = sorted(set(_read_json(directory / INDEX).get("weight_map", {}).values()))
    tensors: dict[str, Any] = {}
    for name in names:
        try:
            file = files.enter_context(safe_open(directory / name, framework="np"))
        except FileNotFoundError:
            raise UserError(f"{directory}: {INDEX} names {name}, which is not there; download it again") from None
        except (OSError, SafetensorError) as e:
            raise UserError(f"{directory / name}: damaged or incomplete ({e}); download it again") from None
        tensors |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    return tensors


def _check_tensors(directory: Path, tensors: Mapping[str, Any], config: ModelConfig) -> None:
    """Every tensor is there with its shape, and nothing else is: said before anything is read."""
    sizes = _sizes(config)
    needed = {name: leaf.tensor_shape(sizes) for leaf in leaves(config) for name in leaf.names(sizes)}
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise UserError(
            f"{directory}: tensor {missing[0]!r} of shape {needed[missing[0]]} is missing{_more(missing)}; "
            f"are these the weights of its {CONFIG}?"
        )
    for name, shape in needed.items():
        found = tuple(tensors[name].get_shape())
        if found != shape:
            raise UserError(f"{directory}: tensor {name!r} has shape {found}, {CONFIG} needs {shape}")
        if tensors[name].get_dtype() not in FLOATS.values():
            raise UserError(
                f"{directory}: tensor {name!r} is {tensors[name].get_dtype()}, needs one of {', '.join(FLOATS)}; "
                "quantized checkpoints are not supported"
            )
    extra = [name for name in tensors if name not in needed and not name.endswith(HARMLESS_SUFFIXES)]
    if config.tie_word_embeddings and "lm_head.weight" in extra:
        _check_tied(directory, tensors)
        extra.remove("lm_head.weight")
    if extra:
        raise UserError(
            f"{directory}: tensor {extra[0]!r} of shape {tuple(tensors[extra[0]].get_shape())} has no place in a "
            f"{config.model_type} model of {config.num_hidden_layers} layers{_more(extra)}; "
            f"are these the weights of its {CONFIG}?"
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _check_tied(directory: Path, tensors: Mapping[str, Any]) -> None:
    """A tied model's file may hold the table twice; two different tables are an untied model, as in transformers."""
    table, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    (rows, width), same = table.get_shape(), table.get_shape() == head.get_shape()
    step = max(1, int(PIECE_BYTES) // (4 * width))
    runs = [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
    if not same or not all(np.array_equal(table[run], head[run]) for run in runs):
        raise UserError(
            f"{directory}: tie_word_embeddings is true but 'lm_head.weight' is not 'model.embed_tokens.weight'; "
            f"set it to false in {CONFIG}"
        )


def _load_leaf(
    tensors: Mapping[str, Any], leaf: Leaf, sizes: Mapping[str, int], sharding: Any, dtype: Any
) -> jax.Array:
    """One leaf, part by part straight onto its devices.

    Not `jax.make_array_from_callback`: that holds all local parts on the host at once, and reads a part again for every
    device that has a copy of it.
    """
    shape = leaf.shape(sizes)
    devices_of: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        part = tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))
        devices_of.setdefault(part, []).append(device)
    arrays: list[jax.Array] = []
    for part, devices in devices_of.items():
        bounds = dict(zip(leaf.ours, part, strict=True))
        host = np.empty([stop - start for start, stop in part], dtype)
        if leaf.ours[0] == "L":
            for row, layer in enumerate(range(*bounds["L"])):
                host[row] = _read(tensors[leaf.name.format(layer)], leaf, sizes, bounds)
        else:
            host[...] = _read(tensors[leaf.name], leaf, sizes, bounds)
        # Transfers are asynchronous: without waiting, parts would queue up on the host.
        arrays += jax.block_until_ready([jax.device_put(host, device) for device in devices])
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _read(tensor: Any, leaf: Leaf, sizes: Mapping[str, int], bounds: Mapping[str, tuple[int, int]]) -> np.ndarray:
    """The part of one tensor within `bounds` (start, stop by letter), in our order of axes."""
    view, shape, cut = [], [], []
    for axis in leaf.theirs:
        start, stop = bounds[axis[0]]
        inner = math.prod(sizes[letter] for letter in axis[1:])  # whole heads are read: only they lie in one stretch
        view.append(slice(start * inner, stop * inner))
        shape += [stop - start, *(sizes[letter] for letter in axis[1:])]
        cut += [slice(None), *(slice(*bounds[letter]) for letter in axis[1:])]
    order = "".join(leaf.theirs)
    return tensor[tuple(view)].reshape(shape)[tuple(cut)].transpose([order.index(letter) for letter in leaf.axes])


# --------------------------------------------------------------------------------------------------------- write


def hf_config(
    config: ModelConfig, *, bos_token_id: int | None = None, eos_token_id: int | None = None, dtype: Any = "float32"
) -> dict[str, Any]:
    """The config.json of a model made from scratch, with the keys that every version of transformers reads.

    Generation ends at `eos_token_id`: give the tokenizer's, also to a `save` of this model.
    """
    hf: dict[str, Any] = {
        "architectures": [{"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[config.model_type]],
        **dataclasses.asdict(config),
        "rope_scaling": dict(config.rope_scaling) or None,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "torch_dtype": jnp.dtype(dtype).name,
    }
    # Left out, transformers would give a Mistral a window of 4096.
    return hf | (
        {"sliding_window": None} if config.model_type == "mistral" else {"attention_bias": False, "mlp_bias": False}
    )


def save(
    params: Params,
    config: ModelConfig | Mapping[str, Any],
    directory: Path,
    *,
    dtype: Any,
    tokenizer_from: Path | None = None,
    max_shard_bytes: float = 5e9,
) -> None:
    """Write a directory that transformers and vLLM load; whole or not at all, replacing one that is there.

    Every process must call this (all take part in gathering); process 0 alone writes. It returns when all is written.

    Args:
      params: the parameter tree of `model.py`, plain arrays, sharded anyhow.
      config: the loaded model's own config.json, or one by `hf_config`, or only the numbers.
      directory: the new directory.
      dtype: of the file: float32, bfloat16 or float16.
      tokenizer_from: a directory whose tokenizer files and generation_config.json are copied.
      max_shard_bytes: the most that one safetensors file holds (a larger tensor has a file of its own).

    Raises:
      UserError: the directory cannot be written.
    """
    hf = hf_config(config) if isinstance(config, ModelConfig) else dict(config)
    numbers, name = config_from_hf(hf, CONFIG), jnp.dtype(dtype).name
    assert name in FLOATS, f"dtype={name}, needs one of {tuple(FLOATS)}"
    hf |= {key: name for key in ("dtype", "torch_dtype") if key in hf} or {"torch_dtype": name}
    flat = flax.traverse_util.flatten_dict(params)
    assert set(flat) == {leaf.path for leaf in leaves(numbers)}, f"not the tree of this config: {sorted(flat)}"
    files = _plan_files(numbers, jnp.dtype(dtype).itemsize, max_shard_bytes)
    directory = Path(directory).absolute()
    new, old = (directory.with_name(f".{directory.name}.{suffix}") for suffix in ("new", "old"))
    writes = jax.process_index() == 0
    try:
        if writes:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            (new / CONFIG).write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
            _write_index(new, files, jnp.dtype(dtype).itemsize, numbers)
            _copy_files(tokenizer_from, new)
        with jax.transfer_guard("allow"):  # row numbers go to the device unasked; a guard is for the training loop
            for file, tensors in files.items():
                _write_file(new / file if writes else None, tensors, flat, _sizes(numbers), name)
        if writes:
            shutil.rmtree(old, ignore_errors=True)
            if directory.exists():
                directory.rename(old)
            new.rename(directory)
            shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        raise UserError(f"{directory}: the export cannot be written ({e})") from e
    finally:
        if writes:
            shutil.rmtree(new, ignore_errors=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("dpo_jax.weights.save")


Tensors = dict[str, tuple[Leaf, int]]  # tensor name -> leaf and layer


def _plan_files(config: ModelConfig, itemsize: int, max_bytes: float) -> dict[str, Tensors]:
    """Which tensors lie in which file, layer by layer as a reader wants them."""
    sizes, layers = _sizes(config), range(config.num_hidden_layers)
    stacked = [leaf for leaf in leaves(config) if leaf.ours[0] == "L"]
    order = [(leaf, 0) for leaf in leaves(config) if leaf not in stacked]
    order[1:1] = [(leaf, layer) for layer in layers for leaf in stacked]  # between the embedding and the final norm
    shards: list[Tensors] = [{}]
    used = 0
    for leaf, layer in order:
        size = math.prod(leaf.tensor_shape(sizes)) * itemsize
        if shards[-1] and used + size > max_bytes:
            shards.append({})
            used = 0
        shards[-1][leaf.name.format(layer)] = (leaf, layer)
        used += size
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _write_index(directory: Path, files: Mapping[str, Tensors], itemsize: int, config: ModelConfig) -> None:
    if len(files) > 1:
        count = config.parameter_count()
        index = {
            "metadata": {"total_parameters": count, "total_size": count * itemsize},
            "weight_map": {name: file for file, tensors in files.items() for name in tensors},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_files(source: Path | None, directory: Path) -> None:
    for name in (*TOKENIZER_FILES, GENERATION_CONFIG) if source else ():
        if (Path(source or "") / name).is_file():
            shutil.copyfile(Path(source or "") / name, directory / name)


def _write_file(path: Path | None, tensors: Tensors, flat: Mapping, sizes: Mapping[str, int], dtype: str) -> None:
    """Gather tensor by tensor and, if there is a path, write each at once.

    The safetensors library writes a file from tensors that are all in memory; the format (a JSON header, its length
    before it, then the bytes) is simple enough to stream.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (leaf, _) in tensors.items():
        shape, begin = leaf.tensor_shape(sizes), end
        end += math.prod(shape) * jnp.dtype(dtype).itemsize
        header[name] = {"dtype": FLOATS[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the tensors aligned
    with path.open("wb") if path else contextlib.nullcontext() as file:
        if file:
            file.write(len(text).to_bytes(8, "little") + text)
        for leaf, layer in tensors.values():
            for piece in _pieces(flat[leaf.path], leaf, layer, dtype):
                if file:
                    file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)


@jax.jit(static_argnames=("size", "dtype"))
def _rows(leaf: jax.Array, start: int, *, size: int, dtype: str) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(leaf, start, size).astype(dtype)


def _pieces(array: jax.Array, leaf: Leaf, layer: int, dtype: str) -> Iterator[np.ndarray]:
    """One tensor on the host, in the checkpoint's layout: whole if it is a layer's, else in runs of rows."""
    start, stop, size = layer, layer + 1, 1
    if leaf.ours[0] != "L":
        assert leaf.theirs == tuple(leaf.ours), "runs of rows are the tensor's bytes only if no axis moves"
        start, stop = 0, array.shape[0]
        size = max(1, int(PIECE_BYTES) // (4 * math.prod(array.shape[1:])))
    for row in range(start, stop, size):
        piece = _rows(array, row, size=min(size, stop - row), dtype=dtype)
        host = (
            jax.device_get(piece)
            if piece.is_fully_addressable
            else multihost_utils.process_allgather(piece, tiled=True)
        )
        if leaf.ours[0] != "L":
            yield host
            continue
        order = "".join(leaf.theirs)
        moved = host[0].transpose([leaf.axes.index(letter) for letter in order])
        grouped = iter(moved.shape)
        yield moved.reshape([math.prod(next(grouped) for _ in axis) for axis in leaf.theirs])

"""The small files of a model's directory: opened only where they are files, and believed only in the shape they need.

Nothing here runs, and nothing is allocated by what a file says.
"""

import contextlib
import math
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Interval, Len
from pydantic import AfterValidator
from pydantic_core import PydanticCustomError
from safetensors import SafetensorError, safe_open
from typing_extensions import TypedDict

from dpo_jax.disk import check_shape, read_json
from dpo_jax.errors import UserError
from dpo_jax.model.config_file import Id, Ids

FLOATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # dtype -> its name in a safetensors file
MEND = "mend it, or fetch the model again"
_TEMPLATES = "additional_chat_templates"
_DEEPEST = 32  # levels of a JSON value; published files have four
_MOST = {".json": 1 << 26, ".jinja": 1 << 22}  # bytes; a tokenizer's own JSON may have more
_TOKENIZER_BYTES = 1 << 29
# Endings of files that are opened, here or in transformers, if they are there.
_READ = (".json", ".jinja", ".model", ".txt", ".safetensors", ".tiktoken")
_Share = Annotated[float, Interval(ge=0.0, le=1.0)]
_Positive = Annotated[float, Interval(gt=0.0, le=1e30)]
_Count = Annotated[int, Interval(ge=0, le=2**40)]
_Text = Annotated[str, Len(0, 1 << 22)]


def _plain_name(name: str) -> str:
    """A file's name that stays in its directory, and that `*.safetensors` finds there."""
    stem = name.removesuffix(".safetensors")
    if stem == name or not stem or stem.startswith(".") or set(name) & set("/\\") or not name.isprintable():
        raise PydanticCustomError("plain_name", "must be the plain name of a .safetensors file beside it")
    return name


def _token_number(text: str) -> str:
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) < 2**31):
        raise PydanticCustomError("token_number", "must be a token's number")
    return text


def _pattern(text: str) -> str:
    """A regular expression that is soon compiled; how long it is matched has a limit of its own."""
    if len(text) > 300 or "{" in text:
        raise PydanticCustomError("pattern", "must be a pattern of at most 300 letters without { }")
    return text


_Pattern = Annotated[str, AfterValidator(_pattern)]


class GenerationConfig(TypedDict, total=False):
    """`generation_config.json`: what is read of it, and the numbers that an export of the model keeps."""

    bos_token_id: Id | None
    eos_token_id: Ids
    pad_token_id: Ids
    temperature: Annotated[float, Interval(ge=0.0, le=1e30)] | None
    top_k: _Count | None
    top_p: _Share | None
    min_p: _Share | None
    typical_p: _Share | None
    repetition_penalty: _Positive | None
    max_length: _Count | None
    max_new_tokens: _Count | None
    do_sample: bool | None


class AddedTokenEntry(TypedDict, total=False):
    """A token of a tokenizer that is not of its vocabulary alone."""

    content: str
    lstrip: bool
    rstrip: bool
    normalized: bool
    single_word: bool
    special: bool


class NamedTemplate(TypedDict):
    """One of several chat templates."""

    name: str
    template: _Text


_ChatTemplate = _Text | list[NamedTemplate] | dict[str, _Text] | None


class SpecialTokens(TypedDict, total=False):
    """`special_tokens_map.json`, and the same keys in `tokenizer_config.json`."""

    bos_token: str | AddedTokenEntry | None
    eos_token: str | AddedTokenEntry | None
    unk_token: str | AddedTokenEntry | None
    sep_token: str | AddedTokenEntry | None
    pad_token: str | AddedTokenEntry | None
    cls_token: str | AddedTokenEntry | None
    mask_token: str | AddedTokenEntry | None
    additional_special_tokens: list[str | AddedTokenEntry] | None
    extra_special_tokens: list[str | AddedTokenEntry] | dict[str, str | AddedTokenEntry] | None


class TokenizerConfig(SpecialTokens, total=False):
    """`tokenizer_config.json`: how transformers makes a tokenizer."""

    tokenizer_class: str | None
    backend: str | None
    chat_template: _ChatTemplate
    added_tokens_decoder: dict[Annotated[str, AfterValidator(_token_number)], AddedTokenEntry] | None
    model_max_length: Annotated[float, Interval(ge=1, le=1e40)] | None
    split_special_tokens: bool | None
    clean_up_tokenization_spaces: bool | None
    padding_side: str | None
    truncation_side: str | None
    model_input_names: list[str] | None
    add_bos_token: bool | None
    add_eos_token: bool | None
    add_prefix_space: bool | None
    legacy: bool | None
    use_default_system_prompt: bool | None
    errors: str | None


class TemplateFile(TypedDict, total=False):
    """`chat_template.json`."""

    chat_template: _ChatTemplate


class Index(TypedDict):
    """`model.safetensors.index.json`: the file of every tensor, each beside the index."""

    weight_map: dict[str, Annotated[str, AfterValidator(_plain_name)]]


class AdapterFile(TypedDict, total=False):
    """`adapter_config.json` of PEFT, as far as a merge needs it."""

    peft_type: str | None
    task_type: str | None
    base_model_name_or_path: str | None
    revision: str | None
    bias: str | None
    init_lora_weights: bool | str | None
    r: Annotated[int, Interval(ge=1, le=2**20)]
    lora_alpha: Annotated[float, Interval(ge=-1e30, le=1e30)]
    rank_pattern: dict[_Pattern, Annotated[int, Interval(ge=1, le=2**20)]] | None
    alpha_pattern: dict[_Pattern, Annotated[float, Interval(ge=-1e30, le=1e30)]] | None
    use_rslora: bool | None
    modules_to_save: list[str] | None


_SHAPES: dict[str, Any] = {
    "tokenizer_config.json": TokenizerConfig,
    "special_tokens_map.json": SpecialTokens,
    "added_tokens.json": dict[str, Annotated[int, Interval(ge=0, le=2**31 - 1)]],
    "chat_template.json": TemplateFile,
}


def read_model_json(path: Path, shape: Any = None) -> dict[str, Any]:
    """The JSON object in a model's file, as any reader of JSON could read it: of finite numbers, and not deep.

    Args:
      shape: what it must hold, see `disk.check_shape`.

    Raises:
      UserError: it is no such file, with the key.
    """
    held = read_json(path, MEND)
    for place, value, depth in _walk(held):
        if depth > _DEEPEST:
            raise UserError(f"{path}: {place[:60]!a}... is nested more than {_DEEPEST} levels deep; {MEND}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{path}: {place[:60]} is {value}, which is no number; {MEND}")
    if shape is not None:
        check_shape(held, shape, str(path), MEND)
    return held


def check_files(directory: Path) -> None:
    """Refuse a directory in which something else is in a file's place, such as a pipe, whose reading never ends.

    Raises:
      UserError: with the file's name.
    """
    try:
        listed = sorted(p for d in (directory, directory / _TEMPLATES) if d.is_dir() for p in d.iterdir())
    except OSError as error:
        raise UserError(f"{directory}: cannot be listed ({error.strerror}); mend its permissions") from None
    for path in listed:
        if path.suffix not in _READ:
            continue
        try:
            about = path.stat()  # of what a link stands for: the hub's client makes links
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); fetch it again, or remove it") from None
        if not stat.S_ISREG(about.st_mode):
            raise UserError(f"{path}: is a {_kind(about.st_mode)}, not a file; fetch it again, or remove it")
        most = _TOKENIZER_BYTES if path.name in ("tokenizer.json", "vocab.json") else _MOST.get(path.suffix)
        if most is not None and about.st_size > most:
            raise UserError(
                f"{path}: has {about.st_size:,} bytes, more than the {most:,} that it may have; fetch it again"
            )


def open_safetensors(path: Path, files: contextlib.ExitStack) -> Any:
    """A safetensors file whose header agrees with its size; nothing else is read. `files` keeps it open.

    Raises:
      FileNotFoundError: there is none.
      UserError: it is damaged, no file, or its header is not what the format says.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: is a {_kind(path.stat().st_mode)}, not a file; download it again")
        return files.enter_context(safe_open(path, framework="np"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, SafetensorError) as e:
        words = " ".join(str(e).split())[:200]
        raise UserError(f"{path}: damaged or incomplete ({words!a}); download it again") from None


def check_tokenizer(directory: Path) -> None:
    """Refuse tokenizer files of another shape, or with code, before transformers reads them.

    Raises:
      UserError: with file and key.
    """
    for name, shape in _SHAPES.items():
        if not (path := directory / name).exists():
            continue
        held = read_model_json(path)
        if "auto_map" in held:
            raise _runs_code(path)
        check_shape(held, shape, str(path), MEND)
        _refuse_files_elsewhere(path, held)


def _refuse_files_elsewhere(path: Path, held: Mapping[str, Any]) -> None:
    """Paths of a tokenizer's files that are none of the directory's; those that lead nowhere are only old."""
    for key, value in held.items():
        for name in (value if isinstance(value, list) else [value]) if key.endswith(("_file", "_files")) else []:
            there = path.parent / name if isinstance(name, str) and name and "\0" not in name else path
            if there.parent != path.parent and there.exists():
                raise UserError(f"{path}: {key}: {name!a} is not in this directory; {MEND}")


def refuse_code(path: Path, held: Mapping[str, Any]) -> None:
    """Refuse a config.json whose tokenizer is code of its author's. That of a model is never looked at.

    Raises:
      UserError: names the key.
    """
    named = held.get("auto_map")
    if named is not None and (not isinstance(named, dict) or "AutoTokenizer" in named):
        raise _runs_code(path)


def _runs_code(path: Path) -> UserError:
    return UserError(
        f"{path}: auto_map names code of the model's author, which is never run; remove the key to take what "
        "transformers itself has, or give another tokenizer"
    )


def _walk(value: Any) -> Iterator[tuple[str, Any, int]]:
    """Every value within a JSON value, with the keys to it and how deep it is."""
    open_ = [("", value, 0)]
    while open_:
        place, one, depth = open_.pop()
        yield place, one, depth
        if depth <= _DEEPEST:
            inside = one.items() if isinstance(one, dict) else enumerate(one) if isinstance(one, list) else ()
            open_ += [(f"{place}.{key}" if place else str(key), held, depth + 1) for key, held in inside]


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "directory"
    return "pipe" if stat.S_ISFIFO(mode) else "device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else "socket"

"""Directories of models, broken one thing at a time: numbers, tensors, tokenizers, templates, code that would run."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.fuzz.cases import TINY, Case, Command, Place, data, sample, train
from tests.fuzz.damage import ANY_FILE, GONE, VALUES, WHOLE, put, whole, write_json

FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
         "model.safetensors")  # fmt: skip
# What numbers of config.json and generation_config.json can be besides `damage.VALUES`.
NUMBERS = {"one": 1, "three": 3, "million": 10**6, "ten-to-12": 10**12, "two-to-31": 2**31, "tiny": 1e-300,
           "large": 1e300, "negative-fraction": -0.5}  # fmt: skip
# Keys that the smallest model's files do not have, and values for them.
FURTHER = {
    "config.json": {
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
        "rope_scaling": {"rope_type": "yarn", "factor": -1},
        "rope_parameters": {"rope_type": "llama3", "factor": 0, "original_max_position_embeddings": 0},
        "layer_types": ["full_attention"] * 100_000,
        "sliding_window": -5,
        "quantization_config": {"quant_method": "bitsandbytes"},
        "head_dim": 7,
        "text_config": {"model_type": "llama"},
        "model_type": "../../code",
        "architectures": ["os.system"],
        "hidden_act": "__import__('os').system('touch canary')",
        "num_labels": -1,
        "id2label": {"x": 1},
        "torch_dtype": "os.system",
        "dtype": "complex128",
        "vocab_size": 299,
        "_name_or_path": "../../../home/.profile",
        "transformers_version": "\x1b[31m",
    },
    "generation_config.json": {
        "eos_token_id": [1, -1, 10**30],
        "temperature": -1,
        "cache_implementation": "code",
        "max_length": -1,
        "auto_map": {"x": "code.X"},
    },
    "tokenizer_config.json": {
        "auto_map": {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]},
        "tokenizer_class": "code.Tokenizer",
        "chat_template": {"a": 1},
        "added_tokens_decoder": {"x": {"content": 1}},
        "extra_special_tokens": {"a": [1]},
        "model_max_length": -1,
        "tokenizer_file": "../../../home/.profile",
        "vocab_file": "/dev/zero",
        "fast_tokenizer_files": ["../../x"],
        "eos_token": {"__type": "AddedToken", "content": 5},
        "transforms": "os.system",
    },
}
_SLEEP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES: dict[str, str] = {
    "syntax-error": "{% if %}",
    "unclosed": "{% for m in messages %}{{ m.content }}",
    "unknown-filter": "{{ messages | nope }}",
    "unknown-function": "{{ nope() }}",
    "undefined": "{{ nope.nope }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "extends": "{% extends 'x' %}",
    "sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['__builtins__']['open']('canary', 'w') }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('touch canary') }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('touch canary') }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "endless": _SLEEP,
    "endless-output": "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x' * 1000 }}{% endfor %}{% endfor %}",
    "memory": "{{ 'x' * 10000000000 }}",
    "memory-doubling": "{% set ns = namespace(x='xxxxxxxx') %}"
    "{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "memory-list": "{% set x = [0] * 10000000000 %}",
    "memory-format": "{{ '%99999999999d' % 1 }}",
    "memory-center": "{{ 'x' | center(9999999999) }}",
    "memory-indent": "{{ 'x\\n' * 1000 | indent(99999999) }}",
    "large-number": "{{ 10 ** 10 ** 10 }}",
    "range": "{{ range(10000000000) | list }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "deep": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "deep-brackets": "{{ " + "(" * 10_000 + ")" * 10_000 + " }}",
    "raises": "{{ raise_exception('\x1b[31m not for you\nerror: forged') }}",
    "divides": "{{ 1 / 0 }}",
    "number": "{{ messages + 1 }}",
    "empty": "",
    "constant": "always the same",
    "without-content": "{% for m in messages %}{{ m.role }}{% endfor %}",
    "changes-messages": "{{ messages.clear() }}",
    "surrogate": "{{ '\\ud800' }}",
    "null": "{{ '\\x00' }}",
    "clock": "{{ strftime_now('%Q%!' * 99999) }}",
    "random": "{{ range(1000000) | random }}",
    "debug": "{% debug %}",
    "long": "x" * 5_000_000,
    "tojson": "{{ messages | tojson(indent=99999999) }}",
    "break": "{% break %}",
    "generation": "{% generation %}",
}
CODE = "open({canary!r}, 'w')\nclass Tokenizer: pass\nclass Config: pass\nclass Model: pass\n"


def cases() -> Iterator[Case]:
    for file in FILES:
        for how in WHOLE:
            yield _case(f"{file}/{how}", lambda path, file=file, how=how: whole(path / file, how), file)
        for how, do in ANY_FILE.items():
            yield _case(f"{file}/{how}", lambda path, file=file, do=do: do(path / file), file)
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        keys = json.loads((TINY / file).read_text())
        for key in keys:
            for how, value in (VALUES | NUMBERS | {"gone": GONE}).items():
                yield _key(file, (key,), how, value)
        for key, value in FURTHER[file].items():
            yield _key(file, (key,), "odd", value)
            for how in ("null", "list", "text", "nested", "negative", "nan"):
                yield _key(file, (key,), f"further-{how}", VALUES[how])
    for key in ("rope_theta", "rope_type"):
        for how, value in (VALUES | NUMBERS | {"gone": GONE}).items():
            yield _key("config.json", ("rope_parameters", key), how, value)
    for key in "model added_tokens pre_tokenizer decoder normalizer post_processor truncation padding".split():
        for how, value in (VALUES | {"gone": GONE}).items():
            yield _key("tokenizer.json", (key,), how, value)
    for how, text in TEMPLATES.items():
        yield _case(f"template/{how}", lambda path, text=text: _template(path, text), "chat_template.jinja")
        yield _case(f"template-in-config/{how}", lambda path, text=text: _template_in_config(path, text), "x.jinja")
    for how, do in HEADERS.items():
        yield _case(f"header/{how}", do, "model.safetensors")
    for how, names in INDEXES.items():
        yield _case(f"index/{how}", lambda path, names=names: _index(path, names), "model.safetensors")
    for how, do in DIRECTORIES.items():
        yield _case(f"directory/{how}", do, "model.safetensors")
        yield Case(f"model/directory/{how}-train", _prepare(do, "train"))


def _key(file: str, at: tuple[str, ...], how: str, value: object) -> Case:
    def change(path: Path) -> None:
        read = json.loads((path / file).read_text())
        if value is GONE:
            inner = read
            for key in at[:-1]:
                inner = inner.get(key, {})
            inner.pop(at[-1], None)
            write_json(path / file, read)
            return
        write_json(path / file, put(read, at, value))

    return _case(f"{file}/{'.'.join(at)}/{how}", change, file)


def _case(name: str, change: Callable[[Path], None], file: str) -> Case:
    """What tokenises is looked at without weights, which is quicker; what holds numbers or tensors answers a prompt."""
    return Case(f"model/{name}", _prepare(change, "sample" if file in (*FILES[:2], FILES[-1]) else "inspect"))


def _prepare(change: Callable[[Path], None], door: str) -> Callable[[Place], Command]:
    def prepare(place: Place) -> Command:
        directory = Path(shutil.copytree(TINY, place.given / "model"))
        for name in ("code.py", "tokenization_code.py", "configuration_code.py"):
            (directory / name).write_text(CODE.format(canary=str(place.canary)))
        change(directory)
        if door == "sample":
            command = sample(place, directory)
        elif door == "inspect":
            command = data("inspect", place, model=directory)
        else:
            command = train(place, model=directory, num_steps=1, sft_steps=0, eval_pairs=0, sample_prompts=0)
        # Whoever asks whether code may run gets a yes.
        return Command(command.module, command.arguments, stdin=b"y\n" * 50)

    return prepare


def _template(path: Path, text: str) -> None:
    (path / "chat_template.jinja").write_text(text, encoding="utf-8", errors="surrogatepass")


def _template_in_config(path: Path, text: str) -> None:
    (path / "chat_template.jinja").unlink()
    read = json.loads((path / "tokenizer_config.json").read_text())
    write_json(path / "tokenizer_config.json", read | {"chat_template": text})


# ---- the tensors' header: eight bytes of length, that many of JSON, then the numbers


def _header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        file = path / "model.safetensors"
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        new = change(header)
        text = new if isinstance(new, bytes) else json.dumps(header if new is None else new).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return do


def _length(length: int) -> Callable[[Path], None]:
    return lambda path: (path / "model.safetensors").write_bytes(
        struct.pack("<Q", length) + (path / "model.safetensors").read_bytes()[8:]
    )


def _first(header: dict) -> dict:
    return header[next(name for name in header if name != "__metadata__")]


def _set(key: str, value: object) -> Callable[[Path], None]:
    return _header(lambda header: _first(header).__setitem__(key, value))


def _swap(header: dict) -> None:
    names = [name for name in header if name != "__metadata__"][:2]
    header[names[0]], header[names[1]] = header[names[1]], header[names[0]]


def _numbers(value: bytes) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        file = path / "model.safetensors"
        content = file.read_bytes()
        start = 8 + struct.unpack("<Q", content[:8])[0]
        file.write_bytes(content[:start] + value * ((len(content) - start) // len(value)))

    return do


HEADERS: dict[str, Callable[[Path], None]] = {
    "length-zero": _length(0),
    "length-huge": _length(2**63),
    "length-most": _length(2**64 - 1),
    "length-of-gigabytes": _length(3 * 10**9),
    "length-beyond-the-file": _length(10**7),
    "not-json": _header(lambda header: b"{" * 100),
    "list": _header(lambda header: b"[]"),
    "empty": _header(lambda header: b"{}"),
    "deep": _header(lambda header: b'{"a":' * 100_000),
    "twice": _header(lambda header: json.dumps(header).encode()[:-1] + b"," + json.dumps(header).encode()[1:]),
    "tensor-of-list": _header(lambda header: {key: [] for key in header}),
    "dtype-unknown": _set("dtype", "F99"),
    "dtype-of-integers": _set("dtype", "I32"),
    "dtype-wider": _set("dtype", "F64"),
    "dtype-number": _set("dtype", 3),
    "shape-negative": _set("shape", [-1, 48]),
    "shape-huge": _set("shape", [2**40, 2**40]),
    "shape-zero": _set("shape", [0]),
    "shape-empty": _set("shape", []),
    "shape-turned": _set("shape", [48, 300]),
    "shape-text": _set("shape", "many"),
    "offsets-beyond": _set("data_offsets", [0, 10**12]),
    "offsets-backwards": _set("data_offsets", [100, 0]),
    "offsets-negative": _set("data_offsets", [-8, 0]),
    "offsets-overlap": _set("data_offsets", [4, 57604]),
    "offsets-missing": _header(lambda header: _first(header).pop("data_offsets") and None),
    "tensor-missing": _header(lambda header: header.pop(next(n for n in header if n != "__metadata__")) and None),
    "tensor-further": _header(lambda header: header.update({"\x1b[31mnope\nerror: forged": _first(header)})),
    "tensors-swapped": _header(_swap),
    "metadata-of-list": _header(lambda header: header.update({"__metadata__": []})),
    "nan-weights": _numbers(struct.pack("<f", float("nan"))),
    "infinite-weights": _numbers(struct.pack("<f", float("inf"))),
    "large-weights": _numbers(struct.pack("<f", 3e38)),
    "zero-weights": _numbers(b"\0\0\0\0"),
}
# weight_map of an index, by what its names are; TENSORS stands for a whole map to that file.
INDEXES: dict[str, object] = {
    "parent": "../other/model.safetensors",
    "absolute": "/etc/passwd",
    "home": "../../home/.profile",
    "device": "/dev/zero",
    "fifo": "fifo.safetensors",
    "hidden": ".hidden.safetensors",
    "directory": "directory.safetensors",
    "missing": "nowhere.safetensors",
    "not-weights": "tokenizer.json",
    "pickle": "pytorch_model.bin",
    "empty-name": "",
    "null-byte": "a\0b",
    "long-name": "x" * 300,
    "escape": "\x1b[31m\nerror: forged",
    "surrogate": "\ud800",
    "number": 5,
    "null": None,
    "list": ["part.safetensors"],
    "link-out": "link.safetensors",
    "map-of-list": GONE,
}


def _index(path: Path, name: object) -> None:
    content = (path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    names = [key for key in json.loads(content[8 : 8 + length]) if key != "__metadata__"]
    other = path.parent / "other"
    other.mkdir()
    shutil.move(path / "model.safetensors", other / "model.safetensors")
    os.mkfifo(path / "fifo.safetensors")
    (path / "directory.safetensors").mkdir()
    (path / "link.safetensors").symlink_to(other / "model.safetensors")
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    shutil.copy(other / "model.safetensors", path / ".hidden.safetensors")
    weights = ["part"] if name is GONE else dict.fromkeys(names, name)
    write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": weights})


def _adapter(**changed: object) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        base = path.parent / "base"
        shutil.move(path, base)
        path.mkdir()
        keys = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 4,
                "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}  # fmt: skip
        write_json(path / "adapter_config.json", keys | changed)
        shutil.copy(base / "model.safetensors", path / "adapter_model.safetensors")

    return do


def _only(*names: str) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        for file in path.iterdir():
            if file.name not in names:
                file.unlink()

    return do


def _pickle(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


DIRECTORIES: dict[str, Callable[[Path], None]] = {
    "empty": _only(),
    "config-alone": _only("config.json"),
    "without-tokenizer": _only("config.json", "model.safetensors"),
    "pickle-alone": _pickle,
    "adapter-of-itself": _adapter(base_model_name_or_path="."),
    "adapter-of-nothing": _adapter(base_model_name_or_path=""),
    "adapter-of-list": _adapter(base_model_name_or_path=["a"]),
    "adapter-rank-zero": _adapter(r=0),
    "adapter-rank-text": _adapter(r="two"),
    "adapter-rank-huge": _adapter(r=10**12),
    "adapter-alpha-nan": _adapter(lora_alpha=float("nan")),
    "adapter-targets-number": _adapter(target_modules=7),
    "adapter-targets-pattern": _adapter(target_modules="(a+)+$"),
    "adapter-type": _adapter(peft_type="../code"),
    "adapter-auto-mapping": _adapter(auto_mapping={"base_model_class": "code", "parent_library": "code"}),
    "adapter-revision-list": _adapter(revision=[1]),
    "adapter-foreign-weights": _adapter(),
}

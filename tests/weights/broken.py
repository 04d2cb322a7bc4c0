"""Broken model directories, by a seed, and what becomes of each: `python -m tests.weights.broken [SEED [COUNT]]`.

A directory holds the small model of `tests/golden/trl/tiny` with one thing broken. A process of its own finds the
model, loads its weights, chooses its template and renders two pairs. It may end soon in one line, or not mind.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.places import GOLDEN

BASE = GOLDEN / "trl/tiny"
SECONDS, BYTES = 20, 2 << 30  # of one directory
CONFIG, GENERATION, WEIGHTS, INDEX = (
    "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
)  # fmt: skip
TOKENIZER, TOKENIZER_CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
DEEP = "[" * 100_000 + "]" * 100_000
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
ENDS = "{% endfor %}{% endfor %}{% endfor %}"
VALUES = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1", "0", "1", "1e308", "1e-320", "1000000000000", str(2**70),
    "9" * 5000, '"x"', '""', "[]", "[[1]]", "{}", '{"a": {"b": []}}', "null", "true", "false", "0.5", '"\\ud800"',
    "[" * 5000 + "]" * 5000,
)  # fmt: skip
NUMBERS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "hidden_act", "attention_bias",
    "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "eos_token_id", "pad_token_id",
    "bos_token_id", "architectures", "model_type", "quantization_config", "mlp_bias", "dtype", "initializer_range",
)  # fmt: skip
ROPES = (
    {"rope_type": "linear", "factor": 0}, {"rope_type": "linear", "factor": "8"}, {"rope_type": "linear", "factor": -1},
    {"rope_type": "linear", "factor": float("nan")}, {"rope_type": "linear", "factor": 1e400},
    {"rope_type": ["linear"]}, {"rope_type": None}, {"type": 3}, {"rope_theta": "x", "rope_type": "default"},
    {"rope_theta": -1, "rope_type": "default"}, {"rope_theta": 0, "rope_type": "default"},
    {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,
     "original_max_position_embeddings": 0},
    {"rope_type": "llama3", "factor": 0, "low_freq_factor": 0, "high_freq_factor": 0,
     "original_max_position_embeddings": 8},
    {"rope_type": "longrope", "short_factor": [0] * 6, "long_factor": "x", "original_max_position_embeddings": 8},
    {"rope_type": "longrope", "short_factor": ["x"] * 6, "long_factor": [1] * 6, "original_max_position_embeddings": 8},
    {"rope_type": "longrope", "short_factor": [1] * 6, "long_factor": [1] * 6, "original_max_position_embeddings": 0},
)  # fmt: skip
TEMPLATES = {
    "syntax": "{% for m in messages %}",
    "syntax2": "{{ messages[0].content",
    "unknown tag": "{% frobnicate %}",
    "unknown filter": "{{ messages | frobnicate }}",
    "unknown function": "{{ frobnicate(messages) }}",
    "include": "{% include '/etc/passwd' %}",
    "include nothing": "{% include 'x' ignore missing %}{{ messages[0].content }}",
    "import": "{% import 'x' as y %}",
    "from import": "{% from 'x' import y %}",
    "extends": "{% extends 'base.html' %}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['os'].system('touch /tmp/escaped') }}",
    "init": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "format escape": "{{ '{0.__class__}'.format(messages) }}",
    "mutation": "{% set _ = messages.append(messages[0]) %}{{ messages }}",
    "mutation2": "{% set _ = messages.clear() %}{{ messages[0].content }}",
    "raises": "{{ raise_exception('no') }}",
    "divides": "{{ 1 // 0 }}",
    "endless": LOOPS + ENDS,
    "endless set": LOOPS + "{% set x = a %}" + ENDS,
    "endless macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(200) }}",
    "endless call": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "endless output": LOOPS + "{{ messages[0].content }}" + ENDS,
    "endless filter": "{{ range(99999) | map('string') | join | list | sort | join | length }}" + LOOPS + ENDS,
    "power": "{{ 10 ** 10 ** 10 }}",
    "power2": "{{ (7 ** 9999999) | string | length }}",
    "string times": "{{ 'a' * 10000000000 }}",
    "string times 2": "{{ 'abcdefgh' * 9999999999999999 }}",
    "list times": "{{ ([0] * 9999999999) | length }}",
    "center": "{{ 'x' | center(9999999999) }}",
    "indent": "{{ 'x\ny' | indent(99999999999) }}",
    "ljust": "{{ 'x'.ljust(9999999999) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999).replace('b', 'c' * 99999) }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "doubling plus": "{% set n = namespace(x=['a']) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "range": "{{ range(9999999999) | list | length }}",
    "long words": "{{ lipsum(n=9999999) }}",
    "much output": "{% for i in range(99999) %}{{ '0123456789' * 9999 }}{% endfor %}",
    "only for pairs": "{% for m in messages %}{% if 'tide' in m.content %}" + LOOPS + ENDS
    + "{% endif %}{{ m.content }}<|end|>{% endfor %}",
    "eats for pairs": "{% for m in messages %}{% if 'tide' in m.content %}{{ 'a' * 99999999999 }}{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}",
    "empty": " ",
    "nothing": "{# nothing #}",
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "nested": "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "nul": "{{ messages[0].content }}\0",
    "long": "{{ messages[0].content }}" * 200_000,
}  # fmt: skip
TOKENIZER_KEYS = (
    "tokenizer_class", "eos_token", "pad_token", "added_tokens_decoder", "chat_template", "extra_special_tokens",
    "model_max_length", "additional_special_tokens", "split_special_tokens", "backend", "padding_side",
    "model_input_names", "clean_up_tokenization_spaces", "auto_map",
)  # fmt: skip


def _with(file, **keys):
    """A JSON file of the directory with keys of other values, each a JSON text; None takes one away."""

    def change(directory):
        held = {k: json.dumps(v) for k, v in json.loads((directory / file).read_text()).items()}
        held = {k: v for k, v in (held | keys).items() if v is not None}
        text = ", ".join(f"{json.dumps(k)}: {v}" for k, v in held.items())
        (directory / file).write_text(f"{{{text}}}", encoding="utf-8")

    return change


def _in_place(file, kind):
    """Something else in a file's place."""

    def change(directory):
        path = directory / file
        old = path.read_bytes() if path.is_file() else b"{}"
        path.unlink(missing_ok=True)
        if kind == "directory":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "link to itself":
            path.symlink_to(path.name)
        elif kind == "link to nowhere":
            path.symlink_to("nowhere")
        elif kind.startswith("/dev"):
            path.symlink_to(kind)
        elif kind != "missing":
            contents = {
                "empty": b"", "cut": old[: len(old) // 2], "null": b"null", "list": b"[1, 2]", "number": b"7",
                "string": b'"x"', "deep": DEEP.encode(), "deep key": b'{"a": ' + DEEP.encode() + b"}",
                "utf-16": old[:2000].decode("latin-1").encode("utf-16"), "bytes": bytes(range(256)) * 40,
                "bom": b"\xef\xbb\xbf" + old, "cut by one": old[:-1], "one more": old + b"x",
            }  # fmt: skip
            path.write_bytes(contents[kind])

    return change


def _header(change):
    """Weights whose header is another: `change(header, data)` gives new bytes or a header."""

    def broken(directory):
        held = (directory / WEIGHTS).read_bytes()
        size = struct.unpack("<Q", held[:8])[0]
        header, data = json.loads(held[8 : 8 + size]), held[8 + size :]
        new = change(header, data)
        if not isinstance(new, bytes):
            text = json.dumps(new).encode()
            new = struct.pack("<Q", len(text)) + text + data
        (directory / WEIGHTS).write_bytes(new)

    return broken


def _entry(**changed):
    """The first tensor's entry with other values."""

    def change(header, data):
        name = next(key for key in header if key != "__metadata__")
        return header | {name: header[name] | changed}

    return _header(change)


def _headers():
    pack = lambda size, rest: struct.pack("<Q", size) + rest
    yield "no header", _header(lambda h, d: b"")
    yield "short", _header(lambda h, d: b"\0\0\0")
    for size in (0, 1, 2**63, 2**64 - 1, 10**9, 100_000_001, 10**12):
        yield f"header of {size}", _header(lambda h, d, size=size: pack(size, json.dumps(h).encode() + d))
    for text in (b"null", b"[]", b"7", b'{"a"', DEEP.encode(), b"{}", b'{"a": null}', b'{"a": {"dtype": "F32"}}'):
        yield f"header {text[:12]!r}", _header(lambda h, d, text=text: pack(len(text), text + d))
    for end in (-1, 2**31, 2**40, 2**63, 2**64, 2**70, 1.5, "x", None, True):
        yield f"offsets to {end}", _entry(data_offsets=[0, end])
    for offsets in ([8, 4], [1], [], {}, [0, 4], [-4, 4], [0, 0, 0]):
        yield f"offsets {offsets}", _entry(data_offsets=offsets)
    for shape in ([], [0], [-1], [2**40, 2**40], [1.5], "x", None, [[1]], [2**63], [1] * 100, [True]):
        yield f"shape {str(shape)[:30]}", _entry(shape=shape)
    for dtype in ("F64", "I64", "F8_E4M3", "X", "", 7, None, [], "BF16", "F4"):
        yield f"dtype {dtype!r}", _entry(dtype=dtype)
    yield "another name", _header(lambda h, d: {("x" + k if k != "__metadata__" else k): v for k, v in h.items()})
    empty = lambda d: {"dtype": "F32", "shape": [0], "data_offsets": [len(d)] * 2}
    yield "many", _header(lambda h, d: h | {f"t{i}": empty(d) for i in range(200_000)})
    yield "metadata", _header(lambda h, d: h | {"__metadata__": {"format": {"a": 1}}})
    forged = "\x1b[31m\nerror: forged"
    yield "odd name", _header(lambda h, d: {(forged if k.endswith("norm.weight") else k): v for k, v in h.items()})
    yield "data cut", lambda at: os.truncate(at / WEIGHTS, (at / WEIGHTS).stat().st_size - 100)
    yield "data longer", lambda at: os.truncate(at / WEIGHTS, (at / WEIGHTS).stat().st_size + 1000)
    yield (
        "data twice",
        _header(
            lambda h, d: {
                k: (
                    v if k == "__metadata__" else v | {"data_offsets": [0, v["data_offsets"][1] - v["data_offsets"][0]]}
                )
                for k, v in h.items()
            }
        ),
    )


def _index(weight_map, *, whole=None):
    """An index in place of the one file, which is moved to where a path that leaves the directory would find it."""

    def change(directory):
        held = (directory / WEIGHTS).read_bytes()
        names = json.loads(held[8 : 8 + struct.unpack("<Q", held[:8])[0]])
        shard = directory / "model-00001-of-00001.safetensors"
        (directory / WEIGHTS).rename(shard)
        (directory.parent / "outside.safetensors").write_bytes(held)
        (directory / "sub").mkdir()
        shutil.copy(shard, directory / "sub" / "x.safetensors")
        if weight_map == "fifo.safetensors":
            os.mkfifo(directory / weight_map)
        (directory / "link.safetensors").symlink_to("../outside.safetensors")
        value = {"weight_map": {k: weight_map for k in names if k != "__metadata__"}} if whole is None else whole
        (directory / INDEX).write_text(value if isinstance(value, str) else json.dumps(value))

    return change


def _adapter(weights=True, **keys):
    """An adapter on the model."""

    def change(directory):
        import numpy as np
        from safetensors.numpy import save_file

        base = directory.parent / "base"
        shutil.copytree(BASE, base)
        for path in directory.iterdir():
            path.unlink()
        said = {"peft_type": '"LORA"', "r": "2", "lora_alpha": "4", "base_model_name_or_path": json.dumps(str(base))}
        said = {k: v for k, v in (said | keys).items() if v is not None}
        text = ", ".join(f'"{k}": {v}' for k, v in said.items())
        (directory / "adapter_config.json").write_text(f"{{{text}}}")
        module = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
        if callable(weights):
            weights(directory / "adapter_model.safetensors")
        elif weights:
            pair = {module + "A.weight": np.zeros((2, 48), "f4"), module + "B.weight": np.zeros((48, 2), "f4")}
            save_file(pair, directory / "adapter_model.safetensors")

    return change


def _evil(file, key="AutoTokenizer", **more):
    """A file of code that `auto_map` names; run, it leaves a mark."""

    def change(directory):
        (directory / "evil.py").write_text(f"open({str(directory.parent / 'escaped')!r}, 'w')\nclass Evil: pass\n")
        value = ["evil.Evil", "evil.Evil"] if key == "AutoTokenizer" else "evil.Evil"
        _with(file, auto_map=json.dumps({key: value}), **more)(directory)

    return change


def kinds():
    """All ways to break a directory, by the kind of thing that is broken: (words, a change of a sound directory)."""
    all_of = {"config.json": [], "files": [], "templates": [], "tokenizer": [], "weights": [], "index": [], "peft": []}
    for key in NUMBERS:
        all_of["config.json"].append((f"{key} missing", _with(CONFIG, **{key: None})))
        all_of["config.json"] += [(f"{key}={value[:20]}", _with(CONFIG, **{key: value})) for value in VALUES]
    for rope in ROPES:
        for key in ("rope_parameters", "rope_scaling"):
            changed = {"rope_parameters": None} | {key: json.dumps(rope)}
            all_of["config.json"].append((f"{key}={rope}", _with(CONFIG, **changed)))
    all_of["config.json"] += [
        ("many layers", _with(CONFIG, num_hidden_layers="1000000000")),
        ("wide", _with(CONFIG, hidden_size="4800000", vocab_size="3000000")),
        ("experts", _with(CONFIG, model_type='"mixtral"', num_local_experts="100000000", num_experts_per_tok="2")),
        ("no experts", _with(CONFIG, model_type='"mixtral"', num_local_experts="2", num_experts_per_tok="5")),
        ("window", _with(CONFIG, model_type='"mistral"', sliding_window="-5")),
        ("window x", _with(CONFIG, model_type='"mistral"', sliding_window='"x"')),
        ("layer types", _with(CONFIG, model_type='"qwen2"', layer_types='[["a"]]', use_sliding_window="true")),
        ("layers max", _with(CONFIG, model_type='"qwen2"', max_window_layers="-7", use_sliding_window="true")),
        ("softcap", _with(CONFIG, model_type='"gemma2"', attn_logit_softcapping="0")),
        ("scalar", _with(CONFIG, model_type='"gemma2"', query_pre_attn_scalar="-1")),
        ("pattern", _with(CONFIG, model_type='"gemma3_text"', sliding_window_pattern="0")),
        ("auto_map", _evil(CONFIG, "AutoConfig")),
        ("auto_map of a tokenizer", _evil(CONFIG)),
        ("unknown and auto_map", _evil(CONFIG, "AutoConfig", model_type='"evil"')),
        ("odd heads", _with(CONFIG, num_attention_heads="5", num_key_value_heads="3", head_dim=None)),
        ("more kv heads", _with(CONFIG, num_key_value_heads="8")),
        ("odd width", _with(CONFIG, head_dim="13")),
    ]
    tokens = (*VALUES, "[1, null]", "[1.5]", "[-1]", "[300]", "[99999999999]", '["</s>"]', "[true]", "299.0")
    for key in ("eos_token_id", "bos_token_id", "temperature", "top_k", "stop_strings", "transformers_version"):
        all_of["files"] += [(f"generation {key}={v[:20]}", _with(GENERATION, **{key: v})) for v in tokens]
    things = (
        "directory", "fifo", "link to itself", "link to nowhere", "/dev/zero", "/dev/null", "missing", "empty", "cut",
        "null", "list", "number", "string", "deep", "deep key", "utf-16", "bytes", "bom", "cut by one", "one more",
    )  # fmt: skip
    names = (CONFIG, GENERATION, WEIGHTS, TOKENIZER, TOKENIZER_CONFIG, TEMPLATE, INDEX, "added_tokens.json")
    names += ("special_tokens_map.json", "chat_template.json", "vocab.json")
    all_of["files"] += [(f"{kind} at {file}", _in_place(file, kind)) for file in names for kind in things]
    for words, text in TEMPLATES.items():
        all_of["templates"].append((words, lambda at, text=text: (at / TEMPLATE).write_text(text)))
        in_json = _with(TOKENIZER_CONFIG, chat_template=json.dumps(text))
        all_of["templates"].append((f"{words} in JSON", lambda at, f=in_json: ((at / TEMPLATE).unlink(), f(at))))
    for key in TOKENIZER_KEYS:
        all_of["tokenizer"] += [(f"{key}={v[:20]}", _with(TOKENIZER_CONFIG, **{key: v})) for v in VALUES]
    all_of["tokenizer"] += [
        ("auto_map", _evil(TOKENIZER_CONFIG)),
        ("auto_map of a class", _evil(TOKENIZER_CONFIG, tokenizer_class='"Evil"')),
        ("auto_map of the hub", _with(TOKENIZER_CONFIG, auto_map='{"AutoTokenizer": ["a/b--evil.Evil", null]}')),
        ("ids", _with(TOKENIZER_CONFIG, added_tokens_decoder='{"x": {"content": "a"}}')),
        ("big ids", _with(TOKENIZER_CONFIG, added_tokens_decoder='{"99999999999": {"content": "a"}}')),
        ("templates", _with(TOKENIZER_CONFIG, chat_template='[{"name": 1}]')),
        ("class of others", _with(TOKENIZER_CONFIG, tokenizer_class='"os.system"')),
        ("python class", _with(TOKENIZER_CONFIG, tokenizer_class='"BertTokenizer"')),
        ("escape", _with(TOKENIZER_CONFIG, eos_token='"\\u001b[31m\\nerror: forged"')),
    ]
    for key in ("model", "normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens", "version"):
        all_of["tokenizer"] += [(f"json {key}={v[:20]}", _with(TOKENIZER, **{key: v})) for v in VALUES]
    all_of["tokenizer"] += [
        (f"model {m[:50]}", _with(TOKENIZER, model=m))
        for m in (
            '{"type": "BPE", "vocab": {}, "merges": []}', '{"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}',
            '{"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}', '{"type": "Unigram", "vocab": [["a", "x"]]}',
            '{"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}',
            '{"type": "Unigram", "vocab": [], "unk_id": 9}',
        )
    ]  # fmt: skip
    all_of["weights"] += _headers()
    names = (
        "../outside.safetensors", "/etc/passwd", "", ".", "..", "sub", "sub/x.safetensors", "./x", "a\0b", "a" * 300,
        "fifo.safetensors", "nothing.safetensors", "\ud800", "link.safetensors", "config.json", "x\n\x1b[31m", 7, None,
        [], {}, True, "~/x", "model.safetensors/../x",
    )  # fmt: skip
    all_of["index"] += [(f"file {str(name)[:24]!r}", _index(name)) for name in names]
    wholes = (
        {}, {"weight_map": None}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": "x"}, [], "null", DEEP, "{",
        '{"weight_map": ' + DEEP + "}", {"weight_map": {"a": {"b": 1}}},
        {"weight_map": {f"t{i}": f"f{i}" for i in range(100_000)}},
    )  # fmt: skip
    all_of["index"] += [(f"index {str(whole)[:24]}", _index("", whole=whole)) for whole in wholes]
    for key in ("peft_type", "r", "lora_alpha", "base_model_name_or_path", "rank_pattern", "alpha_pattern", "bias"):
        all_of["peft"] += [(f"{key}={v[:20]}", _adapter(**{key: v})) for v in VALUES]
    for pattern in ('{"(": 1}', '{"(a+)+$": 2}', '{"q_proj": 0}', '{"q_proj": 1e400}', '{"q_proj": "x"}'):
        all_of["peft"].append((f"pattern {pattern}", _adapter(rank_pattern=pattern)))
    all_of["peft"] += [
        ("sound", _adapter()),
        ("no weights", _adapter(weights=False)),
        ("weights a fifo", _adapter(weights=os.mkfifo)),
        ("weights a directory", _adapter(weights=os.mkdir)),
        ("weights of zeros", _adapter(weights=lambda path: path.write_bytes(bytes(1000)))),
        ("revision", _adapter(revision="7")),
        ("auto_mapping", _adapter(auto_mapping='{"base_model_class": "Evil", "parent_library": "evil"}')),
        ("pattern keys", _adapter(layers_to_transform="NaN")),
    ]
    return all_of


def chosen(seed, count):
    """`count` ways by a seed, about evenly of all kinds: (kind, words, change)."""
    rng, all_of = random.Random(seed), kinds()
    shuffled = {kind: rng.sample(some, len(some)) for kind, some in all_of.items()}
    weights = {"config.json": 5, "files": 4, "templates": 4, "tokenizer": 3, "weights": 3, "index": 2, "peft": 2}
    turns = [kind for kind, n in weights.items() for _ in range(n)]
    out = []
    while len(out) < count and any(shuffled.values()):
        out += [(kind, *shuffled[kind].pop()) for kind in turns if shuffled[kind]]
    return out[:count]


def _use(directory):
    """What a run does with a model before it trains: 0, or 2 with a line."""
    from dpo_jax.data.comparison import Comparison, LabeledComparison
    from dpo_jax.data.render import make_renderer, render_batch
    from dpo_jax.errors import UserError
    from dpo_jax.weights.load import load_policy

    say = lambda text: ({"role": "assistant", "content": text},)
    ask = ({"role": "user", "content": "When is the tide high?"},)
    pairs = [LabeledComparison(Comparison(ask, say("At noon."), say(f"No {n}.")), "A") for n in range(2)]
    try:
        policy, _, _ = load_policy(directory)
        policy.hf_config()
        policy.tokens_beyond()
        render_batch(make_renderer(policy.tokenizer), pairs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.code
    return 0


def _memory(pid):
    """Bytes that a process and its children have in memory."""
    try:
        own = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    return own + sum(_memory(int(child)) for child in children)


def try_one(change):
    """Break a directory and use it: (verdict, seconds, what it said). A sound verdict is "used" or "refused"."""
    with tempfile.TemporaryDirectory() as place:
        directory, said = Path(place) / "model", Path(place) / "said"
        shutil.copytree(BASE, directory)
        change(directory)
        began, pid = time.monotonic(), os.fork()
        if not pid:
            try:
                os.setsid()
                out = os.open(said, os.O_CREAT | os.O_RDWR)
                yes = os.memfd_create("yes")
                os.write(yes, b"y\n" * 1000)
                os.lseek(yes, 0, 0)
                os.dup2(yes, 0)
                os.dup2(out, 1)
                os.dup2(out, 2)
                os.environ["HF_MODULES_CACHE"] = str(Path(place) / "modules")
                code = _use(directory)
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 1
            os._exit(code)
        verdict = ""
        while not verdict:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                verdict = {0: "used", 2: "refused", 1: "traceback"}.get(code, f"code {code}")
            elif time.monotonic() - began > SECONDS:
                verdict = "never ends"
            elif _memory(pid) > BYTES:
                verdict = "takes all memory"
            else:
                time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        if not done:
            os.waitpid(pid, 0)
        text = said.read_text(errors="replace") if said.exists() else ""
        lines = [line for line in text.splitlines() if line.strip()]
        if (Path(place) / "escaped").exists() or Path("/tmp/escaped").exists():
            verdict = "runs code"
        elif "Traceback" in text:
            verdict = "traceback"
        elif verdict in ("used", "refused") and len(lines) != (verdict == "refused"):
            verdict = f"{verdict} in {len(lines)} lines"
        return verdict, time.monotonic() - began, lines[-1] if lines else ""


def prepare():
    """Import in this process, once for all directories, what a run imports; no device is opened."""
    from transformers import AutoTokenizer

    import dpo_jax.data.render
    import dpo_jax.weights.load  # noqa: F401

    AutoTokenizer.from_pretrained(BASE)


def main(seed="1", count="300", only=""):
    prepare()
    counts, slowest = Counter(), 0.0
    for kind, words, change in chosen(int(seed), int(count)):
        if only and only not in f"{kind}: {words}":
            continue
        verdict, seconds, line = try_one(change)
        counts[verdict] += 1
        slowest = max(slowest, seconds)
        print(f"{verdict:18}{seconds:5.1f} s  {kind}: {words!r}  {line!r}", flush=True)
    print(f"{sum(counts.values())} directories: {dict(counts.most_common())}; slowest {slowest:.1f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])

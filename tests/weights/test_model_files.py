"""Model directories that were not made by a trainer: what is no file, no JSON, of another shape, or a program."""

import contextlib
import json
import os
import shutil
import struct

import pytest

from dpo_jax.errors import UserError
from dpo_jax.weights import huggingface as weights
from dpo_jax.weights import merged
from dpo_jax.weights.find import find_policy
from dpo_jax.weights.hub import local_model, resolve_model
from dpo_jax.weights.model_files import GenerationConfig, check_files, check_tokenizer, read_model_json
from dpo_jax.weights.stored import check_weights, open_tensors
from tests.places import GOLDEN

TINY = GOLDEN / "trl/tiny"


@pytest.fixture
def model(tmp_path):
    """A directory with a sound model."""
    return shutil.copytree(TINY, tmp_path / "model")


def change(path, **keys):
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def put_fifo(path):
    os.mkfifo(path)


PUT = {
    "directory": os.mkdir,
    "pipe": put_fifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "Too many levels": lambda path: path.symlink_to(path.name),
    "No such file": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("name", ["generation_config.json", "model.safetensors", "chat_template.jinja", "vocab.json"])
@pytest.mark.parametrize("words", PUT)
def test_what_is_no_file_is_never_opened(name, words, model):
    (model / name).unlink(missing_ok=True)
    PUT[words](model / name)
    with pytest.raises(UserError, match=f"{name}: .*{words}"):
        resolve_model(str(model))


def test_other_things_in_a_directory_are_left_alone(model):
    os.mkfifo(model / "socket")
    (model / "checkpoints").mkdir()
    check_files(model)


def test_a_file_larger_than_any_is_not_read(model):
    os.truncate(model / "config.json", 1 << 34)
    with pytest.raises(UserError, match=r"config\.json: has 17,179,869,184 bytes"):
        check_files(model)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": ' + "[" * 40 + "]" * 40 + "}", "nested more than 32 levels"),
        ('{"a": ' + "[" * 10**6, "nested too deeply|not valid JSON"),
        ('{"a": {"b": [1, NaN]}}', r"a\.b\.1 is nan"),
        ('{"a": 1e999}', "a is inf"),
        ("[]", "needs an object"),
        ('{"a"', "not valid JSON"),
        ('{"temperature": "hot"}', 'temperature is "hot", must be a valid number'),
        ('{"eos_token_id": [1, null]}', r"eos_token_id\.1 is null"),
        ('{"eos_token_id": true}', "eos_token_id is true"),
    ],
)
def test_json_is_believed_in_its_shape_only(text, words, tmp_path):
    (tmp_path / "g.json").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_model_json(tmp_path / "g.json", GenerationConfig)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


# ------------------------------------------------------------------------------------------------------- other code


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_code_of_a_tokenizer_is_refused_by_its_key(file, model, monkeypatch):
    (model / "evil.py").write_text("raise SystemExit('it ran')\n")
    change(model / file, auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match=f"{file}: auto_map names code of the model's author, which is never run"):
        find_policy(str(model), model, 0)


def test_code_of_a_model_is_neither_run_nor_exported(model, tmp_path):
    """Published models of supported families have such a key (Phi-3); what they mean by it, transformers has itself."""
    (model / "evil.py").write_text("raise SystemExit('it ran')\n")
    change(model / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    policy = find_policy(str(model), model, 0)
    assert policy.tokenizer.decode(policy.tokenizer.encode("good")).strip() == "good"
    params = weights.load_weights(model, policy.config, _one_device(), "float32")
    weights.save_weights(params, policy.hf_config(), tmp_path / "export", dtype="float32")
    assert "auto_map" not in json.loads((tmp_path / "export/config.json").read_text())


def _one_device():
    import jax

    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"tokenizer_class": 7}, "tokenizer_class is 7"),
        ({"chat_template": 7}, "chat_template"),
        ({"chat_template": [{"name": "default"}]}, "chat_template"),
        ({"eos_token": ["a"]}, "eos_token"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder.*must be a token's number"),
        ({"added_tokens_decoder": {"7": {"content": 1}}}, "added_tokens_decoder"),
        ({"model_max_length": "long"}, 'model_max_length is "long"'),
        ({"tokenizer_file": "../other/tokenizer.json"}, "tokenizer_file: '../other/tokenizer.json' is not in this"),
        ({"fast_tokenizer_files": ["../other/tokenizer.json"]}, "fast_tokenizer_files"),
    ],
)
def test_a_tokenizers_keys_have_their_shape(keys, words, model):
    (model.parent / "other").mkdir()
    shutil.copy(model / "tokenizer.json", model.parent / "other")
    change(model / "tokenizer_config.json", **keys)
    with pytest.raises(UserError, match=rf"tokenizer_config\.json: {words}") as caught:
        check_tokenizer(model)
    assert "\n" not in str(caught.value)


def test_a_path_that_leads_nowhere_is_only_old(model):
    change(model / "tokenizer_config.json", tokenizer_file="/home/nobody/tokenizer.json")
    check_tokenizer(model)


# -------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors", "/x.safetensors", "sub/x.safetensors", "", ".", "..", ".safetensors", "a\0.safetensors", 7,
        "x.bin", "\x1b[31m.safetensors", "a\n.safetensors", None, ["x.safetensors"], "\\x.safetensors",
    ],
)  # fmt: skip
def test_an_index_names_files_beside_it(name, model):
    (model / "model.safetensors").rename(model.parent / "x.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with contextlib.ExitStack() as files, pytest.raises(UserError, match="weight_map") as caught:
        open_tensors(model, files)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [b"", b"\0" * 7, struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 4) + b"null", struct.pack("<Q", 2) + b"{}"],
)
def test_headers_that_lie_are_damaged_files(header, model):
    config, _ = weights.read_config(model)
    (model / "model.safetensors").write_bytes(header)
    with pytest.raises(UserError, match=r"damaged or incomplete|is missing|hold 0"):
        check_weights(model, config)


def test_numbers_without_weights_for_them_are_refused_before_anything_is_listed(model):
    wide = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2}
    change(model / "config.json", num_hidden_layers=4096, hidden_size=2**20, **wide)
    with pytest.raises(UserError, match=r"config\.json: its numbers make a model of [0-9,]{10,} parameters"):
        find_policy(str(model), model, 0)


def test_weights_are_compared_when_the_model_is_found(model):
    change(model / "config.json", intermediate_size=95)
    with pytest.raises(UserError, match=r"has shape \(96, 48\), config.json needs \(95, 48\)"):
        find_policy(str(model), model, 0)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"rank_pattern": {"(": 2}}, "pattern '\\(' is no regular expression"),
        ({"rank_pattern": {"(((.{999}){999}){999}){999}": 2}}, "must be a pattern of at most 300 letters"),
        ({"rank_pattern": {"(.|.|.)+[^j]": 2}}, "takes for ever"),
        ({"r": 0}, "r is 0, must be at least 1"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"base_model_name_or_path": 7}, "base_model_name_or_path"),
    ],
)
def test_an_adapters_keys_have_their_shape(keys, words, tmp_path, monkeypatch):
    monkeypatch.setattr(merged, "_PATTERN_SECONDS", 0.1)
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(TINY)} | keys
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    with contextlib.ExitStack() as files, pytest.raises(UserError, match=words):
        merged.read_adapter(tmp_path, files)


@pytest.mark.parametrize("name", ["a" * 5000, "~nobody_is_called_this/model", "/" + "a" * 300, "a\0b/c/d"])
def test_names_that_no_system_takes(name):
    with pytest.raises(UserError, match="model="):
        local_model(name)

"""Adapters in PEFT's layout as a model: merged into the base's tensors as they are read, or refused by name."""

import contextlib
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpo_jax.errors import UserError
from dpo_jax.model.lora import on_model
from dpo_jax.model.options import Lora
from dpo_jax.weights import huggingface as weights
from dpo_jax.weights import peft as peft_files
from dpo_jax.weights.hub import ModelFiles, resolve_model
from dpo_jax.weights.merged import merge_adapter
from dpo_jax.weights.stored import open_tensors
from tests.model.families import GOLDEN, TextPairs, difference, sequence_logits
from tests.weights.test_peft import _adapters

LLAMA = GOLDEN / "llama_untied_gqa"


def _adapter(directory, base=LLAMA, *, config=None, change=None, **lora):
    """An adapter of ours on a recorded base, its config and tensors changed."""
    numbers = weights.read_config(base)[0]
    made = on_model(numbers, Lora(**{"rank": 3, "alpha": 12.0, "targets": ("q", "v", "down")} | lora))
    peft_files.save_adapters(_adapters(numbers, made), numbers, made, directory, base=str(base))
    _change(directory, config or {}, change)
    return directory


def _change(directory, config, change=None):
    path, file = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if change:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)


def _merged(files, config):
    return weights.load_weights(
        files.directory, config, jax.sharding.SingleDeviceSharding(jax.devices()[0]), "float32", adapter=files.adapter
    )


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["llama_untied_gqa", "phi3", "gemma2"])
def test_it_is_the_export_that_the_same_adapters_were_merged_into(name, rslora, tmp_path):
    config, hf = weights.read_config(GOLDEN / name)
    lora = on_model(config, Lora(3, 12.0, ("all",), rslora=rslora))
    adapters = _adapters(config, lora)
    base = _merged(ModelFiles(GOLDEN / name), config)
    weights.save_weights(base | adapters, hf, tmp_path / "whole", dtype="float32", lora_scale=lora.scale)
    peft_files.save_adapters(adapters, config, lora, tmp_path / "adapter", base=str(GOLDEN / name))
    files = resolve_model(str(tmp_path / "adapter"))
    assert files == ModelFiles(GOLDEN / name, tmp_path / "adapter")
    found, expected = _merged(files, config), _merged(ModelFiles(tmp_path / "whole"), config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), found, base)
    assert moved["layers"]["attention"]["q"] > 0.1


def test_parts_are_the_parts_of_the_whole():
    rng = np.random.default_rng(0)
    w, a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((6, 8), (2, 8), (6, 2)))
    from dpo_jax.weights.merged import _Merged

    class Slice:
        __getitem__ = lambda self, part: w[part]

    merged = _Merged(Slice(), a, b, 0.5)
    for part in ((slice(0, 6), slice(0, 8)), (slice(2, 5), slice(1, 3)), (slice(3, 4),), slice(0, 2)):
        np.testing.assert_allclose(merged[part], (w + 0.5 * b @ a)[part], rtol=1e-5)


def test_patterns_of_rank_and_alpha_and_modules_trained_as_a_whole(tmp_path):
    head = np.random.default_rng(3).normal(size=load_file(LLAMA / "model.safetensors")["lm_head.weight"].shape)

    def change(tensors):
        tensors["base_model.model.lm_head.weight"] = head.astype(np.float32)
        for key in [key for key in tensors if "layers.0.self_attn.q_proj" in key]:
            at = (slice(None), slice(0, 2)) if "lora_B" in key else slice(0, 2)
            tensors[key] = np.ascontiguousarray(tensors[key][at])

    said = {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 30, r".*\.down_proj": 6}}
    directory = _adapter(tmp_path / "adapter", config=said | {"modules_to_save": ["lm_head"]}, change=change)
    tensors, base = load_file(directory / "adapter_model.safetensors"), load_file(LLAMA / "model.safetensors")
    with contextlib.ExitStack() as files:
        stored = open_tensors(LLAMA, files)
        found = {name: np.asarray(t[:]) for name, t in merge_adapter(stored, directory, files, tied=False).items()}
    np.testing.assert_array_equal(found.pop("lm_head.weight"), head.astype(np.float32))
    for name, tensor in found.items():
        module = "base_model.model." + name.removesuffix(".weight")
        expected = base[name]
        if f"{module}.lora_A.weight" in tensors:
            a, b = (tensors[f"{module}.lora_{x}.weight"].astype(np.float64) for x in "AB")
            alpha = next((v for key, v in (("v_proj", 30), ("down_proj", 6)) if key in name), 12)
            expected = expected + alpha / a.shape[0] * b @ a
        np.testing.assert_allclose(tensor, expected, atol=1e-5, err_msg=name)


REFUSED = {
    "peft_type": ({"peft_type": "IA3"}, "peft_type='IA3' is not supported; supported: 'LORA'"),
    "dora": ({"use_dora": True}, "use_dora=True is not supported; merge the adapter with PEFT itself"),
    "layers": ({"layer_replication": [[0, 1]]}, "layer_replication="),
    "unknown": ({"some_new_thing": 3}, "some_new_thing=3 is not supported"),
    "bias": ({"bias": "all"}, "bias='all' is not supported"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changes the base"),
    "rank": ({"r": 5}, "adapter_config.json says rank 5"),
    "no number": ({"lora_alpha": "big"}, 'lora_alpha is "big", must be a valid number'),
    "rank 0": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj is 0, must be at least 1"),
    "a list": ({"rank_pattern": [3]}, "rank_pattern is a list, must be a valid dictionary"),
    "no pattern": ({"alpha_pattern": {"(": 3}}, "the pattern '(' is no regular expression"),
    "null": ({"lora_alpha": None}, "lora_alpha is null, must be a valid number"),
}
SPOILT = {
    "no partner": (lambda t: t.pop(next(k for k in t if "lora_B" in k)), "no partner"),
    "elsewhere": (
        lambda t: t.update({"base_model.model.score.weight": np.ones((2, 2), "f4")}),
        "'base_model.model.score",
    ),
    "dora": (lambda t: t.update({"base_model.model.x.lora_magnitude_vector": np.ones(3, "f4")}), "not supported"),
    "embedding": (lambda t: t.update({"base_model.model.x.lora_embedding_A": np.ones(3, "f4")}), "not supported"),
}


def _refusal(directory):
    def merged():
        files = resolve_model(str(directory))
        _merged(files, weights.read_config(files.directory)[0])

    with pytest.raises(UserError) as refused:
        merged()
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused_by_name(case, tmp_path):
    config, words = REFUSED[case]
    assert words in _refusal(_adapter(tmp_path / "a", config=config))


@pytest.mark.parametrize("case", SPOILT)
def test_a_tensor_without_a_place_is_named(case, tmp_path):
    change, words = SPOILT[case]
    assert words in _refusal(_adapter(tmp_path / "a", change=change))


def test_another_base_and_missing_files(tmp_path):
    directory = _adapter(tmp_path / "a")
    _change(directory, {"base_model_name_or_path": str(GOLDEN / "gemma2")})
    assert "the base has" in _refusal(directory)
    _change(directory, {"base_model_name_or_path": str(tmp_path / "gone")})
    with pytest.raises(
        UserError, match=r"base_model_name_or_path of its adapter_config\.json: .*gone.*no such directory"
    ):
        resolve_model(str(directory), what="reference")
    for nothing, words in (
        (None, "put the adapter's base model there"),
        ("", "base model there"),
        (3, "is 3, must be"),
    ):
        _change(directory, {"base_model_name_or_path": nothing})
        with pytest.raises(UserError, match=words):
            resolve_model(str(directory))
    _change(directory, {"base_model_name_or_path": str(directory)})
    with pytest.raises(UserError, match="is a PEFT directory too"):
        resolve_model(str(directory))
    _change(directory, {"base_model_name_or_path": str(LLAMA)})
    (directory / "adapter_model.safetensors").write_bytes(b"no")
    assert "damaged or incomplete" in _refusal(directory)
    (directory / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors; only safetensors are read" in _refusal(directory)


def test_a_tied_head_stays_tied(tmp_path):
    tied = GOLDEN / "llama_tied_wide_heads"
    shape = load_file(tied / "model.safetensors")["model.embed_tokens.weight"].shape
    for name in ("model.embed_tokens", "lm_head"):
        key = f"base_model.model.{name}.weight"
        change = lambda t, key=key: t.update({key: np.ones(shape, np.float32)})
        words = _refusal(_adapter(tmp_path / name, tied, change=change))
        assert "unties the base's embeddings" in words or "no place" in words


def test_from_a_hub_adapter_and_base_are_two_repositories(hub, tmp_path):
    shutil.copytree(LLAMA, hub.root / "someone" / "base")
    _adapter(hub.root / "someone" / "adapter", config={"base_model_name_or_path": "someone/base"})
    (hub.root / "someone" / "adapter" / "tokenizer.json").write_text("x")
    files = resolve_model("someone/adapter")
    config = weights.read_config(files.directory)[0]
    expected = _merged(ModelFiles(LLAMA, hub.root / "someone" / "adapter"), config)
    jax.tree.map(np.testing.assert_array_equal, _merged(files, config), expected)
    assert files.tokenizer == files.adapter
    assert {path.name for path in files.deciding()} == {
        "config.json", "model.safetensors", "adapter_model.safetensors", "adapter_config.json",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["llama_untied_gqa", "phi3"])
def test_adapters_trained_over_it_are_exported_with_it(name, tmp_path):
    """For the base without either: what is written, merged into it, is the policy."""
    config, hf = weights.read_config(GOLDEN / name)
    whole = {} if config.tie_word_embeddings else {"lm_head.weight": (config.vocab_size, config.hidden_size)}

    def change(tensors):
        tensors |= {"base_model.model." + k: np.full(shape, 0.5, np.float32) for k, shape in whole.items()}
        for key in [key for key in tensors if "layers.0" in key and "down_proj" in key]:
            tensors.pop(key)  # not every layer has one

    under = _adapter(tmp_path / "under", GOLDEN / name, change=change, rslora=True)
    lora = on_model(config, Lora(2, 6.0, ("q", "k", "o")))
    base, mine = _merged(resolve_model(str(under)), config), _adapters(config, lora)
    peft_files.save_adapters(mine, config, lora, tmp_path / "both", base="wrong", under=under)
    files = resolve_model(str(tmp_path / "both"))
    assert files.directory == GOLDEN / name
    weights.save_weights(base | mine, hf, tmp_path / "whole", dtype="float32", lora_scale=lora.scale)
    expected = _merged(ModelFiles(tmp_path / "whole"), config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), _merged(files, config), expected)


@pytest.mark.extras
@pytest.mark.filterwarnings("ignore")  # torch's and PEFT's own
@pytest.mark.parametrize("name", ["llama_untied_gqa", "gemma2", "phi3"])
def test_the_logits_are_those_of_pefts_merge(name, tmp_path):
    """An adapter that PEFT made and saved, with patterns, rank-stabilised, and a head trained as a whole."""
    peft = pytest.importorskip("peft", reason="needs torch, transformers and peft")
    import torch

    from tests.model import test_families

    _, model, directory, config, _, base = test_families.make_family(name, tmp_path / "base")
    targets = ["qkv_proj", "o_proj", "gate_up_proj"] if name == "phi3" else ["q_proj", "v_proj", "down_proj"]
    tied = config.tie_word_embeddings
    asked = peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=targets, use_rslora=name == "gemma2", task_type="CAUSAL_LM",
        rank_pattern={targets[0]: 6}, alpha_pattern={f"layers.0.*{targets[1]}": 3},
        modules_to_save=None if tied else ["lm_head"],
    )  # fmt: skip
    theirs = peft.get_peft_model(model, asked)
    torch.manual_seed(0)
    with torch.no_grad():
        for key, tensor in theirs.named_parameters():
            if "lora_B" in key or "modules_to_save" in key:
                tensor.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    _change(tmp_path / "adapter", {"base_model_name_or_path": str(directory)})
    lora = on_model(config, Lora(2, 6.0, ("q", "o")))
    mine = _adapters(config, lora)
    peft_files.save_adapters(mine, config, lora, tmp_path / "both", base="", under=tmp_path / "adapter")
    sequences = TextPairs(test_families.VOCAB).sequences()
    ours = sequence_logits(_merged(resolve_model(str(tmp_path / "adapter")), config), config, sequences)
    whole = theirs.merge_and_unload().eval()
    expected = [test_families.torch_logits(whole, ids) for ids in sequences]
    assert difference(ours, expected) < 1e-4
    assert difference(sequence_logits(base, config, sequences), expected) > 1e-2
    # Adapters of ours trained over it, written with it: PEFT loads both onto the base.
    again = peft.PeftModel.from_pretrained(test_families.read_by_transformers(directory), tmp_path / "both").eval()
    with_scale = dataclasses.replace(config, lora_scale=lora.scale)
    ours = sequence_logits(_merged(resolve_model(str(tmp_path / "adapter")), config) | mine, with_scale, sequences)
    assert difference(ours, [test_families.torch_logits(again, ids) for ids in sequences]) < 1e-4

"""config.json ↔ ModelConfig: as real checkpoints have it, back again, and what is refused by name."""

import copy
import json

import jax
import numpy as np
import pytest
import transformers
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from dpo_jax.errors import UserError
from dpo_jax.model import tensors
from dpo_jax.model.families import _COMMON, _ROPES, _WINDOWS, FAMILIES, config_from_hf, hf_config
from dpo_jax.model.forward import init_params
from dpo_jax.weights import huggingface as weights
from tests.model.families import GOLDEN, load

NAMES = sorted(d.name for d in GOLDEN.iterdir())
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def read(model_type, **changed):
    return config_from_hf(SIZES | {"model_type": model_type} | changed, "config.json")


def test_a_token_meets_its_own_experts_alone():
    """Qwen3-30B-A3B: 30.5B parameters of which 3.3B are activated, its card says."""
    config = config_from_hf(
        {
            "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144,
            "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
            "tie_word_embeddings": False,
        },
        "config.json",
    )  # fmt: skip
    assert config.parameter_count() == 30_532_122_624
    assert config.active_parameter_count() == 3_353_032_704
    dense = read("llama")
    assert dense.active_parameter_count() == dense.parameter_count()


def test_every_family_is_recorded():
    assert {json.loads((GOLDEN / name / "config.json").read_text())["model_type"] for name in NAMES} == set(FAMILIES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_numbers_come_back_from_what_we_write(model_type):
    config = read(model_type)
    assert config_from_hf(json.loads(json.dumps(hf_config(config))), "again") == config


@pytest.mark.parametrize("name", NAMES)
def test_tensors_come_back_bit_by_bit(name, tmp_path):
    config, hf = weights.read_config(GOLDEN / name)
    stored = load_file(GOLDEN / name / "model.safetensors")
    tree = traverse_util.flatten_dict(jax.eval_shape(lambda: init_params(jax.random.key(0), config)))
    letters = tensors.sizes(config)
    assert {p: x.value.shape for p, x in tree.items()} == {
        x.path: x.shape(letters) for x in tensors.model_leaves(config)
    }
    assert sum(x.size for x in stored.values()) == config.parameter_count()
    for numbers, most in ((hf, 5e9), (hf_config(config), 20e3)):  # one file and several
        weights.save_weights(
            load(GOLDEN / name, config), numbers, tmp_path / "m", dtype=hf["dtype"], max_shard_bytes=most
        )
        written = {k: v for f in (tmp_path / "m").glob("*.safetensors") for k, v in load_file(f).items()}
        assert set(written) == set(stored)
        assert all(np.array_equal(written[k], stored[k]) for k in stored)
        assert weights.read_config(tmp_path / "m")[0] == config


@pytest.mark.parametrize(
    ("model_type", "keys", "expected"),
    [
        # transformers' meaning of absent keys, and the names that the hub's files use
        ("mistral", {}, {"sliding_window": 4096, "sliding_layers": (True,) * 4}),
        ("mistral", {"sliding_window": None}, {"sliding_window": 0, "sliding_layers": ()}),
        ("qwen2", {"sliding_window": 9}, {"sliding_window": 0, "attention_bias": True, "output_bias": False}),
        (
            "qwen2",
            {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 3},
            {"sliding_window": 9, "sliding_layers": (False, False, False, True)},
        ),
        ("qwen3", {}, {"head_dim": 128, "qk_norm": "head", "attention_bias": False}),
        (
            "gemma2",
            {"hidden_act": "gelu"},  # not what Gemma reads
            {"hidden_act": "gelu_pytorch_tanh", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
            | {"tie_word_embeddings": True, "sliding_layers": (True, False) * 2, "head_dim": 256},
        ),
        (
            "gemma3_text",
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 2, "sliding_window": 512}
            | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            {"rope_scaling": (("factor", 8.0), ("rope_type", "linear")), "rope_local_theta": 1e4, "rope_theta": 1e6}
            | {"sliding_layers": (True, False) * 2, "final_logit_softcapping": None},
        ),
        ("gemma3_text", {}, {"sliding_layers": (True,) * 4, "rope_theta": 1e6, "rope_local_theta": 1e4}),
        ("phi3", {"sliding_window": 2047}, {"sliding_window": 2047, "partial_rotary_factor": 1.0}),
        ("mixtral", {"rope_theta": 5e5}, {"num_experts": 8, "num_experts_per_tok": 2, "sliding_window": 0}),
        ("qwen3_moe", {"num_experts": 16}, {"num_experts": 16, "intermediate_size": 768, "norm_topk_prob": False}),
        ("qwen3_moe", {"num_local_experts": 16}, {"num_experts": 16}),
        ("llama", {"attention_bias": True}, {"attention_bias": True, "output_bias": True}),
    ],
)
def test_keys_mean_what_transformers_means(model_type, keys, expected):
    config = read(model_type, **keys)
    assert {k: getattr(config, k) for k in expected} == expected


def test_longrope_of_the_first_files():
    factors = {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = read("phi3", rope_scaling=factors, original_max_position_embeddings=32)
    scaling = dict(config.rope_scaling)
    assert scaling["rope_type"] == "longrope"
    assert scaling["attention_factor"] == pytest.approx((1 + np.log(128 / 32) / np.log(32)) ** 0.5)


@pytest.mark.parametrize(
    ("model_type", "keys", "words"),
    [
        ("gpt2", {}, "model_type='gpt2' is not supported; supported: llama, mistral, qwen2"),
        ("gemma3", {}, "model_type='gemma3' is not supported.*gemma3_text"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True is not supported for model_type='llama'"),
        ("mistral", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"hidden_act": "relu"}, "hidden_act='relu' is not supported; supported: silu, gelu"),
        ("gemma2", {"hidden_activation": "relu"}, "hidden_act='relu'"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config: quantized"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn' is not supported"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope type 'linear' needs factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported; supported for: phi3"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "short_factor has 1 .* need 4"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "'longrope' needs short_factor, long_factor"),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}}, "of sliding_attention"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "layer_types: 3 entries for 4 layers"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "layer_types: 'chunked_attention'"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "sliding_window is off"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported.*supported: 1"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers=.0. is not supported"),
    ],
)
def test_what_is_refused_is_named(model_type, keys, words):
    with pytest.raises(UserError, match=words) as caught:
        read(model_type, **keys)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "phi3", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    "keys",
    [
        {"hidden_size": "wide"}, {"num_attention_heads": 0}, {"num_hidden_layers": None}, {"vocab_size": [64]},
        {"rope_scaling": "linear"}, {"rope_parameters": 3}, {"rope_theta": "high\n"}, {"hidden_size": {"a": "b\nc"}},
        {"rope_scaling": {"rope_type": {"x": 1}}}, {"rms_norm_eps": "0"}, {"head_dim": []},
    ],
)  # fmt: skip
def test_a_senseless_value_ends_in_one_line(model_type, keys):
    with pytest.raises(UserError, match=r"^config.json: ") as caught:
        read(model_type, **keys)
    assert "\n" not in str(caught.value)


def test_whole_numbers_stand_for_floats_and_null_for_what_is_derived():
    assert read("mixtral", router_aux_loss_coef=0).router_aux_loss_coef == 0.0
    config = read("qwen2", num_key_value_heads=None, head_dim=None)
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    assert read("gemma2", query_pre_attn_scalar=144.0, final_logit_softcapping=30).query_pre_attn_scalar == 144


def test_code_of_the_checkpoint_never_runs(monkeypatch):
    """`auto_map` names a module of the repository, which transformers would load if it were trusted."""
    loaded = []
    monkeypatch.setattr("transformers.dynamic_module_utils.get_class_from_dynamic_module", loaded.append)
    assert read("llama", auto_map={"AutoConfig": "evil.Config"}, per_layer_config={}, dtype="os.system") == read(
        "llama"
    )
    assert not loaded


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("phi3", "model.layers.1.self_attn.qkv_proj.weight", (64, 32)),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w2.weight", (32, 48)),
        ("qwen3_moe", "model.layers.1.mlp.gate.weight", (8, 32)),
        ("qwen2", "model.layers.0.self_attn.k_proj.bias", (16,)),
        ("olmo2", "model.layers.0.self_attn.q_norm.weight", (32,)),
        ("gemma3_text", "model.layers.3.pre_feedforward_layernorm.weight", (32,)),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "shape", "extra"])
def test_wrong_tensors_are_named(name, tensor, shape, damage, tmp_path):
    stored = load_file(GOLDEN / name / "model.safetensors")
    assert stored[tensor].shape == shape
    if damage == "missing":
        del stored[tensor]
    elif damage == "shape":
        stored[tensor] = np.zeros((3, *shape), np.float32)
    else:
        stored[tensor + "_scale"] = stored[tensor]
    (tmp_path / "config.json").write_bytes((GOLDEN / name / "config.json").read_bytes())
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load(tmp_path, weights.read_config(tmp_path)[0])
    expected = {"missing": f"{tensor!r} of shape {shape} is missing", "shape": f"needs {shape}"}
    assert tensor in str(caught.value)
    assert expected.get(damage, f"{tensor}_scale") in str(caught.value)
    assert "\n" not in str(caught.value)


def _keys(model_type):
    """Every key that is read of a family's file."""
    family = FAMILIES[model_type]
    return sorted(
        {*_COMMON, *_WINDOWS, *_ROPES, *family.keys, *family.refused, "rope_parameters", "quantization_config"}
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_null_means_what_it_means_to_transformers_or_is_named(model_type):
    """Every key in turn: where transformers' class takes no null one line names it, else the numbers are its own."""
    whole = hf_config(read(model_type)) | {"head_dim": 8}
    accepted = []
    for key in _keys(model_type):
        hf = {k: v for k, v in whole.items() if v is not None} | {key: None}
        try:
            theirs = transformers.AutoConfig.for_model(**copy.deepcopy(hf))
        except Exception:  # transformers' own kinds of errors
            with pytest.raises(UserError) as refused:
                config_from_hf(hf, "config.json")
            assert key in str(refused.value), key
            assert "\n" not in str(refused.value)
            continue
        if key == "sliding_window" and model_type.startswith(
            "gemma"
        ):  # its layers slide: no model runs with this config
            with pytest.raises(UserError, match=key):
                config_from_hf(hf, "config.json")
            continue
        ours = config_from_hf(hf, "config.json")
        accepted.append(key)
        heads, width = SIZES["num_attention_heads"], SIZES["hidden_size"]
        derived = {"head_dim": width // heads, "num_key_value_heads": heads}
        for name in ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings"):
            their = getattr(theirs, name, None)
            assert getattr(ours, name) == (derived[name] if their is None else their), (key, name)
        window = getattr(theirs, "sliding_window", None) if FAMILIES[model_type].windows != "none" else None
        assert ours.sliding_window in (0, window), key
    assert {"rope_scaling", "rope_parameters", "quantization_config"} <= set(accepted)
    assert not {"hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads"} & set(accepted)


_NO_THETA = {"rope_type": "default", "rope_theta": None}


@pytest.mark.parametrize(
    ("model_type", "keys", "named"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_theta"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": _NO_THETA, "sliding_attention": _NO_THETA}},
            "rope_theta",
        ),
        ("qwen3_moe", {"num_local_experts": None}, "num_local_experts"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": None}}, "factor"),
        ("gemma2", {"layer_types": [None] * 4}, "layer_types"),
    ],
)
def test_a_null_inside_is_named(model_type, keys, named):
    with pytest.raises(UserError, match=named) as refused:
        read(model_type, **keys)
    assert "Traceback" not in str(refused.value)
    assert "TypeError" not in str(refused.value)

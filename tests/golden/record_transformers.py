"""Record what transformers computes for small random models: tests/golden/transformers/MODEL/.

Run with torch and transformers (the `parity` extra): python tests/golden/record_transformers.py [MODEL ...]
Each directory is a Hugging Face model of 10,000 to 50,000 parameters beside expected.safetensors: `ids` [2, 48] and
float32 `logits` [2, 48, 96]. Weights are drawn ten times wider than usual, so that positions and heads matter to the
logits, and windows are much narrower than the sequences. `tests/model/test_families.py` makes the same models live.
"""

import shutil
import sys
from pathlib import Path

OUT = Path(__file__).parent / "transformers"
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# 64 positions of original context put the frequencies of a head into all three bands of llama3 scaling.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
# 24 positions of original context: the sequences of the tests are longer, so the long factors count.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.5, 2.0, 2.5, 3.0],
    "long_factor": [1.0, 1.5, 3.0, 6.0, 12.0, 20.0],
    "partial_rotary_factor": 0.75,
}
GEMMA = {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 24, "pad_token_id": 0}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
EXPERTS = {"num_key_value_heads": 2, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}
MODELS = {
    "llama_untied_gqa": ("llama", "float32", {"num_key_value_heads": 2}),
    "llama3_rope": ("llama", "bfloat16", {"num_key_value_heads": 2, "rope_parameters": LLAMA3, "head_dim": 16}),
    "llama_tied_wide_heads": (
        "llama",
        "float32",
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 12, "rms_norm_eps": 1e-5},
    ),
    "mistral": ("mistral", "bfloat16", {"num_key_value_heads": 2, "sliding_window": None}),
    "linear_rope": ("llama", "float16", {"num_key_value_heads": 4, "rope_parameters": LINEAR}),
    "llama_biases": ("llama", "bfloat16", {"num_key_value_heads": 2, "attention_bias": True}),
    "mistral_window": ("mistral", "bfloat16", {"num_key_value_heads": 2, "sliding_window": 7}),
    "qwen2": ("qwen2", "bfloat16", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2_window": (
        "qwen2",
        "bfloat16",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", "bfloat16", {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        "bfloat16",
        GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 8.0, "num_hidden_layers": 3},
    ),
    "gemma3_text": (
        "gemma3_text",
        "bfloat16",
        GEMMA | {"sliding_window_pattern": 3, "num_hidden_layers": 4, "rope_parameters": GEMMA3_ROPE},
    ),
    "olmo2": ("olmo2", "bfloat16", {"num_key_value_heads": 2, "pad_token_id": 0}),
    "phi3": ("phi3", "bfloat16", {"num_key_value_heads": 2, "sliding_window": 7, "pad_token_id": 0}),
    "phi3_longrope": (
        "phi3",
        "bfloat16",
        {
            "hidden_size": 64,
            "num_key_value_heads": 2,
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 24,
            "pad_token_id": 0,
        },
    ),
    "mixtral": ("mixtral", "bfloat16", EXPERTS | {"num_local_experts": 4, "sliding_window": 7}),
    "qwen3_moe": (
        "qwen3_moe",
        "bfloat16",
        EXPERTS | {"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 16, "norm_topk_prob": True},
    ),
    "qwen3_moe_unnormalised": (
        "qwen3_moe",
        "bfloat16",
        EXPERTS | {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 3},
    ),
}


def make(name: str, seed: int, **changed):
    """A random transformers model in float32."""
    import torch  # here, so that collecting doctests needs neither
    import transformers

    model_type, _, options = MODELS[name]
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **SMALL | options | changed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    for key, value in model.named_parameters():
        if key.endswith("norm.weight"):  # Gemma's are added to 1
            value.data.uniform_(0.5, 1.5).sub_(1.0 if model_type.startswith("gemma") else 0.0)
        if key.endswith(".bias"):
            value.data.normal_(0.0, 0.5)
    return model


def record(name: str, seed: int) -> None:
    import torch
    import transformers
    from safetensors.torch import save_file

    model, dtype = make(name, seed), MODELS[name][1]
    model = model.to(getattr(torch, dtype))
    shutil.rmtree(OUT / name, ignore_errors=True)
    model.save_pretrained(OUT / name)
    # Read again: the file's rounded weights in float32, and rotary frequencies that were never rounded.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        OUT / name, attn_implementation="eager", dtype=torch.float32
    )
    ids = torch.randint(0, SMALL["vocab_size"], (2, 48))
    with torch.no_grad():
        logits = model(ids).logits
    (OUT / name / "generation_config.json").unlink(missing_ok=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    save_file({"ids": ids.int(), "logits": logits}, OUT / name / "expected.safetensors", metadata=versions)
    for file in (OUT / name).iterdir():
        file.chmod(0o644)  # transformers makes them readable by their owner alone
    size = sum(file.stat().st_size for file in (OUT / name).iterdir())
    print(f"{name}: {size / 1000:.0f} kB, |logits| up to {logits.abs().max():.1f}")


if __name__ == "__main__":
    for seed, name in enumerate(MODELS):
        if name in (sys.argv[1:] or MODELS):
            record(name, seed)

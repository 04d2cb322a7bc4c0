"""Record what transformers computes for small random models: tests/golden/transformers/MODEL/.

Run with torch and transformers (the `parity` extra): python tests/golden/record_transformers.py
Each directory is a Hugging Face model of about 20,000 parameters beside expected.safetensors: `ids` [2, 48] and float32
`logits` [2, 48, 96]. Weights are drawn ten times wider than usual, so that positions and heads matter to the logits.
"""

import shutil
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
}


def record(name: str, model_type: str, dtype: str, options: dict, seed: int) -> None:
    import torch  # here, so that collecting doctests needs neither
    import transformers
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **SMALL, **options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    for key, value in model.named_parameters():
        if key.endswith("norm.weight"):
            value.data.uniform_(0.5, 1.5)
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
    for seed, (name, (model_type, dtype, options)) in enumerate(MODELS.items()):
        record(name, model_type, dtype, options, seed)

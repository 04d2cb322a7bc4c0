"""A Llama of Hugging Face's layout as a float32 GGUF without a vocabulary, for llama.cpp: prompts are token ids.

Needs gguf and safetensors and nothing of dpo_jax.

    python -m benchmarks.gguf_file MODEL_DIR OUT.gguf
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def renamed(name: str) -> str:
    """llama.cpp's name of a tensor."""
    stem, _, kind = name.rpartition(".")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{LAYER[rest]}.{kind}"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection as llama.cpp rotates them: the two of a pair beside each other, not half a head apart."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write(directory: Path, out: Path) -> None:
    """All at once or not at all."""
    c: dict[str, Any] = json.loads((directory / "config.json").read_text())
    if c["model_type"] != "llama" or c.get("rope_scaling"):
        raise SystemExit(f"{directory}: needs model_type llama without rope_scaling, found {c['model_type']}")
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    scratch = out.with_name(out.name + ".tmp")
    writer = gguf.GGUFWriter(scratch, "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(c.get("head_dim") or c["hidden_size"] // heads)
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_vocab_size(c["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for file in sorted(directory.glob("*.safetensors")):
        for name, weight in load_file(file).items():
            if "q_proj" in name or "k_proj" in name:
                weight = interleaved(weight, heads if "q_proj" in name else kv_heads)
            writer.add_tensor(renamed(name), np.ascontiguousarray(weight, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(scratch, out)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))

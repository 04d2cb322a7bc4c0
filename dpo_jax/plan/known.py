"""Published facts about models and datasets, so that a run can be planned before anything is downloaded.

Models: the numbers of their config.json. Lengths: quantiles of tokens of prompt, chosen and rejected as SmolLM2's
tokenizer counts them, chat template included: HH harmless-base test (2,299 pairs) and 884 pairs of UltraFeedback. Other
tokenizers differ by some per cent; a run on prepared data knows better.
"""

from typing import Any

import numpy as np

_LLAMA31: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 128256, "head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "rope_theta": 5e5, "max_position_embeddings": 131072, "tie_word_embeddings": False, "hidden_act": "silu",
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
_SMOLLM2: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 49152, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip


def _layers(base: dict[str, Any], layers: int, width: int, ffn: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": ffn, "num_attention_heads": heads}
    return base | sizes | more


MODELS: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": _layers(_SMOLLM2, 30, 576, 1536, 9, num_key_value_heads=3, rope_theta=1e5),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _layers(
        _SMOLLM2, 24, 2048, 8192, 32, num_key_value_heads=32, rope_theta=1.3e5
    ),
    "meta-llama/Llama-3.1-8B-Instruct": _layers(_LLAMA31, 32, 4096, 14336, 32),
    "meta-llama/Llama-3.1-70B-Instruct": _layers(_LLAMA31, 80, 8192, 28672, 64),
    "Qwen/Qwen2.5-7B": {
        "model_type": "qwen2", "vocab_size": 152064, "num_hidden_layers": 28, "hidden_size": 3584,
        "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "max_position_embeddings": 131072, "tie_word_embeddings": False, "hidden_act": "silu",
    },
    "Qwen/Qwen3-32B": {
        "model_type": "qwen3", "vocab_size": 151936, "num_hidden_layers": 64, "hidden_size": 5120,
        "intermediate_size": 25600, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960, "tie_word_embeddings": False,
        "hidden_act": "silu", "attention_bias": False,
    },
}  # fmt: skip

# Which quantiles: even ones, and the tail, which decides how wide rows must be.
AT = (*(i / 32 for i in range(32)), 0.98, 0.99, 0.995, 0.999, 1.0)
# Those of prompt, chosen and rejected.
LENGTHS: dict[str, tuple[tuple[int, ...], ...]] = {
    "hhh": (
        (33, 37, 39, 40, 41, 43, 45, 49, 54, 65, 74, 84, 91, 98, 107, 114, 122, 131, 139, 146, 156, 165, 174, 185,
         195, 208, 226, 247, 279, 303, 350, 420, 474, 571, 637, 829, 880),
        (3, 7, 9, 10, 11, 13, 14, 15, 16, 18, 19, 20, 22, 24, 25, 27, 29, 31, 33, 36, 39, 42, 45, 49, 54, 59, 65,
         72, 81, 92, 111, 139, 154, 194, 225, 260, 271),
        (3, 7, 9, 11, 12, 14, 16, 18, 19, 21, 23, 25, 27, 30, 32, 35, 37, 40, 43, 47, 51, 54, 58, 62, 67, 73, 79,
         87, 99, 112, 130, 168, 194, 249, 259, 481, 558),
    ),
    "ultrafeedback": (
        (34, 38, 40, 42, 43, 45, 47, 50, 52, 56, 61, 68, 75, 89, 95, 104, 110, 119, 128, 142, 156, 167, 183, 212,
         242, 291, 340, 388, 457, 523, 619, 936, 1105, 1200, 1315, 1402, 1500),
        (3, 5, 13, 19, 25, 30, 42, 52, 63, 74, 93, 106, 126, 145, 172, 196, 218, 243, 266, 304, 336, 359, 395, 420,
         448, 479, 527, 565, 608, 663, 737, 858, 930, 1015, 1062, 1113, 1243),
        (3, 10, 14, 20, 29, 36, 45, 56, 65, 77, 92, 102, 115, 136, 149, 168, 188, 204, 229, 253, 282, 299, 328,
         354, 389, 432, 456, 480, 520, 583, 654, 781, 852, 946, 959, 989, 996),
    ),
}  # fmt: skip
# Training pairs of the published datasets, by subset ("": it has none).
PAIRS: dict[str, dict[str, int]] = {
    "hhh": {
        "harmless-base": 42_537,
        "helpful-base": 43_835,
        "helpful-online": 22_007,
        "helpful-rejection-sampled": 52_421,
    },
    "ultrafeedback": {"": 61_135},
}


def published_pairs(dataset: str) -> int | None:
    """Training pairs of a dataset or some of its subsets (`hhh/harmless-base,helpful-base`); None: nobody knows them.

    >>> published_pairs("hhh"), published_pairs("hhh/helpful-online"), published_pairs("mine.jsonl")
    (160800, 22007, None)
    """
    name, _, subsets = dataset.partition("/")
    if name not in LENGTHS:
        return None
    chosen = set(filter(None, subsets.split(","))) or set(PAIRS[name])
    return sum(PAIRS[name][subset] for subset in chosen) if chosen <= set(PAIRS[name]) else None


def draw_lengths(dataset: str, count: int, seed: int = 0) -> np.ndarray:
    """Lengths of `count` pairs as this dataset has them, drawn from its quantiles: int64 `[n, 3]`.

    The three lengths of a pair are drawn independently of each other.
    """
    rng = np.random.default_rng([seed, 7])
    return np.stack([np.interp(rng.random(count), AT, q) for q in LENGTHS[dataset]], axis=1).round().astype(np.int64)

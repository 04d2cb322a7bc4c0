"""Published facts about models and datasets (`known.json`), so that a run can be planned before any download.

Models: the numbers of their config.json. Pairs: training pairs of a dataset by subset ("": it has none). Lengths:
quantiles of tokens of prompt, chosen and rejected as SmolLM2's tokenizer counts them, chat template included: HH
harmless-base test (2,299 pairs) and 884 pairs of UltraFeedback. Other tokenizers differ by some per cent; a run on
prepared data knows better.
"""

from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.disk import read_json

_KNOWN = read_json(Path(__file__).with_suffix(".json"))
MODELS: dict[str, dict[str, Any]] = _KNOWN["models"]
PAIRS: dict[str, dict[str, int]] = _KNOWN["pairs"]
LENGTHS: dict[str, list[list[int]]] = _KNOWN["length_quantiles"]
# Which quantiles: even ones, and the tail, which decides how wide rows must be.
AT = (*(i / 32 for i in range(32)), 0.98, 0.99, 0.995, 0.999, 1.0)


def published_pairs(dataset: str) -> int | None:
    """Training pairs of a dataset or some of its subsets (`hhh/harmless-base,helpful-base`); None: they are not known.

    >>> published_pairs("hhh"), published_pairs("hhh/helpful-online"), published_pairs("mine.jsonl")
    (160800, 22007, None)
    """
    name, _, subsets = dataset.partition("/")
    sizes = PAIRS.get(name, {})
    chosen = set(filter(None, subsets.split(","))) or set(sizes)
    return sum(sizes[subset] for subset in chosen) if sizes and chosen <= set(sizes) else None


def draw_lengths(dataset: str, count: int, seed: int = 0, completions: int = 2) -> np.ndarray:
    """Lengths of `count` groups as this dataset has them, drawn from its quantiles: int64 `[count, 1 + completions]`.

    The lengths of a group are drawn independently of each other: the first completion's as those of chosen ones, all
    others as those of rejected ones.
    """
    rng = np.random.default_rng([seed, 7])
    prompt, first, others = LENGTHS[dataset]
    quantiles = [prompt, first, *[others] * (completions - 1)][: 1 + completions]
    return np.stack([np.interp(rng.random(count), AT, q) for q in quantiles], axis=1).round().astype(np.int64)

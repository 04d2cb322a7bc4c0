"""Token lengths of the pairs that a plan is for: of a file, as published, or of the data itself."""

import dataclasses
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from dpo_jax.config.settings import Settings
from dpo_jax.data.mixture import Mixture
from dpo_jax.data.sources import parse_mixture
from dpo_jax.errors import UserError
from dpo_jax.plan.known import draw_lengths, published_pairs
from dpo_jax.training import inputs
from dpo_jax.weights.find import find_policy

DRAWN_PAIRS = 20_480  # at least, of datasets that are known by their quantiles only; enough for the plan of row shapes


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Token lengths of the training pairs; a source of pairs that has no tokens.

    Attributes:
      lengths: int `[n, 3]`: prompt, chosen, rejected.
      pairs: how many pairs an epoch has; more than `lengths` where those are a sample.
      source: where they come from, in words.
      mixture: which of them make an epoch; None: all.
      drawn: whether they are drawn from quantiles, as many as the config's batch needs.
    """

    lengths: np.ndarray
    pairs: int
    source: str
    mixture: Mixture | None = None
    drawn: bool = False

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        raise AssertionError("a plan reads no tokens")


def find_lengths(s: Settings, file: str = "") -> Lengths:
    """Lengths of the config's training pairs, cut at its limits.

    Args:
      s: of the run.
      file: a `lengths.npy`; empty: as published, where the data is known by name and no `dataset_path` is given, else
        the data itself, prepared as training would.

    Raises:
      UserError: nothing tells them, or what does is not usable.
    """
    if file:
        return _of_file(s, file)
    parts = parse_mixture(s.data.dataset)
    sizes = [published_pairs(name) for name, _ in parts]
    if not s.data.dataset_path and None not in sizes:
        return _published(s, parts, [size for size in sizes if size is not None])
    with tempfile.TemporaryDirectory() as work:
        policy = find_policy(s.model, Path(work), s.seed, with_weights=False)
        data = inputs.prepare_pairs(s, policy.tokenizer, Path(work), None)
        lengths, mixture = np.asarray(data.train.lengths), data.split.mixture
    pairs = len(lengths) if mixture is None else mixture.epoch_size(s.batch.size, s.batch.order.drop_remainder)
    return Lengths(lengths, pairs, f"{pairs:,} pairs of {s.data.dataset} by the model's tokenizer", mixture)


def _of_file(s: Settings, file: str) -> Lengths:
    try:
        with open(file, "rb") as f:
            lengths = np.load(f)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"--lengths={file} cannot be read ({e}); give the lengths.npy of a cache") from None
    if not isinstance(lengths, np.ndarray):
        raise UserError(f"--lengths={file} is an archive of arrays; give the lengths.npy of a cache")
    if lengths.ndim != 2 or lengths.shape[1] != 3 or lengths.dtype.kind not in "iu" or len(lengths) == 0:
        raise UserError(f"--lengths={file} holds {lengths.dtype} {lengths.shape}; needed are integers [pairs, 3]")
    if (least := lengths.min()) < 1:
        raise UserError(f"--lengths={file} holds {least}; prompts and completions have one token or more")
    kept = _some(_kept(s, lengths.astype(np.int64)), f"--lengths={file}")
    return Lengths(kept, len(kept), f"{len(kept):,} pairs of {file}")


def _published(s: Settings, parts: list[tuple[str, float]], sizes: list[int]) -> Lengths:
    """A sample that is large enough for several batches of the config, or all there are."""
    weights = tuple(weight for _, weight in parts)
    mixed = lambda counts: Mixture(np.repeat(np.arange(len(parts)), counts), weights) if len(parts) > 1 else None
    epoch = lambda counts: counts[0] if (mixture := mixed(counts)) is None else mixture.epoch_size(1, False)
    share, wanted = DRAWN_PAIRS / sum(sizes), 8 * s.batch.size
    while True:
        share = min(1.0, share)
        asked = [max(1, round(size * share)) for size in sizes]
        drawn = [
            _kept(s, draw_lengths(name.partition("/")[0], count, s.seed + number))
            for number, ((name, _), count) in enumerate(zip(parts, asked, strict=True))
        ]
        found = epoch([len(x) for x in drawn])
        if share == 1 or found >= wanted:
            break
        share *= max(2.0, 1.1 * wanted / max(1, found))
    for (name, _), lengths in zip(parts, drawn, strict=True):
        _some(lengths, f"dataset={name}")
    kept = [size * len(x) // count for size, x, count in zip(sizes, drawn, asked, strict=True)]
    whole = mixed(kept)
    pairs = kept[0] if whole is None else whole.epoch_size(s.batch.size, s.batch.order.drop_remainder)
    lengths = np.concatenate(drawn)
    means = " + ".join(f"{mean:.0f}" for mean in lengths.mean(0))
    source = f"{pairs:,} pairs of {s.data.dataset} with lengths as published ({means} tokens)"
    return Lengths(lengths, pairs, source, mixed([len(x) for x in drawn]), drawn=True)


def _kept(s: Settings, lengths: np.ndarray) -> np.ndarray:
    """As preparing does it: longer texts are cut, or their pairs dropped."""
    limits = [s.data.max_prompt_length, s.data.max_completion_length, s.data.max_completion_length]
    return np.minimum(lengths, limits) if s.data.overlong != "drop" else lengths[(lengths <= limits).all(1)]


def _some(lengths: np.ndarray, what: str) -> np.ndarray:
    if not len(lengths):
        raise UserError(
            f"{what}: overlong=drop leaves none of its pairs; raise max_prompt_length or max_completion_length"
        )
    return lengths

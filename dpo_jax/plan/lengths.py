"""Token lengths of the groups that a plan is for: of a file, as published, or of the data itself."""

import dataclasses
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from dpo_jax.config.settings import Settings
from dpo_jax.data.forms.alone import PROMPT_ALONE
from dpo_jax.data.mixture import Mixture
from dpo_jax.data.sources import parse_mixture
from dpo_jax.errors import UserError
from dpo_jax.plan.known import draw_lengths, published_pairs

DRAWN_PAIRS = 20_480  # at least, of datasets of which only quantiles are known; enough to choose row shapes


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Token lengths of the training pairs; a source of groups that has no tokens.

    Attributes:
      lengths: int `[N, 1 + n]`: prompt, completions (of a pair: chosen, rejected).
      pairs: how many groups an epoch has; more than `lengths` where those are a sample.
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

    def __getitem__(self, i: int) -> NoReturn:
        raise AssertionError("a plan reads no tokens")


def completions_of(s: Settings) -> int:
    """Completions of a group of the run's rows."""
    if s.task == "rl":
        return s.rl.n
    return 1 if s.task == "sft" and s.rounds.sft_on != "both" else 2


def find_lengths(s: Settings, file: str = "", completions: int = 0) -> Lengths:
    """Lengths of the run's training groups, cut at its limits.

    Args:
      s: of the run.
      file: a `lengths.npy`; empty: as published, where the data is known by name and no `dataset_path` is given, else
        the data itself, prepared as training would.
      completions: of a group; 0: as the run has them.

    Raises:
      UserError: nothing tells them, or what does is not usable.
    """
    completions = completions or completions_of(s)
    if file:
        return _of_file(s, file, completions)
    parts = parse_mixture(s.data.dataset)
    sizes = [published_pairs(name) for name, _ in parts]
    if not s.data.dataset_path and None not in sizes:
        return _published(s, parts, [size for size in sizes if size is not None], completions)
    from dpo_jax.training import inputs  # takes seconds to import, as what it needs does
    from dpo_jax.weights.find import find_policy

    with tempfile.TemporaryDirectory() as work:
        policy = find_policy(
            s.model, Path(work), s.seed, with_weights=False, revision=s.revision, scalar_head=s.task == "reward"
        )
        data = inputs.prepare_pairs(s, policy.tokenizer, Path(work), None)
        inputs.check_tokens(data.split, policy)
        known, of = np.asarray(data.train.lengths), "by the model's tokenizer"
        if _answers_stand_for_any(data.report):
            known = np.column_stack([known[:, 0], np.full((len(known), 2), s.data.max_completion_length)])
            of += ", answers as long as they may be"
        lengths, mixture = _with_completions(known, completions, s.seed), data.split.mixture
    pairs = len(lengths) if mixture is None else mixture.epoch_size(s.batch.size, s.batch.order.drop_remainder)
    return Lengths(lengths, pairs, f"{pairs:,} pairs of {s.data.dataset} {of}", mixture)


def _answers_stand_for_any(report: Mapping[str, Any]) -> bool:
    """Whether some of the rows that were prepared are prompts alone."""
    forms = (form["form"] for source in report["sources"] for form in source["forms"])
    return PROMPT_ALONE in forms


def _with_completions(pairs: np.ndarray, completions: int, seed: int) -> np.ndarray:
    """Lengths of pairs as those of groups: of one, the chosen ones; of more, drawn from those of all completions."""
    if completions <= 2:
        return pairs[:, : 1 + completions]
    drawn = np.random.default_rng([seed, 11]).choice(pairs[:, 1:].reshape(-1), (len(pairs), completions))
    return np.concatenate([pairs[:, :1], drawn], axis=1)


def _of_file(s: Settings, file: str, completions: int) -> Lengths:
    try:
        with open(file, "rb") as f:
            lengths = np.load(f)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"--lengths={file} cannot be read ({e}); give the lengths.npy of a cache") from None
    if not isinstance(lengths, np.ndarray):
        raise UserError(f"--lengths={file} is an archive of arrays; give the lengths.npy of a cache")
    width = 1 + completions
    if lengths.ndim != 2 or lengths.shape[1] != width or lengths.dtype.kind not in "iu" or len(lengths) == 0:
        raise UserError(f"--lengths={file} holds {lengths.dtype} {lengths.shape}; needed are integers [pairs, {width}]")
    if (least := lengths.min()) < 1:
        raise UserError(f"--lengths={file} holds {least}; prompts and completions have one token or more")
    kept = _kept(s, lengths.astype(np.int64))
    _check_some(kept, f"--lengths={file}")
    return Lengths(kept, len(kept), f"{len(kept):,} pairs of {file}")


def _published(s: Settings, parts: list[tuple[str, float]], sizes: list[int], completions: int) -> Lengths:
    """A sample that is large enough for several batches of the run, or all there are."""
    names, weights = zip(*parts, strict=True)
    mixed = lambda counts: Mixture(np.repeat(np.arange(len(parts)), counts), weights) if len(parts) > 1 else None
    share, wanted, mixture, drawn_pairs = DRAWN_PAIRS / sum(sizes), 8 * s.batch.size, None, 0
    while drawn_pairs < wanted:
        asked = [max(1, round(size * min(1.0, share))) for size in sizes]
        drawn = [
            _kept(s, draw_lengths(name.partition("/")[0], count, s.seed + number, completions))
            for number, (name, count) in enumerate(zip(names, asked, strict=True))
        ]
        mixture = mixed([len(x) for x in drawn])
        drawn_pairs = len(drawn[0]) if mixture is None else mixture.epoch_size(1, False)
        if share >= 1:
            break
        share *= max(2.0, 1.1 * wanted / max(1, drawn_pairs))
    for name, lengths in zip(names, drawn, strict=True):
        _check_some(lengths, f"dataset={name}")
    kept = [size * len(x) // count for size, x, count in zip(sizes, drawn, asked, strict=True)]
    whole = mixed(kept)
    pairs = kept[0] if whole is None else whole.epoch_size(s.batch.size, s.batch.order.drop_remainder)
    lengths = np.concatenate(drawn)
    means = " + ".join(f"{mean:.0f}" for mean in lengths.mean(0))
    source = f"{pairs:,} pairs of {s.data.dataset} with lengths as published ({means} tokens)"
    return Lengths(lengths, pairs, source, mixture, drawn=True)


def _kept(s: Settings, lengths: np.ndarray) -> np.ndarray:
    """As preparing does it: longer texts are cut, or their groups dropped."""
    limits = [s.data.max_prompt_length, *[s.data.max_completion_length] * (lengths.shape[1] - 1)]
    return np.minimum(lengths, limits) if s.data.overlong != "drop" else lengths[(lengths <= limits).all(1)]


def _check_some(lengths: np.ndarray, what: str) -> None:
    if not len(lengths):
        raise UserError(
            f"{what}: overlong=drop leaves none of its pairs; raise max_prompt_length or max_completion_length"
        )

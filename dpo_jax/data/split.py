"""Which pairs are trained on and which are held out."""

from dataclasses import dataclass

import numpy as np

from dpo_jax.data.cache.store import PairCache
from dpo_jax.data.mixture import Mixture, apportion, spread
from dpo_jax.data.sources import EXTRA, DataSources
from dpo_jax.errors import UserError


@dataclass(frozen=True)
class Pairs:
    """Some pairs of a cache, in the order of the files: `index` int64 [n] are positions in `cache`."""

    cache: PairCache
    index: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """int32 [n, 3]: tokens of prompt, chosen, rejected."""
        return self.cache.lengths[self.index]

    @property
    def source(self) -> np.ndarray:
        """int32 [n]: which of the report's `source_names` each pair is from."""
        return self.cache.source[self.index]

    @property
    def margin(self) -> np.ndarray | None:
        """float32 [n]: by how much each chosen answer should win; None where pairs have no margin."""
        return None if self.cache.margin is None else self.cache.margin[self.index]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of prompt, chosen, rejected, int32 each."""
        return self.cache[int(self.index[position])]


@dataclass(frozen=True)
class Split:
    """Pairs to train on and to evaluate on.

    Attributes:
      train, evaluation: pairs of one cache.
      mixture: which training pairs make an epoch; None where nothing is mixed, and all of them do.
      groups: bool `[evaluation pairs]` by the name of a source (and of a mixture's part); empty where there is one.
      notes: for each part, a sentence on where its evaluation pairs come from.
    """

    train: Pairs
    evaluation: Pairs
    mixture: Mixture | None
    groups: dict[str, np.ndarray]
    notes: tuple[str, ...]


def split(cache: PairCache, data: DataSources, eval_pairs: int, seed: int) -> Split:
    """Divide the pairs of a cache.

    Of several parts, `eval_pairs` is divided by their weights. No prompt that was held out is trained on, whatever
    part it is from.

    Raises:
      UserError: `eval_pairs` is -1 (all), but a part has no evaluation split.
    """
    in_test = np.zeros(len(cache), dtype=bool)
    part_of = np.zeros(len(cache), np.int64)
    for entry, source in zip(cache.manifest["sources"], data.sources, strict=True):
        in_test[entry["start"] : entry["stop"]] = source.split == "test"
        part_of[entry["start"] : entry["stop"]] = source.part
    hashes = cache.prompt_hash
    train = np.flatnonzero(~in_test)
    given = next((source.name for source in data.sources if source.part == EXTRA), None)
    if eval_pairs == 0:
        taken, notes = train[:0], ["no evaluation (eval_pairs=0)"]
    elif given is not None:
        extra = np.flatnonzero(part_of == EXTRA)
        taken = _sampled(extra, eval_pairs, seed)
        notes = [_published_note(f"eval_path={given}", taken, extra, hashes, train, seed)]
    else:
        train, taken, notes = _by_part(data, part_of, in_test, hashes, eval_pairs, seed)
    mixture = Mixture(part_of[train], tuple(part.weight for part in data.parts)) if len(data.parts) > 1 else None
    members = {name: cache.source[taken] == number for number, name in enumerate(cache.manifest["source_names"])}
    members |= {part.name: part_of[taken] == number for number, part in enumerate(data.parts)}
    groups = {name: held for name, held in members.items() if held.any() and not held.all()}
    return Split(Pairs(cache, train), Pairs(cache, taken), mixture, groups, tuple(notes))


def _by_part(
    data: DataSources, part_of: np.ndarray, in_test: np.ndarray, hashes: np.ndarray, eval_pairs: int, seed: int
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Training pairs, evaluation pairs (the first ones are from every part), and the notes of the parts."""
    wanted = apportion(eval_pairs, [part.weight for part in data.parts]) if eval_pairs > 0 else [-1] * len(data.parts)
    kept = ~in_test
    parts: list[tuple[np.ndarray, np.ndarray]] = []  # of each one the pairs that are held out, and those taken
    for number, part in enumerate(data.parts):
        mine = np.flatnonzero(part_of == number)
        if data.published(number):
            held = mine[in_test[mine]]
            taken = _sampled(held, int(wanted[number]), seed)
            # Its own training split stays as it was published.
            kept &= (part_of == number) | ~np.isin(hashes, hashes[taken])
        elif eval_pairs == -1:
            raise UserError(
                f"eval_pairs=-1 (all) needs an evaluation split, but {part.note}; give a number or eval_path"
            )
        else:
            held, taken = _hold_out(mine, hashes, int(wanted[number]), seed)
            kept &= ~np.isin(hashes, hashes[held])
        parts.append((held, taken))
    train = np.flatnonzero(kept)
    notes = [
        _published_note(part.note, taken, held, hashes, train, seed)
        if data.published(number)
        else f"{part.note}: {len(taken)} pairs of {len(np.unique(hashes[held]))} prompts are held out by prompt "
        f"(seed {seed}), none of these prompts is in training"
        for number, (part, (held, taken)) in enumerate(zip(data.parts, parts, strict=True))
    ]
    if len(data.parts) > 1:
        notes = [f"{part.name}: {note}." for part, note in zip(data.parts, notes, strict=True)]
    return train, spread([taken for _, taken in parts]), notes


def _sampled(held: np.ndarray, count: int, seed: int) -> np.ndarray:
    return held if count == -1 else np.sort(np.random.default_rng(seed).permutation(held)[:count])


def _published_note(
    note: str, taken: np.ndarray, held: np.ndarray, hashes: np.ndarray, train: np.ndarray, seed: int
) -> str:
    known = int(np.isin(hashes[taken], hashes[train]).sum())
    return f"{note}: {len(taken)} of its {len(held)} pairs (seed {seed}); {known} have a prompt of training"


def _hold_out(mine: np.ndarray, prompt_hash: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of held-out prompts (at most half of all), and `count` of them to evaluate on.

    Prompts are compared as conversations, before any template or limit: the same rows are held out whatever the
    tokenizer.
    """
    hashes, prompt_of, counts = np.unique(prompt_hash[mine], return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(hashes))
    wanted = min(count, len(mine) // 2)
    before = np.cumsum(counts[order]) - counts[order]
    held_prompts = np.zeros(len(hashes), dtype=bool)
    # A prompt is taken while pairs are missing and if it leaves half of the pairs to training.
    held_prompts[order] = (before < wanted) & (before + counts[order] <= max(wanted, len(mine) // 2))
    held = mine[held_prompts[prompt_of]]
    return held, held[:wanted]

"""The prompts that pairs are collected for: read one at a time, in two passes; memory holds eight bytes of each.

The first pass tells them from others, and finds those that come again or are held out; the second one answers them.
"""

import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.answering.found import Found
from dpo_jax.collecting.flags import NOTHING, CollectRequest, is_dataset
from dpo_jax.data.comparison import Skip
from dpo_jax.data.files import find_files
from dpo_jax.data.prompts import Prompt, each_prompt, prompts_digest, split_prompts
from dpo_jax.data.sources import find_sources
from dpo_jax.data.tokenise import hash_of, spoken_turns
from dpo_jax.disk import digest as digest_of
from dpo_jax.errors import UserError

# Why no answers are drawn for a prompt.
REASONS = {
    "no_prompt": "rows without a prompt",
    "repeated": "prompts that were there before",
    "held_out": "prompts that are held out",
    "not_rendered": "prompts that the template refuses",
    "too_long": "prompts that are too long for the model",
}


@dataclass(frozen=True)
class Surveyed:
    """What the first pass has found.

    Attributes:
      again: begins another pass.
      keep: bool `[prompts]`, those to answer.
      digest: of all prompts, in their order, and of which of them are kept.
      dropped: rows and prompts that are left out, by reason.
      name: of what was read.
    """

    again: Callable[[], Iterator[Prompt]]
    keep: np.ndarray
    digest: str
    dropped: dict[str, int]
    name: str

    def __len__(self) -> int:
        return int(self.keep.sum())

    def kept(self, skip: int = 0) -> Iterator[Prompt]:
        """The prompts to answer behind the first `skip`.

        Raises:
          UserError: there are fewer than there were: the file was changed.
        """
        count = 0
        for prompt, keeps in zip(self.again(), self.keep.tolist(), strict=False):
            if keeps:
                count += 1
                if count > skip:
                    yield prompt
        if count != len(self):
            raise UserError(f"{self.name} was changed while it was read; leave it as it is, and begin again")


def survey(r: CollectRequest, found: Found, held_out: Iterable[int]) -> Surveyed:
    """The first pass over the prompts.

    Args:
      held_out: `prompt_key` of the prompts that are left out.

    Raises:
      UserError: nothing can be read, a row of a file is no prompt, or none is left.
    """
    a = r.answering
    name = a.dataset or a.prompts
    skipped: Counter[str] = Counter()
    first: list[str] = []

    def each() -> Iterator[Prompt]:
        skipped.clear()
        rows: Iterator[Prompt | Skip] = each_prompt(a.prompts, a.columns) if not a.dataset else of_dataset(r, found)
        count = 0
        for one in rows:
            if isinstance(one, Skip):
                skipped["no_prompt"] += 1
                first[:] = first or [one.detail]
                continue
            yield one
            count += 1
            if count == a.limit:
                return

    keys = array.array("Q")

    def counted() -> Iterator[Prompt]:
        for prompt in each():
            keys.append(prompt_key(prompt))
            yield prompt

    digest = prompts_digest(counted())
    if not keys:
        raise UserError(f"{name}: no row gives a prompt{f'; first {first[0]}' if first else ''}")
    every = np.asarray(keys, np.uint64)
    there = np.isin(every, np.fromiter(held_out, np.uint64))
    once = np.zeros(len(every), bool)
    once[np.unique(every, return_index=True)[1]] = True
    dropped = Counter(skipped) + Counter({"held_out": int(there.sum()), "repeated": int((~once & ~there).sum())})
    if not (once & ~there).any():
        raise UserError(
            f"{name}: all {len(every):,} prompts are held out, to evaluate on; give others, or --held_out={NOTHING} if "
            "nothing is to be evaluated on them"
        )
    left_out = {reason: dropped[reason] for reason in REASONS if dropped[reason]}
    keep = once & ~there
    # Which prompts are held out is part of what a file is of.
    return Surveyed(each, keep, digest_of([digest.encode(), keep.tobytes()]), left_out, name)


def of_dataset(r: CollectRequest, found: Found, split: str = "") -> Iterator[Prompt | Skip]:
    """The prompts of the dataset that --prompts names; of its training split if none is named."""
    a = r.answering
    _, rows = split_prompts(
        a.dataset,
        dataset_path(r, found),
        split or a.split,
        columns=a.columns,
        revision=a.dataset_revision,
        default="train",
    )
    return rows


def dataset_path(r: CollectRequest, found: Found) -> str:
    """Where the dataset is: the dialogues of `synthetic` are those of the policy's run."""
    a = r.answering
    if a.dataset == "synthetic" and not a.dataset_path and found.run is not None and found.settings is not None:
        return str(found.run / f"synthetic-{found.settings.seed}")
    return a.dataset_path


def prompt_key(prompt: Prompt) -> int:
    """64 bits of a prompt's turns, as a cache of pairs knows it; of its text where it has none."""
    texts = prompt.comparison.texts
    return hash_of(spoken_turns(prompt.comparison) or list(texts or ()))


def held_out_keys(r: CollectRequest, found: Found) -> Iterator[int]:
    """Keys of the prompts that are left out, but for those that the policy's run holds out (see `of_the_run`).

    Raises:
      UserError: --held_out cannot be read.
    """
    if r.held_out == NOTHING:
        return
    a = r.answering
    if not r.held_out:
        if a.dataset and _has_test(r, found):
            yield from map(prompt_key, _prompts_alone(of_dataset(r, found, "test")))
        return
    if is_dataset(r.held_out):
        _, rows = split_prompts(r.held_out)
        yield from map(prompt_key, _prompts_alone(rows))
        return
    try:
        find_files(r.held_out)
    except UserError as error:
        raise UserError(f"--held_out={r.held_out}: {error}") from None
    yield from map(prompt_key, each_prompt(r.held_out))


def _has_test(r: CollectRequest, found: Found) -> bool:
    a = r.answering
    data = find_sources(a.dataset, dataset_path(r, found), columns=a.columns, revision=a.dataset_revision)
    return any(source.split == "test" for source in data.sources)


def _prompts_alone(rows: Iterable[Prompt | Skip]) -> Iterator[Prompt]:
    return (one for one in rows if isinstance(one, Prompt))


def of_the_run(found: Found, tokenizer: Any) -> tuple[list[int], str]:
    """Keys of the prompts that the policy's run holds out, and what is to be said of them.

    Raises:
      UserError: its data cannot be read any more.
    """
    if found.run is None or found.settings is None:
        return [], ""
    from dpo_jax.training.inputs import prepare_pairs

    try:
        held = prepare_pairs(found.settings, tokenizer, Path(found.run), None).evaluation
    except UserError as error:
        raise UserError(
            f"the prompts that {found.run} holds out cannot be told, as its data cannot be read ({error}); put it "
            f"back, or say --held_out=FILE|{NOTHING}"
        ) from None
    keys = np.unique(held.cache.prompt_hash[held.index]).tolist()
    return keys, f"{found.run}: its {len(keys):,} held-out prompts are left out" if keys else ""


def as_told(dropped: Mapping[str, int], words: Mapping[str, str]) -> list[str]:
    """Counts by reason in words."""
    return [f"{count:,} {words[reason]}" for reason, count in dropped.items() if count]

"""The prompts that pairs are collected for: read one at a time, in two passes; memory holds eight bytes of each.

The first pass tells them from others, and finds those that come again or are held out; the second one answers them.
"""

import array
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
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
      name: of what was read.
      again: begins another pass.
      keys: uint64 `[prompts]`, see `prompt_key`.
      content: digest of all prompts, in their order.
      without_prompt: rows that give none.
      held_out: bool `[prompts]`, those that are left out as others are evaluated on them.
    """

    name: str
    again: Callable[[], Iterator[Prompt]]
    keys: np.ndarray
    content: str
    without_prompt: int
    held_out: np.ndarray

    @functools.cached_property
    def keep(self) -> np.ndarray:
        """bool `[prompts]`: those to answer, each once."""
        once = np.zeros(len(self.keys), bool)
        once[np.unique(self.keys, return_index=True)[1]] = True
        return once & ~self.held_out

    @property
    def digest(self) -> str:
        """Of all prompts, in their order, and of which of them are answered."""
        return digest_of([self.content.encode(), self.keep.tobytes()])

    @property
    def dropped(self) -> dict[str, int]:
        """Rows and prompts that are left out, by reason."""
        held_out = int(self.held_out.sum())
        repeated = len(self.keys) - len(self) - held_out
        counts = {"no_prompt": self.without_prompt, "repeated": repeated, "held_out": held_out}
        return {reason: count for reason, count in counts.items() if count}

    def without(self, keys: Iterable[int]) -> "Surveyed":
        """The same where prompts of these keys are held out, too.

        Raises:
          UserError: none is left.
        """
        more = np.isin(self.keys, np.fromiter(keys, np.uint64))
        found = replace(self, held_out=self.held_out | more)
        if not len(found):
            raise UserError(
                f"{self.name}: all {len(self.keys):,} prompts are held out, to evaluate on; give others, or "
                f"--held_out={NOTHING} if nothing is to be evaluated on them"
            )
        return found

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


def survey(r: CollectRequest, found: Found) -> Surveyed:
    """The first pass over the prompts, of which none is held out yet.

    Raises:
      UserError: nothing can be read, or a row of a file is no prompt.
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
    return Surveyed(name, each, every, digest, skipped["no_prompt"], np.zeros(len(every), bool))


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
        find_files(r.held_out, [])  # reading it says what was passed over
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
        held = prepare_pairs(found.settings, tokenizer, found.run, None).evaluation
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

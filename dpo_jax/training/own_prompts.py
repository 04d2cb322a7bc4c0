"""The training prompts that the policy answers itself, in an order of the seed's: those of a round, or of an update."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_jax.data.comparison import Comparison
from dpo_jax.data.forms.transcripts import transcript_prompt
from dpo_jax.data.originals import originals_at
from dpo_jax.data.split import Pairs
from dpo_jax.training.inputs import sources_of
from dpo_jax.training.on_policy import AskedPrompt
from dpo_jax.training.setup import Run

AHEAD = 4096  # prompts whose rows are read together, as it takes a pass over the files
Row = Mapping[str, Any]  # of the data, as it is in its file


class OwnPrompts:
    """Blocks of prompts of the training pairs; each prompt once before any comes again.

    Args:
      count: prompts of a block.
    """

    def __init__(self, run: Run, count: int):
        pairs = run.data.train
        _, places = np.unique(pairs.cache.prompt_hash[pairs.index], return_index=True)
        self.run, self._places = run, np.sort(places)
        self.count = min(count, len(self._places))
        self._blocks: dict[int, list[tuple[AskedPrompt, Row]]] = {}

    def places(self, number: int) -> np.ndarray:
        """Places of a block's prompts among the training pairs: the next ones in an order of the seed's.

        Where all have been answered, they come again in another order.
        """
        turn, begin = divmod(number * self.count, len(self._places))
        order = lambda turn: np.random.default_rng([self.run.settings.seed, turn]).permutation(self._places)
        first = order(turn)[begin:][: self.count]
        if len(first) == self.count:
            return first
        again = order(turn + 1)
        return np.concatenate([first, again[~np.isin(again, first)][: self.count - len(first)]])

    def read(self, places: Sequence[int]) -> dict[int, tuple[AskedPrompt, Row]]:
        """By place those prompts that are conversations, and the rows that they are of."""
        pairs, form = self.run.data.train, self.run.data.form
        found = originals_at(pairs, sources_of(self.run.settings, self.run.workdir), places)
        return {place: (asked_prompt(pairs, form, place, one.comparison), one.row) for place, one in found}

    def block(self, number: int, blocks: int) -> list[tuple[AskedPrompt, Row]]:
        """The prompts of a block that are conversations, of so many blocks that there will be in all."""
        if number not in self._blocks:
            ahead = range(number, min(blocks, number + max(1, AHEAD // self.count)))
            places = {n: self.places(n).tolist() for n in ahead}
            found = self.read(list(dict.fromkeys(place for block in places.values() for place in block)))
            self._blocks = {n: [found[at] for at in block if at in found] for n, block in places.items()}
        return self._blocks[number]


def asked_prompt(pairs: Pairs, form: str, place: int, comparison: Comparison) -> AskedPrompt:
    """The prompt of the pair at a place, rendered in this form, whose conversation is that of the comparison."""
    text = None if comparison.texts is None else comparison.texts[0]
    strips = form == "plain" or transcript_prompt(text) is not None
    ids = pairs[place][0].tolist()
    return AskedPrompt(int(pairs.index[place]), ids, tuple(ids), comparison, strips)

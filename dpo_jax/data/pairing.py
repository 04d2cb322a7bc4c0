"""Rated answers of one prompt to pairs, wherever in a source they stand; only what is unmatched is held."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_jax.data.comparison import LabeledComparison, RatedAnswer, Skip, checked
from dpo_jax.data.forms.fields import without_metadata
from dpo_jax.disk import digest


@dataclass
class Pairing:
    """Answers that wait, by what they must have in common with another: all that the template gets before them."""

    waiting: dict[str, list[RatedAnswer]] = field(default_factory=dict)

    def add(self, answer: RatedAnswer) -> LabeledComparison | Skip | None:
        """The pair of this answer and the first that waits with the other rating; None: now this one waits, too.

        So the i-th good answer of a prompt meets its i-th bad one.
        """
        turns = [without_metadata(message) for message in answer.prompt_conversation]
        said: Sequence[Any] = (turns, answer.tools, answer.chat_template_kwargs)
        key = digest(json.dumps(said, sort_keys=True, default=str), size=16)
        waiting = self.waiting.setdefault(key, [])
        if not waiting or waiting[0].good == answer.good:
            waiting.append(answer)
            return None
        other = waiting.pop(0)
        if not waiting:
            del self.waiting[key]
        good, bad = (answer, other) if answer.good else (other, answer)
        return checked(good.against(bad))

    def unpaired(self) -> int:
        """How many answers wait still."""
        return sum(map(len, self.waiting.values()))

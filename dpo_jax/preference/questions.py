"""Pairs as questions with a label for an answer: what a generative preference model is asked, and is trained on.

The question is in the format of `comparing.py`, in one order a pair, drawn by the seed and the pair's own text: so A
and B are right equally often, whatever the file's order. Only the label's tokens are answered; what ends a turn is not.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from dpo_jax.data.comparison import Comparison, Label, LabeledComparison, Message, Skip
from dpo_jax.data.render import Rendered, Renderer, render_batch
from dpo_jax.disk import digest
from dpo_jax.preference import comparing
from dpo_jax.preference.comparing import (
    HEADING_A,
    HEADING_B,
    HEADING_LABEL,
    LABELS,
    chat_question,
    comparison_messages,
    label_message,
)

OTHER: dict[Label, Label] = {"A": "B", "B": "A", "Tie": "A"}
Ids = Sequence[int]


def question_of(renderer: Renderer) -> Callable[[Comparison], list[Message]]:
    """How this model is asked: in the format of comparisons, or as one user's turn where its template takes no system
    turn between others, or it has none."""
    if renderer.form == "chat":
        user: Message = {"role": "user", "content": "Name a colour."}
        answers = ([label_message("A")], [label_message("B")])
        asked = Comparison(comparison_messages(Comparison([user], *answers)), *answers)
        found = render_batch(renderer, [LabeledComparison(asked, "A")])[0]
        if not isinstance(found, Skip):
            shown = str(renderer.tokenizer.decode(found.prompt))
            places = [shown.find(heading) for heading in (HEADING_A, HEADING_B, HEADING_LABEL)]
            if 0 <= places[0] < places[1] < places[2]:  # some templates keep one system turn of several
                return comparison_messages
    return chat_question


def asking(renderer: Renderer) -> Callable[[Comparison, list[Message], list[Message]], Comparison]:
    """What makes of a comparison and two labels the question with these for answers.

    Tools and options of the template go with it where the turns stay turns; elsewhere they stand in the text.
    """
    question = question_of(renderer)

    def ask(one: Comparison, first: list[Message], second: list[Message]) -> Comparison:
        beside = (one.tools, one.chat_template_kwargs) if question is comparison_messages else (None, None)
        return Comparison(question(one), first, second, *beside)

    return ask


def without_common_end(labels: Sequence[Ids]) -> list[Ids]:
    """Token ids of labels without the tokens that all of them end with, each with at least one left.

    >>> without_common_end([[5, 2, 9], [6, 2, 9], [7, 8, 2, 9]])
    [[5], [6], [7, 8]]
    """
    end = 0
    while end < min(map(len, labels)) - 1 and len({one[-1 - end] for one in labels}) == 1:
        end += 1
    return [one[: len(one) - end] for one in labels]


@dataclasses.dataclass(frozen=True)
class Questions:
    """Labelled comparisons to pairs of labels: the right one chosen, another one rejected.

    Attributes:
      renderer: of the model that is trained.
      seed: of the orders.
    """

    renderer: Renderer
    seed: int

    @property
    def identity(self) -> list[object]:
        """What decides the questions, besides the pairs: for the fingerprint of a cache."""
        code = [Path(str(path)).read_text() for path in (comparing.__file__, __file__)]
        return ["comparison", self.seed, question_of(self.renderer).__name__, digest("".join(code))]

    def asked(self, pairs: Sequence[LabeledComparison]) -> list[LabeledComparison]:
        """The questions, in the order of the pairs."""
        ask = asking(self.renderer)
        turned = [pair.swap() if self._turns(pair.comparison) else pair for pair in pairs]
        answers = lambda label: ([label_message(label)], [label_message(OTHER[label])])
        return [LabeledComparison(ask(pair.comparison, *answers(pair.label)), "A") for pair in turned]

    def cut(self, rendered: Rendered) -> tuple[Ids, Ids]:
        """Token ids of both labels, without what ends every one of them."""
        chosen, rejected = without_common_end([rendered.chosen, rendered.rejected])
        return chosen, rejected

    def _turns(self, comparison: Comparison) -> bool:
        """Whether a comparison is asked in the other order; the same pair is asked alike, whichever way it is given."""
        prompt: object = list(comparison.prompt_conversation)
        a, b = (json.dumps(list(x), sort_keys=True) for x in (comparison.completion_a, comparison.completion_b))
        if comparison.texts is not None and not prompt:
            prompt, a, b = comparison.texts
        parts = [self.seed, prompt, *sorted((a, b))]
        drawn = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=1).digest()[0] & 1
        return bool(drawn) != (a <= b)


assert set(OTHER) == set(LABELS)

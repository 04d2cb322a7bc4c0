"""Scores of the answers to one prompt by any preference model. No JAX of its own.

A judge that scores answers gives its own scores; one that compares them holds a tournament within the group, every
answer against every other, in both orders.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dpo_jax.data.comparison import Comparison, Message
from dpo_jax.preference.models import Answered, PreferenceModel, Scorer
from dpo_jax.preference.statistics import both_orders_verdict
from dpo_jax.preference.verdicts import ask, comparisons_at_once


@dataclass(frozen=True)
class AnswerGroup:
    """A prompt with several answers.

    Attributes:
      asked: a comparison whose prompt this is.
      completions: the answers as messages.
      texts: the answers letter for letter, where `asked` has its prompt so; None: the messages say all.
    """

    asked: Comparison
    completions: Sequence[Sequence[Message]]
    texts: Sequence[str] | None = None

    def answered(self, i: int) -> Answered:
        """The prompt with answer `i`."""
        texts = None if self.texts is None or self.asked.texts is None else (self.asked.texts[0], self.texts[i])
        return Answered(
            self.asked.prompt_conversation,
            self.completions[i],
            self.asked.tools,
            self.asked.chat_template_kwargs,
            texts,
        )

    def against(self, i: int, j: int) -> Comparison:
        """The comparison of answer `i`, as A, with answer `j`, as B."""
        texts = None
        if self.texts is not None and self.asked.texts is not None:
            texts = (self.asked.texts[0], self.texts[i], self.texts[j])
        a, b = self.completions[i], self.completions[j]
        return replace(self.asked, completion_a=a, completion_b=b, texts=texts)


def scores_in_groups(judge: PreferenceModel, groups: Sequence[AnswerGroup]) -> list[np.ndarray]:
    """The scores of every group's answers, float64 `[answers]` each; more is better, NaN: none.

    A `Scorer` gives its own scores. Any other judge's is the mean of its verdicts for the answer against the others of
    its group that it has a verdict on, from -1 (loses against all) to 1: (wins - losses) / matches, as in
    tinker-cookbook's group tournament, where verdicts may be between.

    Raises:
      UserError: the judge does not answer, or says no numbers.
    """
    found = _own_scores(judge, groups) if isinstance(judge, Scorer) else _tournaments(judge, groups)
    # With the nine digits that are written, so that what is read back decides the same.
    return [np.array([float(f"{one:.9g}") for one in of_group], np.float64) for of_group in found]


def groups_at_once(judge: PreferenceModel, answers: int) -> int:
    """How many groups of so many answers fill about a block of what a judge is asked at once."""
    work = answers if isinstance(judge, Scorer) else answers * (answers - 1) // 2
    return max(1, comparisons_at_once(judge) // max(1, work))


def _own_scores(judge: Scorer, groups: Sequence[AnswerGroup]) -> list[np.ndarray]:
    counts = [len(group.completions) for group in groups]
    scores = judge.scores([group.answered(i) for group in groups for i in range(len(group.completions))])
    return np.split(np.asarray(scores, np.float64), np.cumsum(counts)[:-1])


def _tournaments(judge: PreferenceModel, groups: Sequence[AnswerGroup]) -> list[np.ndarray]:
    pairs = [(g, i, j) for g, group in enumerate(groups) for j in range(len(group.completions)) for i in range(j)]
    said = both_orders_verdict(*ask(judge, [groups[g].against(i, j) for g, i, j in pairs]).orders)
    wins = [np.full((len(group.completions),) * 2, np.nan) for group in groups]
    for (g, i, j), verdict in zip(pairs, said, strict=True):
        wins[g][i, j], wins[g][j, i] = -verdict, verdict
    there = [~np.isnan(one) for one in wins]
    sums = [np.where(known, one, 0.0).sum(1) for one, known in zip(wins, there, strict=True)]
    counts = [known.sum(1) for known in there]
    return [np.where(n > 0, total / np.maximum(n, 1), np.nan) for total, n in zip(sums, counts, strict=True)]

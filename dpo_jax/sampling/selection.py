"""Preference pairs from the scores of several answers to one prompt. No JAX.

Which answers are paired is a `mode`:
- `best_worst`: the best answer with the worst one (RLHFlow, Dong et al. 2024, arXiv 2405.07863).
- `best_random`: the best with one of all that are worse, drawn.
- `mu_2sigma`: the best with the one whose score is nearest to the mean less two standard deviations: with more answers,
  the worst one teaches less and less (Xiao et al. 2025, arXiv 2502.16825).
- `all`: every two answers.

A score that a length penalty was taken from decides; among equal scores the answer that was drawn earlier.

>>> rules = Selection("best_worst", length_penalty=0.1)
>>> candidates = [DrawnAnswer("short", 2, True), DrawnAnswer("a long answer", 30, True), DrawnAnswer("cut", 9, False)]
>>> select_pairs([1.0, 2.0, 5.0], candidates, rules, np.random.default_rng(0))
Selected(pairs=[(0, 1)], dropped={'unfinished': 1})
"""

import collections
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_jax.errors import UserError

MODES = ("best_worst", "best_random", "mu_2sigma", "all")
# Why an answer is in no pair, and why a prompt has none; in the order in which they are looked for.
OF_ANSWERS = {
    "no_score": "answers that the judge gave no score or verdict",
    "unfinished": "answers that were cut off at max_tokens",
    "empty": "answers that say nothing",
    "duplicate": "answers that were drawn before",
}
OF_PROMPTS = {
    "too_few": "prompts with fewer than two answers left",
    "tie": "prompts whose answers have equal scores",
    "small_margin": "prompts whose scores differ by less than min_margin",
}


@dataclass(frozen=True)
class Selection:
    """Which answers become pairs.

    Attributes:
      mode: one of `MODES`.
      length_penalty: taken from a score for each token of the answer.
      min_margin: the least difference of a pair's scores, penalties taken; equal scores are never a pair.
      keep_unfinished: answers without an end may be in pairs.
    """

    mode: str = "best_worst"
    length_penalty: float = 0.0
    min_margin: float = 0.0
    keep_unfinished: bool = False

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
          UserError: names the field.
        """
        if self.mode not in MODES:
            raise UserError(f"mode={self.mode} does not exist; choose from {', '.join(MODES)}")
        for name in ("length_penalty", "min_margin"):
            if not 0 <= getattr(self, name) < np.inf:
                raise UserError(f"{name}={getattr(self, name)}; needs a number from 0 on")


@dataclass(frozen=True)
class DrawnAnswer:
    """An answer: its text, its tokens, and whether it came to an end."""

    text: str
    tokens: int
    has_ended: bool


@dataclass(frozen=True)
class Selected:
    """Places of better and worse answers, and how many answers (or the one prompt) are in no pair, by reason."""

    pairs: list[tuple[int, int]]
    dropped: dict[str, int]


def select_pairs(
    scores: Sequence[float] | np.ndarray, answers: Sequence[DrawnAnswer], rules: Selection, rng: np.random.Generator
) -> Selected:
    """The pairs of one prompt's answers.

    Args:
      scores: of the answers, more is better, NaN: none.
      rng: draws in mode `best_random`.
    """
    reasons = _reasons(scores, answers, rules)
    dropped = collections.Counter(reason for reason in reasons if reason)
    left = np.array([i for i, reason in enumerate(reasons) if not reason], np.int64)
    pairs: list[tuple[int, int]] = []
    if len(left) < 2:
        dropped["too_few"] += 1
    else:
        lengths = np.array([answers[i].tokens for i in left], np.float64)
        values = np.asarray(scores, np.float64)[left] - rules.length_penalty * lengths
        pairs = [(int(left[i]), int(left[j])) for i, j in _chosen(values, rules, rng)]
        if not pairs:
            dropped["tie" if values.max() == values.min() else "small_margin"] += 1
    return Selected(pairs, {name: dropped[name] for name in (*OF_ANSWERS, *OF_PROMPTS) if dropped[name]})


def _reasons(scores: Sequence[float] | np.ndarray, answers: Sequence[DrawnAnswer], rules: Selection) -> list[str]:
    seen: set[str] = set()
    reasons = []
    for score, answer in zip(scores, answers, strict=True):
        text = answer.text.strip()
        checks = (np.isnan(score), not (answer.has_ended or rules.keep_unfinished), not text, text in seen)
        reasons.append(next((name for name, fails in zip(OF_ANSWERS, checks, strict=True) if fails), ""))
        seen.add(text)
    return reasons


def _chosen(values: np.ndarray, rules: Selection, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Places of better and worse of at least two values, no two of them equal."""
    best = int(values.argmax())
    apart = lambda i, j: values[i] - values[j] > 0 and values[i] - values[j] >= rules.min_margin
    if rules.mode == "all":
        order = np.argsort(-values, kind="stable").tolist()
        return [(i, j) for at, i in enumerate(order) for j in order[at + 1 :] if apart(i, j)]
    worse = [j for j in range(len(values)) if apart(best, j)]
    if not worse:
        return []
    if rules.mode == "best_random":
        return [(best, worse[int(rng.integers(len(worse)))])]
    aim = values.min() if rules.mode == "best_worst" else values.mean() - 2 * values.std()
    return [(best, min(worse, key=lambda j: (abs(values[j] - aim), j)))]

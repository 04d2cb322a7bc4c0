"""What a preference model is: a callable that says of every comparison which completion is better. No JAX.

>>> from dpo_jax.data.comparison import Comparison
>>> answer = lambda text: [{"role": "assistant", "content": text}]
>>> user = {"role": "user", "content": "Name a colour."}
>>> comparison = Comparison([user], answer("Red, I would say."), answer("Red."))
>>> shorter = Function("shorter", lambda c: 1.0 if len(str(c.completion_b)) < len(str(c.completion_a)) else -1.0)
>>> shorter([comparison, swapped(comparison)]).tolist()
[1.0, -1.0]
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from dpo_jax.data.comparison import Comparison, Message
from dpo_jax.errors import UserError


class Answered(NamedTuple):
    """A conversation with one completion of it; what else stands there is as in `Comparison`.

    `texts` are prompt and completion letter for letter, where only the tokenizer can tell them apart.
    """

    conversation: Sequence[Message]
    completion: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    texts: tuple[str, str] | None = None


def answered_of(comparison: Comparison) -> tuple[Answered, Answered]:
    """The conversation with completion A, and with B."""
    c = comparison
    beside = c.tools, c.chat_template_kwargs
    prompt, *both = c.texts or ("", "", "")
    a, b = (None if c.texts is None else (prompt, text) for text in both)
    return (
        Answered(c.prompt_conversation, c.completion_a, *beside, a),
        Answered(c.prompt_conversation, c.completion_b, *beside, b),
    )


@runtime_checkable
class PreferenceModel(Protocol):
    """A judge of comparisons.

    Attributes:
      name: what reports call it.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, comparisons: Sequence[Comparison]) -> np.ndarray:
        """The verdicts, float64 `[comparisons]`.

        In [-1, 1]: +1 means that B is better, -1 that A is, 0 that they are equal, and NaN that there is no verdict,
        which is counted and is no tie. Exchanging A and B negates a verdict exactly.
        """
        ...


@runtime_checkable
class Scorer(PreferenceModel, Protocol):
    """A preference model that gives every completion a number of its own."""

    def scores(self, answered: Sequence[Answered | tuple[Sequence[Message], Sequence[Message]]]) -> np.ndarray:
        """float64 `[answered]`, more is better, without bounds; NaN: none."""
        ...


@runtime_checkable
class InBothOrders(PreferenceModel, Protocol):
    """A preference model that can tell what it said in each order; its verdict is half their difference."""

    def orders(self, comparisons: Sequence[Comparison]) -> np.ndarray:
        """Verdicts on (A, B) and on (B, A), float64 `[2, comparisons]`: +1, the second that was shown is better."""
        ...


def swapped(comparison: Comparison) -> Comparison:
    """The comparison with A and B exchanged."""
    texts = comparison.texts and (comparison.texts[0], comparison.texts[2], comparison.texts[1])
    return replace(comparison, completion_a=comparison.completion_b, completion_b=comparison.completion_a, texts=texts)


def verdict_of_scores(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bradley and Terry's probability that B wins, 1 / (1 + exp(a - b)), on [-1, 1]: tanh((b - a) / 2)."""
    return np.tanh((np.asarray(b, np.float64) - np.asarray(a, np.float64)) / 2)


@dataclass(frozen=True)
class Pointwise:
    """A preference model made of scores: every completion of a call is scored once, however often it is compared.

    Attributes:
      name: of the model.
      score: conversations with one completion each, all different, to float64 `[them]`.
    """

    name: str
    score: Callable[[Sequence[Answered]], np.ndarray]

    def scores(self, answered: Sequence[Answered | tuple[Sequence[Message], Sequence[Message]]]) -> np.ndarray:
        places: dict[str, int] = {}
        each = [Answered(*one) for one in answered]
        which = [places.setdefault(_key(one), len(places)) for one in each]
        first: dict[int, Answered] = {}
        for at, one in zip(which, each, strict=True):
            first.setdefault(at, one)
        if not first:
            return np.zeros(0)
        return np.asarray(self.score(list(first.values())), np.float64)[which]

    def __call__(self, comparisons: Sequence[Comparison]) -> np.ndarray:
        both = [one for comparison in comparisons for one in answered_of(comparison)]
        a, b = self.scores(both).reshape(-1, 2).T
        return verdict_of_scores(a, b)


def _key(answered: Answered) -> str:
    return json.dumps(answered, sort_keys=True, ensure_ascii=False, default=str)


@dataclass(frozen=True)
class Function:
    """A preference model made of a function of one comparison: `function(Comparison) -> float`, None or NaN for none.

    It is asked in both orders, and its verdict is half their difference: exchanging A and B negates it exactly,
    whatever the function does.
    """

    name: str
    function: Callable[[Comparison], Any]

    def __call__(self, comparisons: Sequence[Comparison]) -> np.ndarray:
        first, second = self.orders(comparisons)
        return (first - second) / 2

    def orders(self, comparisons: Sequence[Comparison]) -> np.ndarray:
        """What the function says of (A, B) and of (B, A), `[2, comparisons]`."""
        asked = [(self._ask(c), self._ask(swapped(c))) for c in comparisons]
        return np.asarray(asked, np.float64).reshape(-1, 2).T

    def _ask(self, comparison: Comparison) -> float:
        try:
            value = self.function(comparison)
        except UserError:
            raise
        except Exception as error:
            words = " ".join(str(error).split())
            raise UserError(f"judge {self.name}: it ended in {type(error).__name__}: {words}; mend it") from error
        number = math.nan if value is None else value
        if isinstance(number, bool) or not isinstance(number, int | float | np.number):
            said = f"{value!r:.60} ({type(value).__name__})"
            raise UserError(f"judge {self.name}: it said {said}; needed is a number from -1 to 1, or None")
        if not (math.isnan(number) or -1 <= number <= 1):
            raise UserError(f"judge {self.name}: it said {number:g}; needed is a number from -1 (A) to 1 (B), or None")
        return float(number)


@dataclass(frozen=True)
class Ensemble:
    """Several preference models: the mean of those that have a verdict; none where no one has."""

    members: tuple[PreferenceModel, ...]

    @property
    def name(self) -> str:
        return ",".join(member.name for member in self.members)

    @property
    def is_remote(self) -> bool:
        """Whether a member is asked over a network: then one process of several asks for all."""
        return any(getattr(member, "is_remote", False) for member in self.members)

    def told(self) -> list[str]:
        """What its members tell."""
        return [line for member in self.members for line in told_by(member)]

    def each(self, comparisons: Sequence[Comparison]) -> np.ndarray:
        """The verdicts of every member, `[members, comparisons]`."""
        return np.stack([member(comparisons) for member in self.members])

    def __call__(self, comparisons: Sequence[Comparison]) -> np.ndarray:
        return mean_verdict(self.each(comparisons))


def told_by(judge: PreferenceModel) -> list[str]:
    """What a user should know of what a judge was asked, in lines: a server's answers, cache, tokens, failures."""
    told = getattr(judge, "told", None)
    return told() if callable(told) else []


def mean_verdict(each: np.ndarray) -> np.ndarray:
    """Verdicts `[members, n]` to their means `[n]` over the members that have one; NaN where none has."""
    there = ~np.isnan(each)
    return np.where(there.any(0), np.where(there, each, 0.0).sum(0) / np.maximum(there.sum(0), 1), np.nan)


def disagreement(each: np.ndarray) -> np.ndarray:
    """Verdicts `[members, n]` to their standard deviations `[n]` over the members; NaN below two verdicts."""
    there = ~np.isnan(each)
    count = np.maximum(there.sum(0), 1)
    mean = np.where(there, each, 0.0).sum(0) / count
    spread = np.sqrt((np.where(there, each - mean, 0.0) ** 2).sum(0) / count)
    return np.where(there.sum(0) > 1, spread, np.nan)

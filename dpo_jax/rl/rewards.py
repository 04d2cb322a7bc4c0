"""What answers are worth: preference models, verifiers, and weighted sums of them; then what is taken from it.

A verifier is a user's `module:function(prompt, answer, row) -> number or None`: the prompt as messages, the answer's
text, and the row of the data as it is in its file, where a right answer may stand.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_jax.config.rewards import weighted_names
from dpo_jax.errors import UserError
from dpo_jax.preference.load import load_preference_model
from dpo_jax.preference.models import Function, PreferenceModel, Scorer
from dpo_jax.sampling.params import Answer
from dpo_jax.training.on_policy import AskedPrompt, answer_group, asked_once, scores_everywhere
from dpo_jax.training.own_prompts import Row

Prompts = Sequence[tuple[AskedPrompt, Row]]


@dataclass(frozen=True)
class Verifier:
    """A user's function of a prompt, an answer and the row of the data.

    Of several processes the first asks it for all, as it may not say the same twice.
    """

    name: str
    function: Callable[..., Any]
    is_remote: bool = True

    def score(self, asked: AskedPrompt, answer: str, row: Mapping[str, Any]) -> float:
        """Its number; NaN where it says None.

        Raises:
          UserError: it failed, or said no number.
        """
        try:
            value = self.function(asked.comparison.prompt_conversation, answer, row)
        except UserError:
            raise
        except Exception as error:
            words = " ".join(str(error).split())
            raise UserError(f"verifier {self.name}: it ended in {type(error).__name__}: {words}; mend it") from error
        if value is None:
            return math.nan
        if not isinstance(value, int | float | np.number | np.bool_) or not math.isfinite(value):
            said = f"{value!r:.60} ({type(value).__name__})"
            raise UserError(f"verifier {self.name}: it said {said}; needed is a finite number, or None for none")
        return float(value)


@dataclass(frozen=True)
class RewardPart:
    """A part of a reward: who says it, and its weight."""

    name: str
    weight: float
    judge: PreferenceModel | Verifier


class Reward:
    """A weighted sum of what judges and verifiers say of answers.

    Args:
      spec: see `config.rewards`.

    Raises:
      UserError: a part cannot be loaded.
    """

    def __init__(self, spec: str):
        self.parts = [RewardPart(name, weight, load_part(name)) for name, weight in weighted_names(spec)]
        self.name = spec

    @property
    def scores_alone(self) -> bool:
        """Whether an answer has a reward of its own, and not only among other answers to its prompt."""
        return all(isinstance(part.judge, Verifier | Scorer) for part in self.parts)

    def __call__(self, prompts: Prompts, answers: Sequence[Sequence[Answer]]) -> "Rewarded":
        """What the answers to each prompt are worth; every process of several must call it.

        Raises:
          UserError: a judge does not answer, or a verifier fails.
        """
        groups = [answer_group(asked, of_prompt) for (asked, _), of_prompt in zip(prompts, answers, strict=True)]
        each = {}
        for part in self.parts:
            if not isinstance(part.judge, Verifier):
                each[part.name] = np.stack(scores_everywhere(part.judge, groups))
                continue
            each[part.name] = _verified(part.judge, prompts, answers)
        total = sum(part.weight * each[part.name] for part in self.parts)
        return Rewarded(np.asarray(total, np.float64), each)


def _verified(verifier: Verifier, prompts: Prompts, answers: Sequence[Sequence[Answer]]) -> np.ndarray:
    """What a verifier says of the answers to each prompt, the same in all processes."""
    ask = lambda: np.array(
        [
            verifier.score(asked, said(asked, answer), row)
            for (asked, row), of_prompt in zip(prompts, answers, strict=True)
            for answer in of_prompt
        ]
    )
    counts = [len(of_prompt) for of_prompt in answers]
    found = asked_once(verifier, sum(counts), ask)
    return np.stack(np.split(found, np.cumsum(counts)[:-1]))


def said(asked: AskedPrompt, answer: Answer) -> str:
    """An answer's text as a verifier takes it."""
    return str(asked.completion(answer.text)[0]["content"])


@dataclass(frozen=True)
class Rewarded:
    """Rewards of the answers to each prompt, float64 `[prompts, n]`, NaN for none; `parts` are those of each part."""

    total: np.ndarray
    parts: Mapping[str, np.ndarray]


def load_part(name: str) -> PreferenceModel | Verifier:
    """The preference model or the verifier of a name: a function of three arguments is a verifier.

    Raises:
      UserError: it cannot be loaded.
    """
    judge = load_preference_model(name)
    if isinstance(judge, Function) and _arguments(judge.function) == 3:
        return Verifier(name, judge.function)
    return judge


def _arguments(function: Callable[..., Any]) -> int:
    """How many arguments a function must be given by position."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 1
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters)


def adjusted(
    rewards: np.ndarray, answers: Sequence[Sequence[Answer]], unfinished: str | float, length_penalty: float
) -> np.ndarray:
    """Rewards less a penalty for length; an answer that was cut off is worth what `unfinished` says.

    Args:
      rewards: `[prompts, n]`.
      unfinished: "score", as it is; "drop", NaN; or a number.
    """
    tokens = np.array([[len(answer.token_ids) for answer in group] for group in answers])
    found = rewards - length_penalty * tokens
    if unfinished == "score":
        return found
    cut = np.array([[answer.finish_reason != "stop" for answer in group] for group in answers])
    return np.where(cut, math.nan if unfinished == "drop" else float(unfinished), found)

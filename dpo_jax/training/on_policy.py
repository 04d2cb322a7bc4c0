"""On-policy preferences: prompts are answered by the policy, the answers scored by a judge, and pairs made of them.

`collect_pairs` is one block of it; `python -m dpo_jax.collect` writes the blocks to a file, and rounds of training take
them as they are.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpo_jax.data.comparison import Comparison, Message
from dpo_jax.errors import UserError
from dpo_jax.model.config import Params
from dpo_jax.preference.models import PreferenceModel
from dpo_jax.preference.ranking import AnswerGroup, scores_in_groups
from dpo_jax.sampling.engine import Name, Sampler, prompt_identity
from dpo_jax.sampling.params import Answer, SamplingParams
from dpo_jax.sampling.selection import DrawnAnswer, Selection, select_pairs


@dataclass(frozen=True)
class AskedPrompt:
    """A prompt to collect pairs for.

    Attributes:
      id: what its pairs are known by.
      ids: its tokens.
      name: what its draws depend on.
      comparison: its prompt is shown to the judge.
      strips: blanks around an answer are none of it, as the prompt is a transcript.
      as_texts: its text is what the model is given letter for letter, so it is written as such.
    """

    id: str | int
    ids: Sequence[int]
    name: Name
    comparison: Comparison
    strips: bool = False
    as_texts: bool = False

    def completion(self, text: str) -> list[Message]:
        return [{"role": "assistant", "content": text.strip() if self.strips else text}]


@dataclass(frozen=True)
class PairAnswers:
    """A pair: the prompt, and its better and its worse answer with their scores and which of n they are."""

    asked: AskedPrompt
    answers: tuple[Answer, Answer]
    scores: tuple[float, float]
    samples: tuple[int, int]


@dataclass(frozen=True)
class Collected:
    """What became of a block of prompts.

    Attributes:
      pairs: in the order of the prompts.
      dropped: answers and prompts without a pair, by reason.
      scores: of all answers, `[prompts][n]`, NaN for none.
      tokens: drawn.
      sampling_seconds, judging_seconds: of wall time.
    """

    pairs: list[PairAnswers]
    dropped: Mapping[str, int]
    scores: list[np.ndarray]
    tokens: int
    sampling_seconds: float
    judging_seconds: float


def answer_group(asked: AskedPrompt, answers: Sequence[Answer]) -> AnswerGroup:
    """A prompt with its answers as preference models take them."""
    texts = [answer.text for answer in answers]
    return AnswerGroup(asked.comparison, [asked.completion(text) for text in texts], texts)


@dataclass(frozen=True)
class ScoredAnswers:
    """The answers to a block of prompts, `[prompts][n]`, and their scores, NaN for none.

    `sampling_seconds` and `judging_seconds` are of wall time.
    """

    answers: Sequence[Sequence[Answer]]
    scores: Sequence[np.ndarray]
    sampling_seconds: float
    judging_seconds: float

    @property
    def tokens(self) -> int:
        """How many were drawn."""
        return sum(len(answer.token_ids) for answers in self.answers for answer in answers)


def draw_and_score(
    sampler: Sampler,
    params: Params,
    score: Callable[[Sequence[Sequence[Answer]]], Sequence[np.ndarray]],
    prompts: Sequence[AskedPrompt],
    asked: SamplingParams,
    beat: Callable[[str], None] = lambda what: None,
) -> ScoredAnswers:
    """Answer the prompts n times each and score the answers. Every process of several must call it.

    Args:
      score: the answers to each prompt → their scores, the same in all processes.
      beat: is told what begins, which may take long.
    """
    beat("drawing the policy's answers")
    begin = time.monotonic()
    drawn = sampler.answers(params, [one.ids for one in prompts], asked, [one.name for one in prompts])
    middle = time.monotonic()
    beat("asking the judge")
    scores = score(drawn)
    return ScoredAnswers(drawn, scores, middle - begin, time.monotonic() - middle)


def collect_pairs(
    sampler: Sampler,
    params: Params,
    judge: PreferenceModel,
    prompts: Sequence[AskedPrompt],
    asked: SamplingParams,
    rules: Selection,
    beat: Callable[[str], None] = lambda what: None,
) -> Collected:
    """Answer the prompts n times each, score the answers and pair them. Every process of several must call it.

    Args:
      beat: is told what begins, which may take long.

    Raises:
      UserError: the judge does not answer.
    """
    if not prompts:
        return Collected([], {}, [], 0, 0.0, 0.0)
    groups = lambda drawn: [answer_group(one, answers) for one, answers in zip(prompts, drawn, strict=True)]
    score = lambda drawn: scores_everywhere(judge, groups(drawn))
    found = draw_and_score(sampler, params, score, prompts, asked, beat)
    dropped: Counter[str] = Counter()
    pairs: list[PairAnswers] = []
    for one, answers, values in zip(prompts, found.answers, found.scores, strict=True):
        selected = select_pairs(values, list(map(candidate, answers)), rules, pair_rng(asked, one.name))
        dropped.update(selected.dropped)
        for i, j in selected.pairs:
            both = float(values[i]), float(values[j])
            pairs.append(PairAnswers(one, (answers[i], answers[j]), both, (i, j)))
    return Collected(pairs, dropped, list(found.scores), found.tokens, found.sampling_seconds, found.judging_seconds)


def check_judged(judge: PreferenceModel, found: Collected) -> None:
    """Refuse, with a UserError, a judge that has said nothing of any answer of a block."""
    if found.scores and all(np.isnan(values).all() for values in found.scores):
        count = sum(map(len, found.scores))
        raise UserError(f"judge={judge.name}: no verdict on any of {count} answers; is it a judge of this data?")


def candidate(answer: Answer) -> DrawnAnswer:
    """What decides whether an answer may be in a pair."""
    return DrawnAnswer(answer.text, len(answer.token_ids), answer.finish_reason == "stop")


def pair_rng(asked: SamplingParams, name: Name) -> np.random.Generator:
    """Draws of a prompt's pairs: they depend on seed, round and prompt alone."""
    return np.random.default_rng([asked.seed, asked.round, *prompt_identity(name).tolist()])


def scores_everywhere(judge: PreferenceModel, groups: Sequence[AnswerGroup]) -> list[np.ndarray]:
    """The scores, the same in all processes, see `asked_once`."""
    counts = [len(group.completions) for group in groups]
    found = asked_once(judge, sum(counts), lambda: np.concatenate(scores_in_groups(judge, groups)))
    return np.split(found, np.cumsum(counts)[:-1])


def asked_once(judge: object, count: int, ask: Callable[[], np.ndarray]) -> np.ndarray:
    """What a judge says, float64 `[count]`, the same in all processes: a server is asked by the first one alone.

    Raises:
      UserError: in all processes where the first one's judge does not answer.
    """
    if jax.process_count() == 1 or not getattr(judge, "is_remote", False):
        return ask()
    found, why = np.zeros(count + 1), "the judge of the first process does not answer"
    if jax.process_index() == 0:
        try:
            found[:-1] = ask()
        except UserError as error:
            found[-1], why = 1, str(error)
    with jax.transfer_guard("allow"):  # a few numbers of every prompt
        # As halves, since JAX makes float32 of float64.
        halves = multihost_utils.broadcast_one_to_all(found.view(np.uint32))
    found = np.asarray(halves, np.uint32).view(np.float64)
    if found[-1]:
        raise UserError(why)
    return found[:-1]


def pair_record(pair: PairAnswers, about: Mapping[str, Any]) -> dict[str, Any]:
    """The line of a pair: a labelled comparison in the preference API's form, A the better one, and where it is from.

    Args:
      about: more of every line, such as `model` and `judge`.
    """
    c, answers = pair.asked.comparison, pair.answers
    prompt: Any = [dict(message) for message in c.prompt_conversation]
    completions: list[Any] = [pair.asked.completion(answer.text) for answer in answers]
    if pair.asked.as_texts and c.texts is not None:
        prompt, completions = c.texts[0], [answer.text for answer in answers]
    line: dict[str, Any] = {"id": pair.asked.id, "prompt_conversation": prompt}
    line |= {f"completion_{side}": said for side, said in zip("ab", completions, strict=True)}
    line["label"] = "A"
    if c.tools:
        line["tools"] = list(c.tools)
    if c.chat_template_kwargs:
        line["chat_template_kwargs"] = dict(c.chat_template_kwargs)
    for side, answer, score, sample in zip("ab", answers, pair.scores, pair.samples, strict=True):
        line |= {
            f"score_{side}": score,
            f"tokens_{side}": len(answer.token_ids),
            f"finish_reason_{side}": answer.finish_reason,
            f"sample_{side}": sample,
        }
    return line | dict(about)

"""What a benchmark asks: which of some good and some bad completions of a prompt are better. No JAX of its own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dpo_jax.data.comparison import Comparison, LabeledComparison, Message
from dpo_jax.data.prompts import prompt_of
from dpo_jax.judging.progress import JudgingTracker
from dpo_jax.preference.models import Answered, PreferenceModel, Scorer
from dpo_jax.preference.verdicts import BLOCK, ask, comparisons_at_once


@dataclass(frozen=True)
class Candidate:
    """A completion: its messages, and its text letter for letter where it is one."""

    messages: Sequence[Message]
    text: str | None = None

    @property
    def said(self) -> str:
        """Its words, for a person."""
        return self.text or "\n\n".join(message["content"] for message in self.messages)


@dataclass(frozen=True)
class Task:
    """A row of a benchmark: every good completion is better than every bad one.

    Attributes:
      where: file and line, for messages.
      id: as the row has it; empty if it has none.
      part: of the benchmark, whose figures are told apart.
      asked: a comparison whose prompt this is.
      good_first: whether the good one stands first in the row; only where both orders are told apart.
      among_good: also how far apart the good ones are is asked.
    """

    where: str
    id: str
    part: str
    asked: Comparison
    good: tuple[Candidate, ...]
    bad: tuple[Candidate, ...]
    good_first: bool = True
    among_good: bool = False

    def comparison(self, one: Candidate, two: Candidate) -> Comparison:
        texts = None
        if self.asked.texts and one.text is not None and two.text is not None:
            texts = (self.asked.texts[0], one.text, two.text)
        return replace(self.asked, completion_a=one.messages, completion_b=two.messages, texts=texts)

    @property
    def pairs(self) -> list[tuple[Candidate, Candidate]]:
        """What is compared: good with bad first, then good with good."""
        pairs = [(good, bad) for good in self.good for bad in self.bad]
        if self.among_good:
            pairs += [(one, two) for i, one in enumerate(self.good) for two in self.good[i + 1 :]]
        return pairs


@dataclass(frozen=True)
class JudgedTask:
    """What was said of a task.

    Attributes:
      margins: `[good, bad]`, above 0 where the good one is better: differences of scores if the judge scores, else
        verdicts; NaN: none.
      orders: `[2, good, bad]`, the verdict with the good one first and with it second, both +1 where it is better.
      spread: the largest margin between two good ones; 0 of one, NaN if one of these has no verdict.
    """

    task: Task
    margins: np.ndarray
    orders: np.ndarray
    spread: float = 0.0


def text_task(where: str, name: str, part: str, prompt: object, good: Sequence[str], bad: Sequence[str]) -> Task:
    """A task of texts.

    Raises:
      UserError: the prompt says nothing.
    """
    asked = prompt_of(prompt, where=where).comparison  # type: ignore[arg-type]  # it refuses what is none
    sides = [tuple(Candidate([{"role": "assistant", "content": text}], text) for text in side) for side in (good, bad)]
    return Task(where, name, part, asked, sides[0], sides[1])


def pair_task(where: str, name: str, part: str, pair: LabeledComparison) -> Task:
    """The task of a labelled pair that is no tie."""
    texts = pair.comparison.texts and pair.comparison.texts[1:]
    a, b = texts or (None, None)
    chosen, rejected = (a, b) if pair.label == "A" else (b, a)
    good, bad = Candidate(pair.chosen, chosen), Candidate(pair.rejected, rejected)
    return Task(where, name, part, pair.comparison, (good,), (bad,), good_first=pair.label == "A")


def judge_tasks(judge: PreferenceModel, tasks: Sequence[Task], *, quiet: bool = False) -> list[JudgedTask]:
    """All tasks, judged block by block."""
    found: list[JudgedTask] = []
    total = sum(len(task.pairs) for task in tasks)
    with JudgingTracker(total, 0, "comparisons", quiet=quiet) as tracker:
        for part in _in_blocks(tasks, comparisons_at_once(judge)):
            # Of a pair the verdict says all.
            listed = isinstance(judge, Scorer) and any(len(task.pairs) > 1 for task in part)
            found += _by_scores(judge, part) if listed else _by_verdicts(judge, part)  # type: ignore[arg-type]
            tracker.judged(sum(len(task.pairs) for task in part))
    return found


def _in_blocks(tasks: Sequence[Task], size: int) -> Iterator[list[Task]]:
    """Tasks that have about `size` comparisons together."""
    part: list[Task] = []
    count = 0
    for task in tasks:
        part.append(task)
        count += len(task.pairs)
        if count >= min(size, BLOCK):
            yield part
            part, count = [], 0
    if part:
        yield part


def _by_scores(judge: Scorer, tasks: Sequence[Task]) -> list[JudgedTask]:
    answered = [
        Answered(task.asked.prompt_conversation, one.messages, task.asked.tools, task.asked.chat_template_kwargs)
        for task in tasks
        for one in (*task.good, *task.bad)
    ]
    scores = np.asarray(judge.scores(answered), np.float64)
    found, start = [], 0
    for task in tasks:
        middle, end = start + len(task.good), start + len(task.good) + len(task.bad)
        good, bad = scores[start:middle], scores[middle:end]
        margins = good[:, None] - bad[None]
        found.append(JudgedTask(task, margins, np.stack([np.tanh(margins / 2)] * 2), float(good.max() - good.min())))
        start = end
    return found


def _by_verdicts(judge: PreferenceModel, tasks: Sequence[Task]) -> list[JudgedTask]:
    asked = ask(judge, [task.comparison(*pair) for task in tasks for pair in task.pairs])
    # Good is shown as A: what is for A counts for it.
    orders = np.stack([-asked.orders[0], asked.orders[1]])
    found, start = [], 0
    for task in tasks:
        shape = (len(task.good), len(task.bad))
        middle, end = start + shape[0] * shape[1], start + len(task.pairs)
        mine, among = orders[:, start:middle].reshape(2, *shape), orders[:, middle:end].mean(0)
        spread = float(np.abs(among).max()) if len(among) else 0.0
        found.append(JudgedTask(task, mine.mean(0), mine, spread))
        start = end
    return found

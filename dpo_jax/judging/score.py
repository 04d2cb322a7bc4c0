"""A score for every answer of a file. No JAX of its own."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_jax.errors import UserError
from dpo_jax.judging.answers import AnsweredPrompt, answers_digest
from dpo_jax.judging.kept import KeptLines, Line
from dpo_jax.judging.progress import JudgingTracker
from dpo_jax.judging.verdicts import ask, blocks, comparisons_at_once
from dpo_jax.preference.models import Answered, PreferenceModel, Scorer
from dpo_jax.preference.statistics import both_orders_verdict


def about_scores(judge: Mapping[str, Any], lines: Sequence[AnsweredPrompt]) -> dict[str, Any]:
    """What a file of scores is begun with; `judge` is its identity."""
    return {"command": "score", "judge": judge, "digest": [answers_digest(lines)], "settings": {}}


def is_scored(lines: Sequence[AnsweredPrompt], at: int, line: Line) -> bool:
    """Whether a line of a file of scores is that of the prompt at this place."""
    answers = line.get("answers")
    if line.get("id") != lines[at].id or not isinstance(answers, list) or len(answers) != len(lines[at].answers):
        return False
    return all(isinstance(one, dict) and "score" in one for one in answers)


def check_scorable(judge: PreferenceModel, lines: Sequence[AnsweredPrompt]) -> None:
    """Refuse single answers for a judge that only compares.

    Raises:
      UserError: with the line.
    """
    alone = next((line for line in lines if len(line.answers) < 2), None)
    if alone is not None and not isinstance(judge, Scorer):
        raise UserError(
            f"{alone.where}: one answer, and the judge {judge.name} compares two; sample with --n=2 or more, or score "
            "with a reward model"
        )


def score_lines(
    judge: PreferenceModel, lines: Sequence[AnsweredPrompt], kept: KeptLines, *, quiet: bool = False
) -> list[list[float]]:
    """The scores of every line's answers, NaN for none; lines that are kept are not judged again.

    A `Scorer` gives its own scores; any other judge's is the mean of its verdicts for the answer against the others of
    its prompt, from -1 (loses against all) to 1.
    """
    scores = [[_number(one["score"]) for one in line["answers"]] for line in kept.done]
    done = len(scores)
    with JudgingTracker(len(lines), done, "prompts", quiet=quiet or done == len(lines)) as tracker:
        for block in blocks(len(lines), done, _block(judge, lines)):
            part = lines[block]
            new = _own_scores(judge, part) if isinstance(judge, Scorer) else _mean_verdicts(judge, part)
            new = [[float(f"{one:.9g}") for one in of_line] for of_line in new]
            kept.write([_scored(line, of_line, judge.name) for line, of_line in zip(part, new, strict=True)])
            scores += new
            tracker.judged(len(part))
    return scores


def _block(judge: PreferenceModel, lines: Sequence[AnsweredPrompt]) -> int:
    """Prompts judged at once: as many as have about a block of comparisons, or of answers to score."""
    most = max(len(line.answers) for line in lines)
    return max(1, comparisons_at_once(judge) // (most if isinstance(judge, Scorer) else most * (most - 1) // 2))


def _own_scores(judge: Scorer, lines: Sequence[AnsweredPrompt]) -> list[list[float]]:
    answered = [
        Answered(line.asked.prompt_conversation, line.completion(one.text), line.asked.tools)
        for line in lines
        for one in line.answers
    ]
    values = iter(np.asarray(judge.scores(answered), np.float64).tolist())
    return [[next(values) for _ in line.answers] for line in lines]


def _mean_verdicts(judge: PreferenceModel, lines: Sequence[AnsweredPrompt]) -> list[list[float]]:
    pairs = [(i, j) for line in lines for j in range(len(line.answers)) for i in range(j)]
    every = [line for line in lines for j in range(len(line.answers)) for _ in range(j)]
    asked = [
        line.against(line.answers[i].text, line.answers[j].text) for line, (i, j) in zip(every, pairs, strict=True)
    ]
    said = iter(zip(pairs, both_orders_verdict(*ask(judge, asked).orders).tolist(), strict=True))
    found = []
    for line in lines:
        n = len(line.answers)
        wins = np.full((n, n), np.nan)
        for _ in range(n * (n - 1) // 2):
            (i, j), verdict = next(said)
            wins[i, j], wins[j, i] = -verdict, verdict
        there = ~np.isnan(wins)
        counts = there.sum(1)
        means = np.where(there, wins, 0.0).sum(1) / np.maximum(counts, 1)
        found.append(np.where(counts > 0, means, np.nan).tolist())
    return found


def _scored(line: AnsweredPrompt, scores: Sequence[float], judge: str) -> Line:
    """The line as it was, with a score in every answer."""
    answers = [
        {**one, "score": None if math.isnan(score) else score}
        for one, score in zip(line.line["answers"], scores, strict=True)
    ]
    return {**line.line, "answers": answers, "judge": judge}


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)

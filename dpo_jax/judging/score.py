"""A score for every answer of a file. No JAX of its own."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.judging.answers import AnsweredPrompt, answers_digest
from dpo_jax.judging.kept import KeptLines, Line
from dpo_jax.judging.progress import JudgingTracker
from dpo_jax.preference.models import PreferenceModel, Scorer
from dpo_jax.preference.ranking import AnswerGroup, groups_at_once, scores_in_groups
from dpo_jax.preference.verdicts import blocks


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
    """The scores of every line's answers, see `scores_in_groups`. Lines that are kept are not judged again."""
    scores = [[_number(one["score"]) for one in line["answers"]] for line in kept.done]
    done, most = len(scores), max(len(line.answers) for line in lines)
    with JudgingTracker(len(lines), done, "prompts", quiet=quiet or done == len(lines)) as tracker:
        for block in blocks(len(lines), done, groups_at_once(judge, most)):
            part = lines[block]
            new = [of_line.tolist() for of_line in scores_in_groups(judge, list(map(_group, part)))]
            kept.write([_scored(line, of_line, judge.name) for line, of_line in zip(part, new, strict=True)])
            scores += new
            tracker.judged(len(part))
    return scores


def _group(line: AnsweredPrompt) -> AnswerGroup:
    texts = [one.text for one in line.answers]
    return AnswerGroup(line.asked, [line.completion(text) for text in texts], texts)


def _scored(line: AnsweredPrompt, scores: Sequence[float], judge: str) -> Line:
    """The line as it was, with a score in every answer."""
    answers = [
        {**one, "score": None if math.isnan(score) else score}
        for one, score in zip(line.line["answers"], scores, strict=True)
    ]
    return {**line.line, "answers": answers, "judge": judge}


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)

"""Judging from Python: two files of answers compared, a judge measured, answers scored. No JAX of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.judging.answers import AnsweredPrompt, answers_among, length_unit, match_answers, read_answers
from dpo_jax.judging.benchmarks.table import BENCHMARKS
from dpo_jax.judging.compare import Compared, compared, judge_matches
from dpo_jax.judging.kept import KeptLines
from dpo_jax.judging.labelled import read_labelled
from dpo_jax.judging.measure import Measured, measured
from dpo_jax.judging.score import check_scorable, score_lines
from dpo_jax.judging.tasks import judge_tasks
from dpo_jax.preference.models import PreferenceModel

Answers = str | Path | Sequence[Mapping[str, Any]]  # a file, or lines of one


def compare(
    a: Answers, b: Answers, judge: PreferenceModel | str, *, lengths: str = "auto", limit: int = 0, quiet: bool = True
) -> Compared:
    """The win rate of the answers `a` over `b`.

    Args:
      a, b: files as `python -m dpo_jax.sample` writes them, or their lines as mappings.
      judge: a preference model, or the name of one.
      lengths: tokens, characters, or auto: tokens where every answer has them.
      limit: the first so many prompts; 0: all.
      quiet: without progress on standard error.

    Raises:
      UserError: the answers, or the judge, are refused, in one line.
    """
    matched = match_answers(_lines(a, "a"), _lines(b, "b")).first(limit)
    unit = length_unit((line for match in matched.matches for line in (match.a, match.b)), lengths)
    model = _judge(judge)
    verdicts = judge_matches(model, matched.matches, unit, KeptLines(), quiet=quiet)
    return compared(matched, verdicts, judge=model.name, names=(_name(a, "a"), _name(b, "b")), unit=unit)


def benchmark(
    data: str, judge: PreferenceModel | str, *, form: str = "auto", limit: int = 0, quiet: bool = True, **source: str
) -> Measured:
    """How well a judge agrees with labels.

    Args:
      data: a file, or the name of a dataset, as training's `dataset`.
      judge: a preference model, or the name of one.
      form: the benchmark; auto tells it by the columns.
      limit: the first so many rows, or pairs; 0: all.
      quiet: without progress on standard error.
      **source: path, split, columns, revision, see `dpo_jax.judging.labelled.read_labelled`.

    Raises:
      UserError: the data, or the judge, are refused, in one line.
    """
    read = read_labelled(data, form=form, limit=limit, **source)
    model = _judge(judge)
    judged = judge_tasks(model, read.tasks, quiet=quiet)
    return measured(BENCHMARKS[read.form], judged, judge=model.name, data=data, left_out=read.left_out)


def score(answers: Answers, judge: PreferenceModel | str, *, quiet: bool = True) -> list[list[float]]:
    """The score of every answer to every prompt, in order; NaN for none.

    A reward model's own; any other judge's mean verdict for the answer against the others of its prompt.

    Raises:
      UserError: the answers, or the judge, are refused; a prompt has one answer, and the judge only compares.
    """
    lines, model = _lines(answers, "answers"), _judge(judge)
    check_scorable(model, lines)
    return score_lines(model, lines, KeptLines(), quiet=quiet)


def _lines(answers: Answers, name: str) -> list[AnsweredPrompt]:
    if isinstance(answers, str | Path):
        return read_answers(answers)
    return answers_among(((f"{name}:{number}", line) for number, line in enumerate(answers, 1)), name)


def _name(answers: Answers, name: str) -> str:
    return str(answers) if isinstance(answers, str | Path) else name


def _judge(judge: PreferenceModel | str) -> PreferenceModel:
    if not isinstance(judge, str):
        return judge
    from dpo_jax.preference.load import load_preference_model  # which may wait for JAX

    return load_preference_model(judge)

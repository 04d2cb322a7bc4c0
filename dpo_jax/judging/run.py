"""What `python -m dpo_jax.judge` does, for each of its commands. No JAX of its own.

What is quick to refuse is refused before the judge is loaded.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dpo_jax.answering.output import tell
from dpo_jax.disk import write_json
from dpo_jax.errors import UserError
from dpo_jax.judging.answers import AnsweredPrompt, length_unit, match_answers, read_answers
from dpo_jax.judging.benchmarks.table import BENCHMARKS
from dpo_jax.judging.compare import about_comparison, compared, figures, is_verdict_of, judge_matches
from dpo_jax.judging.console import print_compared, print_measured, print_scored, wide_console
from dpo_jax.judging.flags import JudgeRequest
from dpo_jax.judging.identity import judge_identity
from dpo_jax.judging.kept import kept_lines
from dpo_jax.judging.labelled import read_labelled
from dpo_jax.judging.measure import measured
from dpo_jax.judging.score import about_scores, check_scorable, is_scored, score_lines
from dpo_jax.judging.tasks import judge_tasks
from dpo_jax.preference.models import PreferenceModel, told_by


def compare_files(r: JudgeRequest) -> None:
    """`judge compare`.

    Raises:
      UserError: bad input, in one line; as for the other commands.
    """
    first, second = r.files
    a, b = read_answers(first), read_answers(second)
    matched = match_answers(a, b).first(r.limit)
    unit = length_unit((line for match in matched.matches for line in (match.a, match.b)), r.lengths)
    judge = load_judge(r)
    for line in matched.said(first, second):
        tell(line)
    about = about_comparison(judge_identity(r.judge, judge, r.options), matched, unit) if r.out else {}
    belongs = partial(is_verdict_of, matched.matches)
    with kept_lines(r.out, about, len(matched.matches), belongs, overwrite=r.overwrite) as kept:
        for line in kept.said:
            tell(line)
        verdicts = judge_matches(judge, matched.matches, unit, kept)
    _tell_of(judge)
    result = compared(matched, verdicts, judge=judge.name, names=(first, second), unit=unit)
    print_compared(result, wide_console())
    _write_figures(r.json, result)
    if r.html:
        from dpo_jax.judging.page import write_comparison_page

        tell(f"page {write_comparison_page(Path(r.html), result, matched, verdicts, _models(a, b), r.shown)}")


def benchmark_judge(r: JudgeRequest) -> None:
    """`judge benchmark`."""
    (name,) = r.files
    read = read_labelled(
        name,
        r.dataset_path,
        r.split,
        form=r.format,
        columns=r.columns,
        revision=r.dataset_revision,
        limit=r.limit,
    )
    for reason, n in read.left_out.items():
        where = f", first {read.first[reason]}" if reason in read.first else ""
        tell(f"{n:,} left out: {reason.replace('_', ' ')}{where}")
    judge = load_judge(r)
    judged = judge_tasks(judge, read.tasks)
    _tell_of(judge)
    result = measured(BENCHMARKS[read.form], judged, judge=judge.name, data=name, left_out=read.left_out)
    print_measured(result, wide_console())
    _write_figures(r.json, result)
    if r.html:
        from dpo_jax.judging.page import write_benchmark_page

        tell(f"page {write_benchmark_page(Path(r.html), result, judged, r.shown)}")


def score_answers(r: JudgeRequest) -> None:
    """`judge score`."""
    lines = read_answers(r.files[0], r.limit)
    judge = load_judge(r)
    check_scorable(judge, lines)
    about = about_scores(judge_identity(r.judge, judge, r.options), lines)
    with kept_lines(r.out, about, len(lines), partial(is_scored, lines), overwrite=r.overwrite) as kept:
        for line in kept.said:
            tell(line)
        scores = score_lines(judge, lines, kept)
    _tell_of(judge)
    print_scored(scores, wide_console())


def load_judge(r: JudgeRequest) -> PreferenceModel:
    """The judge that was asked for."""
    from dpo_jax.preference.load import load_preference_model  # which may wait for JAX

    return load_preference_model(r.judge, **r.options)


def _tell_of(judge: PreferenceModel) -> None:
    for line in told_by(judge):
        tell(line)


def _write_figures(place: str, result: Any) -> None:
    if not place:
        return
    try:
        write_json(Path(place), figures(result))
    except OSError as error:
        raise UserError(f"--json={place}: cannot be written ({error.strerror}); choose another") from error


def _models(a: Sequence[AnsweredPrompt], b: Sequence[AnsweredPrompt]) -> tuple[str, str]:
    """The models that answered, as the files call them."""
    first, second = (str(lines[0].line.get("model") or "") for lines in (a, b))
    return first, second


RUNS = {"compare": compare_files, "benchmark": benchmark_judge, "score": score_answers}

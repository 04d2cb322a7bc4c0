"""Forms with several answers and their ranks or scores, and forms with one rated answer a row."""

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_jax.data.comparison import RatedAnswer, Skip
from dpo_jax.data.forms.chosen import Outcome, Parsed, Row, pair_of
from dpo_jax.data.forms.fields import is_harmless, unread
from dpo_jax.data.forms.messages import conversation, decoded
from dpo_jax.data.forms.transcripts import transcript_prompt

LISTS = ("answers", "completions", "responses", "generations", "candidates", "outputs")
_ANSWER = ("answer", "completion", "response", "text", "content", "generation", "output")
_LOWER, _HIGHER = ("rank", "ranking"), ("score", "rating", "overall_score", "pm_score", "reward")
SCORES = ("ranks", "ratings", "scores", "rewards", "rank", "rating", "score", "rank_list")
ONE_ANSWER = ("completion", "response", "output", "answer")
RATINGS = ("label", "kto_tag", "is_desirable", "desirable", "thumbs_up")
_YES, _NO = ("true", "1", "desirable", "good"), ("false", "0", "undesirable", "bad")


def best_against_others(prompt: Any, answers: Any, scores: Any = None, lower: bool = False) -> Parsed:
    """The best answer against every other: n answers give n - 1 pairs; one as good as the best is a tie.

    Args:
      answers: mappings with an answer and its rank (the lowest is best) or score (the highest); or bare answers.
      scores: of bare answers, in their order; `lower`: the lowest is best.

    >>> ranked = [{"answer": "so", "rank": 2.0}, {"answer": "best", "rank": 1.0}, {"answer": "so-so", "rank": 3.0}]
    >>> [(p.chosen[0]["content"], p.rejected[0]["content"]) for p in best_against_others("Hi", ranked)]
    [('best', 'so'), ('best', 'so-so')]
    """
    answers, given = decoded(answers, list), decoded(scores, list)
    if not isinstance(answers, list) or not answers:
        return Skip("not_text", f"answers are a {type(answers).__name__}, needed is a list")
    if scores is None:
        found = [_answer_and_score(one) for one in answers]
    elif not isinstance(given, list) or len(given) != len(answers):
        return Skip("bad_score", f"{len(answers)} answers need as many scores, found {scores!r:.40}")
    else:
        found = [(one, _score(score), lower) for one, score in zip(answers, given, strict=True)]
    if why := next(filter(None, map(_unread_beside, answers if scores is None else ())), None):
        return why
    if any(one is None for one, _, _ in found):
        return Skip("not_text", f"an answer is {answers[0]!r:.60}, needed is a text and its rank or score")
    rated = [(one, -score if low else score) for one, score, low in found if score is not None]
    if len(rated) < 2:
        return Skip("bad_score", f"{len(rated)} of {len(answers)} answers have a rank or score; a pair needs two")
    best = max(range(len(rated)), key=lambda at: rated[at][1])
    pairs: list[Outcome] = []
    for at, (one, score) in enumerate(rated):
        if at != best:
            pairs.append(pair_of(prompt, rated[best][0], one) if score < rated[best][1] else Skip("tie"))
    return pairs


def rated_answer(prompt: Any, answer: Any, rating: Any) -> RatedAnswer | Skip:
    """One answer that is good or not; without `answer` it is the last turn of the prompt.

    >>> rated_answer("Hi", "What?", False).good
    False
    """
    word = str(int(rating) if isinstance(rating, float) and rating.is_integer() else rating).strip().lower()
    if word not in (*_YES, *_NO):
        return Skip("bad_label", f"the rating of an answer is {rating!r:.40}, needed is true or false")
    inside = transcript_prompt(prompt)
    turns = conversation(prompt) if inside is None else inside
    if isinstance(turns, Skip):
        return turns
    said_as = answer.strip() if inside is not None and isinstance(answer, str) else answer
    said = turns[-1:] if answer is None else conversation(said_as, role="assistant")
    if isinstance(said, Skip):
        return said
    if answer is None:
        turns = turns[:-1]
    texts = (prompt, answer) if isinstance(prompt, str) and isinstance(answer, str) else None
    return RatedAnswer(turns, said, word in _YES, texts=texts)


def summaries(row: Row) -> Outcome:
    """OpenAI's summarize_from_feedback: the post (or article) is the prompt, `choice` numbers the better summary."""
    info, both, choice = row["info"], decoded(row["summaries"], list), row["choice"]
    info = decoded(info, dict)
    post = (
        next((info[key] for key in ("post", "article") if info.get(key)), None) if isinstance(info, Mapping) else None
    )
    texts = [one.get("text") if isinstance(one, Mapping) else one for one in both] if isinstance(both, list) else []
    if not isinstance(post, str) or len(texts) != 2:
        return Skip("not_text", "needed are info.post (or info.article) and two summaries")
    if str(choice) not in ("0", "1", "0.0", "1.0"):
        return Skip("bad_label", f"choice is {choice!r:.40}, needed is 0 or 1")
    better = int(float(choice))
    return pair_of(post, texts[better], texts[1 - better])


def lists_of(columns: Sequence[str]) -> str:
    """The column that holds several answers; empty if there is none."""
    return next((name for name in LISTS if name in columns), "")


def _answer_and_score(one: Any) -> tuple[Any, float | None, bool]:
    """An answer, its score or rank, and whether the lowest is best."""
    if not isinstance(one, Mapping):
        return None, None, False
    answer = next((one[key] for key in _ANSWER if one.get(key) is not None), None)
    for names, lower in ((_LOWER, True), (_HIGHER, False)):
        for name in names:
            if (score := _score(one.get(name))) is not None:
                return answer, score, lower
    return answer, None, False


def _unread_beside(one: Any) -> Skip | None:
    """Why an answer cannot be taken that has more than texts and ranks; None if it can."""
    read = (*_ANSWER, *_LOWER, *_HIGHER)
    if not isinstance(one, Mapping):
        return None
    said = next((str(one[key]) for key in _ANSWER if one.get(key) is not None), "")
    others = (name for name in one if name not in read and not is_harmless(str(name)))
    return next(filter(None, (unread(str(name), one[name], said, inside="an answer") for name in others)), None)


def _score(value: Any) -> float | None:
    """A score as a number; None where there is none."""
    try:
        score = None if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if score is None or score != score else score

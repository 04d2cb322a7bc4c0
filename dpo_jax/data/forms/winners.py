"""Forms with two answers and a column that names the better one: every A/B file, in one reading.

The two answers are columns of one stem with the endings a and b, A and B, 0 and 1, or 1 and 2. The winner names an
ending, in one of many spellings; where a file means something else by its numbers, `SCALES` and `_FIRST_WINS` say so.
"""

import re
from collections.abc import Sequence
from typing import Any

from dpo_jax.data.comparison import Label, LabeledComparison, Skip
from dpo_jax.data.forms.chosen import Outcome, Row, pair_of
from dpo_jax.data.forms.messages import decoded

STEMS = (
    "conversation completion response answer output human_ref reply summary generation orig_response text message"
).split()
ENDINGS = (("a", "b"), ("A", "B"), ("0", "1"), ("1", "2"))
WINNERS = (
    "overall_preference preference_strength label labels winner preference better_response_id choice better "
    "better_response preferred preferred_response orig_preference verdict chosen selected gold_label human_preference"
).split()
# Signed scales: below 0 the first answer is better, above 0 the second.
SCALES = {"overall_preference": 3, "preference_strength": 3}
# SHP's `labels` is 1 where the first answer, human_ref_A, is better.
_FIRST_WINS = {"human_ref": ("1", "0")}
_TIES = ("tie", "equal", "same", "draw", "both", "neither", "bothbad", "both_bad", "both bad")
_MARKUP = "<extra_id_1>"  # between the turns of HelpSteer2's prompts
_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n?")


def answer_columns(columns: Sequence[str]) -> tuple[str, str, str, tuple[str, str]] | None:
    """The columns of two answers, their stem and endings; None if there are none, or more than two.

    >>> answer_columns(["question", "response_A", "response_B"])
    ('response_A', 'response_B', 'response', ('A', 'B'))
    >>> answer_columns(["response_0", "response_1", "response_2"])
    """
    there = set(columns)
    for stem in STEMS:
        for join in ("_", ""):
            numbers = [end for end in "0123" if f"{stem}{join}{end}" in there]
            for ends in ENDINGS:
                first, second = (f"{stem}{join}{end}" for end in ends)
                if first in there and second in there and len(numbers) < 3:
                    return first, second, stem, ends
    return None


def winner_columns(columns: Sequence[str], ends: tuple[str, str], stem: str) -> tuple[str, ...]:
    """The column that names the winner, or the columns of its scores, or of marks for A, B and a tie; empty: none."""
    there = set(columns)
    for name in WINNERS:
        if name in there and not (name == "chosen" and "rejected" in there):
            return (name,)
    for pattern in ("score_{}", "rating_{}", stem + "_{}_score", stem + "_{}_rating", stem + "_{}_reward"):
        both = tuple(pattern.format(end) for end in ends)
        if there.issuperset(both):
            return both
    marks = tuple(f"winner_model_{end}" for end in ends)
    return (*marks, *({"winner_tie"} & there)) if there.issuperset(marks) else ()


def labeled_pair(row: Row, prompt: Any, found: tuple[str, str, str, tuple[str, str]], winner: Sequence[str]) -> Outcome:
    """A comparison of the two answers, with its label.

    >>> row = {"question": "Hi", "response_A": "Hello!", "response_B": "What?", "label": "B>A"}
    >>> found = answer_columns(list(row))
    >>> labeled_pair(row, row["question"], found, ["label"]).label
    'B'
    """
    first, second, stem, ends = found
    label = _marked(row, winner) if len(winner) > 1 else _label(row, winner[0], (first, second), stem, ends)
    if isinstance(label, Skip):
        return label
    one, two = row[first], row[second]
    if (turns := _turn_lists(prompt, one, two)) is not None:
        prompt, one, two = None, *turns
    if isinstance(prompt, str) and _MARKUP in prompt:
        prompt = _marked_up(prompt)
    pair = pair_of(prompt, one, two)
    return pair if isinstance(pair, Skip) else LabeledComparison(pair.comparison, label)


def signed(value: Any, most: int) -> Label | None:
    """The label of a signed scale; compared as a number: as text "-2" > "0", and the label flips."""
    number = _integer(value)
    if number is None or abs(number) > most:
        return None
    return "Tie" if number == 0 else "A" if number < 0 else "B"


def _label(row: Row, column: str, columns: tuple[str, str], stem: str, ends: tuple[str, str]) -> Label | Skip:
    value = row[column]
    if column in SCALES:
        if label := signed(value, SCALES[column]):
            return label
        most = SCALES[column]
        return Skip("bad_preference", f"{column} is {value!r:.40}, needed is an integer from -{most} to {most}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, float) and ends == ("1", "2") and 1 <= value <= 2:  # AlpacaEval's mean of several judges
        return "Tie" if value == 1.5 else "A" if value < 1.5 else "B"
    text = str(value).strip().strip("[]").casefold() if isinstance(value, str | int) and value is not True else ""
    text = re.sub(r"^(\d)\.0$", r"\1", text)  # a column of CSV with gaps
    names = _FIRST_WINS.get(stem, tuple(end.casefold() for end in ends))
    labels: tuple[Label, Label] = ("A", "B")
    for label, mine, other, whole in zip(labels, names, names[::-1], columns, strict=True):
        says = {mine, f"model_{mine}", f"assistant_{mine}", f"assistant {mine}", f"{stem}_{mine}", whole.casefold()}
        models = [str(row.get(f"model_{end}", "")).casefold() for end in ends]
        own = {models[label == "B"]} - {models[label == "A"], ""}
        if text in says | own or re.fullmatch(rf"{mine}\s*>+\s*{other}", text):
            return label
    if text.startswith("tie") or text in _TIES or re.fullmatch(r"(\w)\s*=+\s*(\w)", text):
        return "Tie"
    return Skip("bad_label", f"{column} is {value!r:.40}, needed is {names[0]} or {names[1]}, or tie")


def _marked(row: Row, columns: Sequence[str]) -> Label | Skip:
    """The label of scores (the higher wins), or of marks (1 at the winner) with one for a tie, perhaps."""
    numbers = [_number(row[column]) for column in columns]
    if any(number is None for number in numbers):
        return Skip("bad_label", f"{', '.join(columns)} are {[row[c] for c in columns]!r:.60}, needed are numbers")
    first, second, *tie = (float(number) for number in numbers if number is not None)
    return "Tie" if first == second or any(tie) else "A" if first > second else "B"


def _turn_lists(prompt: Any, one: Any, two: Any) -> tuple[Any, Any] | None:
    """Two conversations, where prompts and answers are lists of texts turn by turn, perhaps as JSON."""
    read = [decoded(x, list) if isinstance(x, str) and x.lstrip().startswith("[") else x for x in (prompt, one, two)]
    if not all(isinstance(x, list) and x and all(isinstance(text, str) for text in x) for x in read):
        return None
    asked, *answered = read
    if any(len(answers) != len(asked) for answers in answered):
        return None
    first, second = (
        [
            {"role": role, "content": text}
            for turn in zip(asked, answers, strict=True)
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        for answers in answered
    )
    return first, second


def _marked_up(prompt: str) -> Any:
    """HelpSteer2's prompt of several turns, `<extra_id_1>Assistant` or `<extra_id_1>User` on a line before each."""
    first, *rest = _TURN.split(prompt)
    turns = [("User", first), *zip(rest[::2], rest[1::2], strict=True)]
    return [{"role": who.lower(), "content": text} for who, text in turns if text]


def _integer(value: Any) -> int | None:
    """The integer that JSON, Parquet (a column with nulls is float) or CSV's text means; None for anything else."""
    if isinstance(value, str):
        whole = re.fullmatch(r"[+-]?[0-9](?:\.0)?", value.strip()) is not None
        return int(float(value)) if whole else None
    whole = value.is_integer() if isinstance(value, float) else type(value) is int
    return int(value) if whole else None


def _number(value: Any) -> float | None:
    """A number, also as text; None for anything else, and for what is no number."""
    try:
        number = float(value) if isinstance(value, str | int | float) else None
    except (ValueError, OverflowError):
        return None
    return None if number is None or number != number else number

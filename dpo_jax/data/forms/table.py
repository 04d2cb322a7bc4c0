"""Which form a row has, told by its columns, and the row in that form.

`resolve` makes the forms that some columns may have, best first. `read_form` reads a row in one of them, adds what
every form may have beside it (a system turn, a history, tools, arguments of the template), accounts for each of the
other columns, and checks the pairs.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, cast

from dpo_jax.data.comparison import LabeledComparison, RatedAnswer, Skip, checked
from dpo_jax.data.forms.beside import with_beside
from dpo_jax.data.forms.chosen import Row
from dpo_jax.data.forms.families import ANSWERS, MAKERS, PROMPTS, Form, Maker
from dpo_jax.data.forms.fields import CARRIED, is_harmless, unaccounted
from dpo_jax.data.forms.messages import without_loss
from dpo_jax.data.forms.ranked import ONE_ANSWER
from dpo_jax.data.raw import ColumnarRow

Outcome = LabeledComparison | RatedAnswer | Skip


def resolve(columns: Sequence[str], makers: Sequence[Maker] = MAKERS) -> list[Form]:
    """The forms that a row of these columns may have, best first; which of them it has, its nulls decide.

    `makers` are functions from a set of columns to the forms that they may have.
    """
    there = set(columns)
    found = [form for make in makers for form in make(there)]
    done = []
    for form in found:
        beside = tuple(name for name in CARRIED if name in there and name not in form.reads)
        others = [name for name in columns if name not in form.reads and name not in beside]
        harmless = tuple(name for name in others if is_harmless(str(name)))
        rest = tuple(name for name in others if name not in harmless)
        needs = tuple(name for name in form.reads if name not in form.may_lack)
        done.append(dataclasses.replace(form, needs=needs, beside=beside, harmless=harmless, suspicious=rest))
    return done


def read_form(form: Form, row: Row) -> tuple[Outcome, ...]:
    """The pairs of a row in this form, or why there are none."""
    if missing := form.missing(row):
        filled = ", ".join(str(key) for key, value in row.items() if value is not None) or "none"
        return (Skip("missing_column", f"no value in {missing}; found {filled}"),)
    if isinstance(row, ColumnarRow):
        row = {
            name: _without_padding(value) if isinstance(value, list | dict) else value for name, value in row.items()
        }
    parsed = form.parse(row)
    if not (form.beside or form.suspicious or isinstance(parsed, list)):  # most rows have nothing beside
        return (_checked(parsed),)
    outcomes = parsed if isinstance(parsed, list) else [parsed]
    if form.beside:
        outcomes = [with_beside(row, form.beside, one) for one in outcomes]
    if form.suspicious and (why := unaccounted(row, form.suspicious, outcomes)):
        return (why,)
    return tuple(_checked(one) for one in outcomes)


def unknown_columns(columns: Sequence[str]) -> Skip:
    """Why rows of these columns cannot be read, what comes nearest, and the way out."""
    found = ", ".join(str(name)[:40] for name in list(columns)[:30]) or "none"
    known = {*PROMPTS, *(name for pair in ANSWERS for name in pair), *ONE_ANSWER, *CARRIED}
    near = {str(name): difflib.get_close_matches(str(name).lower(), known, 1, 0.8) for name in columns}
    hints = "".join(f"; {name} is like {match[0]}" for name, match in near.items() if match and name not in known)
    prompt = next((name for name in PROMPTS if name in columns), "")
    rename = ",".join(f"{name}:NAME" for name in (*(() if prompt else ("prompt",)), "chosen", "rejected"))
    prompt = prompt or "prompt"
    return Skip(
        "unknown_columns",
        f"found {found}; accepted are {prompt}+chosen+rejected, {prompt}+response_a+response_b+winner, {prompt}+"
        f"answers with ranks, {prompt}+completion+label, and others (docs/data.md){hints}; --config.columns={rename} "
        "says which columns these are, --config.dataset=my_module:my_function reads any row",
    )


def _checked(one: Any) -> Outcome:
    if isinstance(one, LabeledComparison):
        for answer in (one.comparison.completion_a, one.comparison.completion_b):
            if mark := without_loss(answer):
                return Skip(
                    "unread_field", f"a turn of an answer has {mark}=0, and every turn of an answer has loss here"
                )
        return checked(one)
    return cast(Outcome, one)


def _without_padding(value: Any) -> Any:
    """A value of a columnar file without the nulls that its structs have for each other's keys."""
    if isinstance(value, dict):
        return {key: _without_padding(one) for key, one in value.items() if one is not None}
    return [_without_padding(one) for one in value] if isinstance(value, list) else value

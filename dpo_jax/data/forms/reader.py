"""Readers of rows: from a raw row to the form that it has and the pairs that it gives."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpo_jax.data.comparison import LabeledComparison, Skip
from dpo_jax.data.forms.chosen import Row
from dpo_jax.data.forms.families import MAKERS, Form, Maker
from dpo_jax.data.forms.table import Outcome, read_form, resolve, unknown_columns

Read = tuple[Form | None, tuple[Outcome, ...]]
Reader = Callable[[Row], Read]
_KINDS = 4096  # sets of columns whose forms are kept at hand; files have one or a few


def make_reader(makers: Sequence[Maker] = MAKERS) -> Reader:
    """A reader of rows of every form that these `makers` know; by the columns, forms are found once."""
    known: dict[tuple[str, ...], list[Form]] = {}

    def read(row: Row) -> Read:
        columns = tuple(row)
        forms = known.get(columns)
        if forms is None:
            if len(known) >= _KINDS:
                known.clear()
            forms = known[columns] = resolve(columns, makers)
        if not forms:
            return None, (unknown_columns(columns) if makers is MAKERS else _others_columns(columns),)
        form = forms[0]
        if len(forms) > 1 and form.missing(row):
            form = next((one for one in forms if not one.missing(row)), form)
        return form, read_form(form, row)

    return read


def _others_columns(columns: Sequence[str]) -> Skip:
    """Rows of a named dataset that are none of its own."""
    found = ", ".join(str(name)[:40] for name in columns) or "none"
    words = "not the columns of the dataset that is named; files of your own are read by --config.dataset=PATH"
    return Skip("unknown_columns", f"found {found}; {words}")


read_own = make_reader()


def parse_own(row: Mapping[str, Any]) -> Outcome:
    """A row of any accepted form: its first pair, or why it has none.

    >>> parse_own({"question": "Hi", "answer": "Hello!"}).reason
    'unknown_columns'
    """
    outcomes = read_own(row)[1]
    return next((one for one in outcomes if not isinstance(one, Skip)), outcomes[0])


def pairs_in(row: Mapping[str, Any]) -> list[LabeledComparison]:
    """All pairs of a row of any accepted form."""
    return [one for one in read_own(row)[1] if isinstance(one, LabeledComparison)]

"""`columns=`: what it renames and leaves out, what it refuses."""

import pytest

from dpo_jax.data.forms.families import MAKERS
from dpo_jax.data.forms.reader import parse_own
from dpo_jax.data.forms.rename import KNOWN, NO_CHANGES, Columns, parse_columns
from dpo_jax.data.raw import ColumnarRow
from dpo_jax.errors import UserError

ROW = {"ask": "Hi", "best": "yes", "worst": "no", "persona": "a pirate", "prompt": "an older prompt"}


def test_columns_are_renamed_and_left_out():
    columns = parse_columns("prompt:ask, chosen:best,rejected:worst,persona:,")
    assert columns.apply(ROW) == {"prompt": "Hi", "chosen": "yes", "rejected": "no"}
    assert parse_own(columns.apply(ROW)).chosen[0]["content"] == "yes"
    assert isinstance(columns.apply(ColumnarRow(ROW)), ColumnarRow)
    assert columns.absent(["ask", "best"]) == ["persona", "worst"]
    assert str(columns) == "chosen=best,prompt=ask,rejected=worst,persona="
    assert not NO_CHANGES
    assert str(parse_columns("")) == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt", "is not NAME:COLUMN"),
        ("prompt:a:b", "is not NAME:COLUMN"),
        (":a", "is not NAME:COLUMN"),
        ("promt:a", "no form reads a column promt"),
        ("prompt:a,prompt:b", "prompt stands there twice"),
        ("prompt:a,chosen:a", "a stands there twice"),
        ("prompt:a,a:", "a is read and left out"),
    ],
)
def test_what_cannot_be_meant_is_one_line(text, words):
    with pytest.raises(UserError, match=words) as caught:
        parse_columns(text)
    assert "\n" not in str(caught.value)


def test_roles_and_keys_of_messages_are_spelt_as_a_file_has_them():
    columns = Columns(turns={"who": "role", "says": "content", "role skipper": "assistant"})
    row = {
        "conversations": [{"who": "human", "says": "Hi"}],
        "chosen": {"who": "skipper", "says": "yes"},
        "rejected": "no",
    }
    assert parse_own(columns.apply(row)).chosen == ({"role": "assistant", "content": "yes"},)


def test_every_column_of_a_form_has_a_name_that_can_be_given():
    read = {name for make in MAKERS for form in make(set(KNOWN) | {"info", "summaries"}) for name in form.reads}
    assert read - KNOWN <= {"info", "summaries"}

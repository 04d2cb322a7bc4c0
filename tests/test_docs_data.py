"""docs/data.md: every row in it is accepted as it says, every form is shown, the code in it runs."""

import doctest
import json
import re
from pathlib import Path

import pytest

from dpo_jax.config.command_line import parse
from dpo_jax.data.comparison import DELIBERATE, RatedAnswer
from dpo_jax.data.datasets import DATASETS
from dpo_jax.data.forms.reader import parse_own, read_own

PAGE = Path("docs/data.md").read_text()
ROWS = [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```", PAGE, re.M | re.S)]
CODE = "".join(path.read_text() for path in Path("dpo_jax/data").rglob("*.py"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "+".join(row))
def test_each_row_is_accepted_and_means_the_same_pair(row):
    pair = parse_own(row)
    if isinstance(pair, RatedAnswer):
        other = parse_own({**row, "completion": "No.", "label": not row["label"]})
        pair = pair.against(other)
    assert [message["content"] for message in pair.chosen] == ["Red."]
    assert [message["content"] for message in pair.rejected] == ["No."]
    asked = [m["content"] for m in pair.comparison.prompt_conversation if m["role"] == "user"]
    assert asked[-1] == "Name a colour."


@pytest.mark.parametrize("name", re.findall(r'Form\(\s*"([^"]+)"', Path("dpo_jax/data/forms/families.py").read_text()))
def test_every_accepted_form_is_shown(name):
    # "transcripts" is the named datasets' strict reading of what the other forms read, too.
    assert name == "transcripts" or name in {read_own(row)[0].name for row in ROWS}


def test_the_code_runs():
    (test,) = [doctest.DocTestParser().get_doctest(PAGE, {}, "docs/data.md", "docs/data.md", 0)]
    assert len(test.examples) >= 6
    result = doctest.DocTestRunner().run(test)
    assert result.failed == 0


def test_every_dataset_and_every_reason_is_there():
    for name, spec in DATASETS.items():
        (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` ")]
        assert spec.hub in line
        if spec.hub:
            assert f"| {spec.licence} |" in line
        for subset in spec.subsets:
            assert f"`{name}/{subset}`" in PAGE
    reasons = (
        set(re.findall(r'(?:Skip|BadLine)\(\s*"([a-z_]+)"', CODE)) | {"empty_chosen", "empty_rejected"} | DELIBERATE
    )
    assert {reason for reason in reasons if f"`{reason}`" not in PAGE} == set()


@pytest.mark.parametrize("command", re.findall(r"^python -m dpo_jax\.(?:data \w+|train) (.*)$", PAGE, re.M))
def test_the_commands_are_valid(command):
    flags = [word for word in command.split() if word.startswith("--config")]
    parse(["command", *flags, "--workdir=run"])

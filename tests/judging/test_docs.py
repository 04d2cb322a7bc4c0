"""docs/judging.md: its flags are the table's, its commands parse, and every figure is on it."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from dpo_jax.judging.benchmarks.table import BENCHMARKS
from dpo_jax.judging.compare import Compared
from dpo_jax.judging.flags import FLAGS, parse_judging

PAGE = Path("docs/judging.md").read_text()
COMMANDS = re.findall(r"^python -m (dpo_jax\.judge .*)$", PAGE, re.M)


def test_every_flag_is_on_the_page_as_the_table_says():
    rows = re.findall(r"^\| `--(\w+)` \| ([^|]*) \| ([^|]*) \|", PAGE, re.M)
    shown = lambda value: "" if value == "" or value is False else f"`{value}`"
    expected = [(name, shown(flag.default), ", ".join(commands)) for name, (flag, commands) in FLAGS.items()]
    assert [(name, default.strip(), commands) for name, default, commands in rows] == expected


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_parse(command):
    assert parse_judging(shlex.split(command)).judge


def test_there_are_commands_of_each_kind():
    assert {command.split()[1] for command in COMMANDS} == {"compare", "benchmark", "score"}


def test_every_figure_and_benchmark_is_on_the_page():
    names = {field.name for field in dataclasses.fields(Compared)} - {"judge", "a", "b"}
    assert [name for name in sorted(names) if f"`{name}`" not in PAGE] == []
    assert [name for name in BENCHMARKS if name != "pairs" and f"| `{name}` |" not in PAGE] == []

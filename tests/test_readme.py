"""What the README tells people to run exists, and its links lead somewhere."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from dpo_jax.config.command_line import parse

README = Path("README.md").read_text()
COMMANDS = [
    line.replace("\\\n", " ")
    for block in re.findall(r"^```\n(.*?)^```", README, re.M | re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
PAGES = [Path("README.md"), Path("CONTRIBUTING.md"), *sorted(Path("docs").glob("*.md"))]


def test_two_lines_do_all_the_setting_up():
    first, second = (c for c in COMMANDS if "pip install" in c)
    assert "--config=configs/hhh.py:tiny" in first
    assert "pytest" in second


@pytest.mark.parametrize("command", [c for c in COMMANDS if "dpo_jax.train" in c])
def test_training_commands_are_valid(command):
    words = shlex.split(command.split("&&")[-1])
    parse(words[words.index("dpo_jax.train") :])  # which checks the config, too


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"^(SPEED|LEARNING)$|\(TIME", README, re.M)


def test_ci_takes_the_test_command_from_the_readme():
    script = Path(".ci/run").read_text()
    sed = re.search(r"command=\$\((.*)\)$", script, re.M)
    found = subprocess.run(["bash", "-c", sed[1]], capture_output=True, text=True, check=True).stdout.strip()
    assert found == next(c for c in COMMANDS if "pytest" in c)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for path in re.findall(r"`((?:dpo_jax|configs|tests|benchmarks|docs)/[\w/.]+\.(?:py|md))", text):
        assert Path(path).exists() or path == "configs/NAME.py", path

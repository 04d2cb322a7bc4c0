"""The pages of docs/: what they tell people to run parses, links and anchors lead somewhere, the lists are complete."""

import re
import shlex
from pathlib import Path

import pytest

from dpo_jax.answering.flags import FLAGS, parse_request
from dpo_jax.collecting.summary import WORDS
from dpo_jax.config.command_line import TRAIN, read_flags
from dpo_jax.config.keys import KEYS
from dpo_jax.inspection import command as data_command
from dpo_jax.objective.table import LOSS_FACTS
from dpo_jax.plan import command as plan
from dpo_jax.records.records import METRICS
from dpo_jax.sampling.selection import MODES
from tests.config import configuration_page

PAGES = [Path("README.md"), Path("CONTRIBUTING.md"), Path("SECURITY.md"), *sorted(Path("docs").glob("*.md"))]
# Commands by module and, where it has several, by the first word.
KNOWN = {"train": TRAIN, "plan": plan.COMMAND} | {f"data {name}": c for name, c in data_command.COMMANDS.items()}


def _commands(page):
    """Lines of a page's code blocks that run one of our modules, continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if re.search(r"-m dpo_jax\.\w+", line)]


COMMANDS = [(page, line) for page in PAGES for line in _commands(page)]


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda x: str(x)[:60])
def test_commands_parse(page, line):
    words = shlex.split(line[line.index("dpo_jax.") :], comments=True)
    module, *rest = words
    name = module.removeprefix("dpo_jax.")
    assert Path(f"dpo_jax/{name}.py").exists() or Path(f"dpo_jax/{name}/__main__.py").exists(), line
    if name == "data":
        name = f"data {rest.pop(0)}"
    if name in KNOWN:
        read_flags([module, *(word for word in rest if word != "...")], KNOWN[name])
    if name == "sample":
        parse_request([module, *rest])


def test_there_are_commands_to_parse():
    assert len(COMMANDS) > 10


def _anchors(page):
    """Anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_anchors_lead_somewhere(page):
    for path, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)]+)\)", page.read_text()):
        target = (page.parent / path).resolve() if path else page
        if target.suffix == ".md":
            assert anchor in _anchors(target), f"{path}#{anchor}"


def test_the_configuration_page_is_what_the_table_says(request):
    path, page = Path("docs/configuration.md"), configuration_page.page()
    if request.config.getoption("--write-docs"):
        path.write_text(page)
    assert path.read_text() == page, "run this test with --write-docs"


def test_every_key_is_on_the_configuration_page():
    names = re.findall(r"^\| `(\w+)` \|", Path("docs/configuration.md").read_text(), re.M)
    assert names == list(KEYS)


def test_the_metrics_page_says_what_a_mean_is_over_as_the_tables_do():
    section = Path("docs/metrics.md").read_text().split("## What a mean is over")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|`-]+) \|([^|]*)\|([^|]*)\|$", section, re.M)[1:]
    for column, table in ((1, METRICS), (2, LOSS_FACTS)):
        said = {name: row[0] for row in rows for name in re.findall(r"`(\w+)`", row[column])}
        assert said == {name: it.over for name, it in table.items() if it.over}


def test_every_flag_of_sampling_is_on_its_page_as_the_table_says():
    rows = re.findall(r"^\| `--(\w+)` \| ([^|]*) \|", Path("docs/sampling.md").read_text(), re.M)
    flags = {name: flag for group in FLAGS.values() for name, flag in group.items()}
    shown = lambda value: "" if value == "" or value is False else f"`{value}`"
    assert [(name, default.strip()) for name, default in rows] == [(n, shown(f.default)) for n, f in flags.items()]


def test_every_reason_of_collecting_is_on_its_page():
    page = Path("docs/collecting.md").read_text()
    assert all(f"`{reason}`" in page for reason in WORDS), WORDS
    assert all(f"`{mode}`" in page for mode in MODES)


def _tests_of_faults():
    """By row of the table of docs/faults.md, the tests that its last column names."""
    table = Path("docs/faults.md").read_text().partition("| fault |")[2].partition("\n\n")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()[2:]]
    return [(row[0].strip(), re.findall(r"`([^`]+)`", row[-1])) for row in rows]


def test_every_row_of_faults_says_what_is_tested():
    code = "".join(path.read_text() for path in Path("tests").rglob("*.py"))
    names = set(re.findall(r"^def (test_\w+)", code, re.M))
    for fault, tests in _tests_of_faults():
        assert tests, fault
        for test in tests:
            if test.startswith("tests/"):
                assert Path(test).exists(), test
                continue
            *beginnings, end = test.split("...")  # dots stand for the middle or the end of a name
            found = [name for name in names if name.startswith(beginnings[0] if beginnings else test)]
            assert [name for name in found if name.endswith(end)], f"{fault}: no test {test}"
    assert len(_tests_of_faults()) > 15

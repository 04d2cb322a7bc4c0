"""The fuzz suite as a test: some cases of every kind, and that the watch over them sees what it is for."""

import json
import os
import subprocess
import sys

import pytest

from tests import places
from tests.fuzz import processes
from tests.fuzz.cases import Case
from tests.fuzz.faulty import WAYS
from tests.fuzz.processes import End
from tests.fuzz.rule import broken, documented_codes

needs_linux = pytest.mark.skipif(not processes.available(), reason="the watch reads /proc, which only Linux has")
# The same cases on every machine; where minutes are given, as many as there is time for.
MINUTES, PER_KIND = (float(os.environ["DPO_JAX_FUZZ_MINUTES"]), 0) if "DPO_JAX_FUZZ_MINUTES" in os.environ else (8, 8)


def _fuzz(*words, timeout):
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-m", "tests.fuzz", *words]
    return subprocess.run(
        command, cwd=places.ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.mark.slow
@needs_linux
def test_whatever_is_given_a_command_ends_as_documented(tmp_path):
    """What fails is printed with the command that shows it again."""
    seed = os.environ.get("DPO_JAX_FUZZ_SEED", "0")
    # Twice the seconds of the rule: these cores may be old ones, and other tests are on them.
    words = (f"--minutes={MINUTES}", f"--per-kind={PER_KIND}", f"--seed={seed}", "--seconds=40", f"--base={tmp_path}")
    done = _fuzz(*words, timeout=60 * MINUTES + 600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert not PER_KIND or ", 0 were not reached" in done.stdout


@needs_linux
@pytest.mark.slow
def test_the_watch_sees_every_way_to_break_the_rule(tmp_path):
    words = ("--kinds=faulty", "--minutes=3", "--seconds=3", f"--base={tmp_path}", f"--out={tmp_path}/out.jsonl")
    done = _fuzz(*words, timeout=300)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {one["case"].split("/")[1]: one["fault"] or "" for one in found} == WAYS, done.stdout + done.stderr


def _end(**changed):
    sound = {"code": 2, "out": "", "err": "error: no\n", "seconds": 1.0, "peak": 10**8}
    return End(**(sound | {"slow": False, "large": False, "writes": ()} | changed))


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("time", {"slow": True}),
        ("memory", {"large": True}),
        ("touched", {"writes": ("changed home/.profile",)}),
        ("traceback", {"code": 1, "err": "Traceback (most recent call last):\nKeyError: 'a'\n"}),
        ("code", {"code": 1}),
        ("code", {"code": -11}),
        ("lines", {"err": "a warning\nerror: no\n"}),
        ("lines", {"err": ""}),
        ("control", {"err": "error: \x1b[31m\n"}),
        ("control", {"out": "\x9b2J"}),
        ("", {"code": 0, "err": ""}),
        ("", {"code": 143}),
    ],
)
def test_the_rule(kind, changed):
    fault = broken(Case("data/x/y", None), _end(**changed))
    assert (fault[0] if fault else "") == kind


def test_damage_that_nobody_mentions_breaks_the_rule():
    case = Case("run/x/y", None, says="checksums")
    assert broken(case, _end(code=0, err="", out="done"))[0] == "silent"
    assert broken(case, _end(code=0, err="warning: checksums.json is empty")) is None


def test_the_codes_are_those_of_the_documentation():
    assert {0, 2, 65, 70, 74, 143} <= documented_codes()
    assert not {1, 134} & documented_codes()

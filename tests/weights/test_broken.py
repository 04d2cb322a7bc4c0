"""Broken directories by a seed, each in a process of its own: they are used, or refused soon in one line."""

import re
import subprocess
import sys

import pytest

from tests.processes import quick_to_compile
from tests.weights.broken import chosen, kinds


def test_a_seed_chooses_of_all_kinds_alike():
    names = [(kind, words) for kind, words, _ in chosen(3, 300)]
    assert len(set(names)) == len(names) == 300
    assert {kind for kind, _ in names} == set(kinds())
    assert [(kind, words) for kind, words, _ in chosen(3, 300)] == names
    assert [(kind, words) for kind, words, _ in chosen(4, 300)] != names


@pytest.mark.slow
def test_no_directory_ends_in_a_traceback_or_never_or_takes_all_memory():
    command = [sys.executable, "-m", "tests.weights.broken", "11", "40"]
    done = subprocess.run(command, capture_output=True, text=True, env=quick_to_compile(), timeout=280)
    lines = done.stdout.splitlines()
    assert len(lines) == 41, done.stderr
    assert [line for line in lines[:-1] if not re.match(r"(used|refused) +\d", line)] == []

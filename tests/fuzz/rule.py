"""The rule that every case is held to, and by which kind of fault it broke it."""

import re

from tests import places
from tests.fuzz.cases import Case
from tests.fuzz.processes import End

# Control characters that would drive a terminal; a line end and a tab do not.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_OF_SHELLS = re.compile(
    r"line \d+: |syntax error|unbound variable|command not found|integer expression|bad substitution|value too great"
)
# How far sampling is, and the reading of data that takes long, on standard error.
_PROGRESS = re.compile(r"[\d,]+(/[\d,]+)? prompts\b|read [\d.,]+ of [\d.,]+ MB: ")
KINDS = ("memory", "time", "touched", "traceback", "code", "lines", "control", "silent")


def documented_codes() -> set[int]:
    """The exit codes of docs/faults.md, without that of a bug and without that of several processes."""
    table = (places.ROOT / "docs/faults.md").read_text().split("\n\n| fault |")[0]
    rows = re.findall(r"^\| (\d+(?:, \d+)*) \|", table, re.M)
    return {int(code) for row in rows for code in row.split(", ")} - {1, 134}


def broken(case: Case, end: End) -> tuple[str, str] | None:
    """How a case breaks the rule: a word of `KINDS` and what was seen; None: it holds."""
    lines = [line for line in end.err.split("\n") if line.strip() and not _PROGRESS.match(line)]
    if end.large:
        return "memory", f"{end.peak / 1e9:.1f} GB after {end.seconds:.0f} s"
    if end.slow:
        return "time", f"no end after {end.seconds:.0f} s; last said: {_short((lines or ['nothing'])[-1])}"
    if end.writes and not case.writes:
        return "touched", "; ".join(end.writes[:3])
    if "Traceback (most recent call last)" in end.err or "Fatal Python error" in end.err:
        named = (line for line in reversed(lines) if re.match(r"[\w.]+(:|$)", line))
        return "traceback", _short(next(named, lines[-1]))
    codes = set(case.codes) or documented_codes()
    if end.code not in codes:
        return "code", f"exit code {end.code}: {_short(end.err) or 'not a word'}"
    if case.kind == "worker":
        return _broken_launch(end, lines)
    if len(lines) > 1 or (end.code and not lines):
        return "lines", f"{len(lines)} lines with code {end.code}: {_short(' | '.join(lines))}"
    if found := _CONTROL.search(end.err) or _CONTROL.search(end.out):
        return "control", f"{found[0]!a} on the terminal: {_short(end.err or end.out)}"
    if case.says and not re.search(case.says, end.out + end.err):
        return "silent", f"code {end.code} and no word of {case.says!r}: {_short(end.err) or 'nothing said'}"
    return None


def _broken_launch(end: End, lines: list[str]) -> tuple[str, str] | None:
    """The launcher says what it does, a line each; none of them is a shell's own complaint, and one ends it."""
    if found := _OF_SHELLS.search(end.err):
        return "traceback", _short(end.err[max(0, found.start() - 60) :])
    if found := _CONTROL.search(end.err) or _CONTROL.search(end.out):
        return "control", f"{found[0]!a} on the terminal: {_short(found.string[max(0, found.start() - 40) :])}"
    errors = [line for line in lines if line.startswith("error:")]
    if len(errors) > bool(end.code):
        return "lines", f"{len(errors)} errors with code {end.code}: {_short(' | '.join(errors))}"
    if forged := [line for line in lines if line == "launch: done: gs://b/x"]:  # of `worker_answers.HOSTILE`
        return "lines", f"a worker speaks for the launcher: {forged[0]}"
    return None


def _short(text: str) -> str:
    text = " ".join(text.split())
    shown = text if len(text) <= 240 else text[:120] + " ... " + text[-115:]
    return shown.encode("ascii", "backslashreplace").decode()

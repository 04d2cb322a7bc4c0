"""What a report of data says of the rows' forms and fields, in lines for people."""

from collections.abc import Mapping, Sequence
from typing import Any

_NAMES = 12  # columns that a line names; the others are counted


def form_lines(report: Mapping[str, Any]) -> list[str]:
    """For each source and form: what each column was read as, in how many rows."""
    lines = []
    for source in report["sources"]:
        for form in source.get("forms", ()):
            columns = "; ".join(f"{name} → {what}" for name, what in form["reads"].items())
            where = f"{form['rows']:,} rows of {source['name']} ({source['split']})"
            lines.append(f"form: {form['form']}, {where}{': ' if columns else ''}{columns}")
    return lines


def field_lines(report: Mapping[str, Any]) -> list[str]:
    """What went to the chat template beside roles and texts, and which columns nothing reads; a line each, or none."""
    sent: dict[str, int] = {}
    unused: dict[str, int] = {}
    several = 0
    for source in report["sources"]:
        for total, key in ((sent, "to_template"), (unused, "unused")):
            for name, number in source.get(key, {}).items():
                total[name] = total.get(name, 0) + number
        several += source.get("answers_of_several_turns", 0)
    lines = []
    if sent:
        lines.append(f"to the chat template: {_counted(sent, 'pairs')}")
    if several:
        lines.append(f"answers of several turns: {several:,} pairs, with loss on all that follows the prompt")
    if unused:
        lines.append(f"columns that nothing reads: {_counted(unused, 'rows')}")
    return lines


def _counted(counts: Mapping[str, int], of: str) -> str:
    """Names with their counts; names of one count together."""
    together: dict[int, list[str]] = {}
    for name, number in sorted(counts.items(), key=lambda item: -item[1]):
        together.setdefault(number, []).append(name)
    return "; ".join(f"{_listed(names)} ({number:,} {of})" for number, names in together.items())


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMES
    return ", ".join(names[:_NAMES]) + (f" and {more} more" if more > 0 else "")

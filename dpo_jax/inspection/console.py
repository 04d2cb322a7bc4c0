"""An inspection on the console."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_jax.data.summary import field_lines, form_lines
from dpo_jax.inspection.gather import SHAPE_HEAD, Example, Inspection, bad_rows
from dpo_jax.records.records import printable
from dpo_jax.report.sections import length_words, mixture_parts

DIGITS = {"mean": 1, "p50": 1, "p90": 1, "max": 0}
STYLES = {"prompt": "dim", "chosen": "green", "rejected": "red"}
LOSS_MARKS = ("«", "»")  # around the loss tokens, where there are no colours


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Print everything; without colours the loss tokens stand in `LOSS_MARKS`."""
    print_rows(inspection.report, console)
    _lengths(inspection.report["splits"], console)
    if schedule := inspection.schedule:
        entries = [[f"{c:,}" if isinstance(c, int) else c for c in row] for row in schedule.rows]
        _table(console, f"Schedule of the first epoch: {schedule.where}", SHAPE_HEAD, entries)
        say(console, schedule.words + "\n")
    else:
        say(console, inspection.note + "\n")
    coloured = console.is_terminal and not console.no_color and console.color_system is not None
    for example in inspection.examples:
        _example(example, console, coloured)
    if inspection.examples:
        which = "green and red tokens" if coloured else "tokens in " + "…".join(LOSS_MARKS)
        say(console, f"The loss is on the {which}; both answers see the prompt.")


def print_rows(report: Mapping[str, Any], console: Console) -> None:
    """What was read, kept and dropped, by source and split; what is wrong with the files; where evaluation is from."""
    entries = []
    for source in report["sources"]:
        reasons = [_counts(source[key]) for key in ("dropped", "truncated")]
        entries.append((source["name"], source["split"], f"{source['read']:,}", f"{source['kept']:,}", *reasons))
    _table(console, "Rows", ("source", "split", "read", "kept", "dropped", "truncated"), entries, words=(0, 1, 4, 5))
    for line in (*form_lines(report), *field_lines(report)):
        say(console, line)
    for name, split, reason, number, first in bad_rows(report):
        say(console, f"bad: {number:,} {reason} in {name} ({split}), first {first}")
    for line in report.get("notes", []):
        say(console, f"note: {line}")
    if report.get("quarantine"):
        say(console, f"bad rows are kept in {report['quarantine']}")
    if mixture := mixture_parts(report):
        say(console, f"mixture: {'; '.join(mixture)}")
    say(console, f"evaluation: {report['held_out']}\n")


def say(console: Console, line: str) -> None:
    """A line as it is: no markup, no wrapping."""
    console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def _lengths(splits: Mapping[str, Any], console: Console) -> None:
    entries = [
        (split, f"{entry['pairs']:,}", part, *(f"{stats[key]:,.{i}f}" for key, i in DIGITS.items()))
        for split, entry in splits.items()
        for part, stats in entry["tokens"].items()
    ]
    head = ("split", "pairs", "tokens of", "mean", "p50", "p90", "max")
    _table(console, "Lengths in tokens", head, entries, words=(0, 2))
    say(console, length_words(splits["train"]["longer"]) + "\n")


def _example(example: Example, console: Console, coloured: bool) -> None:
    tokens = ", ".join(f"{part} {sum(len(p.ids) for p in pieces)}" for part, pieces in example.parts.items())
    rule = Text(f"pair {example.number} of {printable(example.source)}: {tokens} tokens", style="bold")
    console.print(rule, soft_wrap=True)
    for part, pieces in example.parts.items():
        answer, (start, end) = part != "prompt", ("", "") if coloured or part == "prompt" else LOSS_MARKS
        text = Text.assemble((f"{part}: ", "bold") if answer else "", start)
        for piece in pieces:
            text.append(piece.visible, style=STYLES[part] + (" bold" if piece.special else ""))
        console.print(text.append(end), soft_wrap=True)
    console.print()


def _counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in reasons.items() if number) or "–"


def _table(
    console: Console, title: str, head: Sequence[str], entries: Sequence[Sequence[str]], words: Sequence[int] = (0,)
) -> None:
    console.print(Text(printable(title), style="bold"), soft_wrap=True)  # a table's own title wraps at its width
    table = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i in words else "right", overflow="fold")
    for entry in entries:
        table.add_row(*(Text(printable(cell)) for cell in entry))
    console.print(table)

"""What judging found, on the console. No JAX."""

import math
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_jax.judging.compare import Compared
from dpo_jax.judging.measure import Measured
from dpo_jax.records.records import printable


def print_compared(result: Compared, console: Console) -> None:
    """The table of a comparison."""
    print_heading(console, f"{result.a} against {result.b}, judge {result.judge}")
    shares = f"{share(result.wins)}, {share(result.ties)}, {share(result.losses)}"
    lengths = f"{number(result.mean_length_a, 1)}, {number(result.mean_length_b, 1)} {result.length_unit}"
    rows = [
        ("win rate", with_error(result.win_rate, result.win_rate_error)),
        ("at equal lengths", with_error(result.length_controlled_win_rate, result.length_controlled_error)),
        ("wins, ties, losses", shares),
        ("both orders agree", share(result.order_agreement)),
        ("mean lengths", lengths),
        ("prompts, comparisons", f"{result.prompts:,}, {result.comparisons:,}"),
        ("no verdict", f"{result.no_verdict:,}"),
    ]
    if result.disagreement is not None:
        rows.append(("disagreement of judges", number(result.disagreement, 3)))
    print_table(console, ("", ""), rows)
    print_table(
        console,
        ("source", "prompts", "win rate", "ties", "no verdict"),
        [
            (
                name,
                f"{part['prompts']:,}",
                with_error(part["win_rate"], part["win_rate_error"]),
                share(part["ties"]),
                f"{part['no_verdict']:,}",
            )
            for name, part in result.by_source.items()
        ],
    )


def print_measured(result: Measured, console: Console) -> None:
    """The table of a benchmark: all of it, and its parts."""
    print_heading(console, f"{result.data} ({result.format}), judge {result.judge}")
    rows = [_measured_row(name, part) for name, part in result.parts.items()] if len(result.parts) > 1 else []
    whole = {name: getattr(result, name) for name in ("accuracy", "accuracy_error", "ties", "no_verdict", "items")}
    print_table(console, ("", "items", "accuracy", "ties", "no verdict"), [*rows, _measured_row("all", whole)])
    if result.more:
        print_table(
            console, ("", ""), [(name.replace("_", " "), number(value, 3)) for name, value in result.more.items()]
        )
    console.print(printable(f"accuracy: {result.about}"), markup=False, highlight=False, soft_wrap=True)


def print_scored(scores: Sequence[Sequence[float]], console: Console) -> None:
    """A line about the scores of a file."""
    every = [one for of_line in scores for one in of_line]
    there = [one for one in every if not math.isnan(one)]
    words = f"{len(every):,} answers to {len(scores):,} prompts"
    if there:
        words += f": score mean {sum(there) / len(there):.4g}, least {min(there):.4g}, largest {max(there):.4g}"
    if len(there) < len(every):
        words += f"; {len(every) - len(there):,} have none"
    console.print(words, markup=False, highlight=False, soft_wrap=True)


def _measured_row(name: str, part: Mapping[str, float]) -> tuple[str, ...]:
    accuracy = with_error(part["accuracy"], part["accuracy_error"])
    return name, f"{part['items']:,}", accuracy, share(part["ties"]), f"{part['no_verdict']:,}"


def with_error(value: float, error: float) -> str:
    """0.853 ± 0.021"""
    return number(value, 3) + ("" if math.isnan(error) else f" ± {number(error, 3)}")


def share(value: float) -> str:
    """12.5%"""
    return "–" if math.isnan(value) else f"{value:.1%}"


def number(value: float, digits: int) -> str:
    """With so many digits behind the point."""
    return "–" if math.isnan(value) else f"{value:,.{digits}f}"


def wide_console() -> Console:
    """Standard output; wide where it is no terminal, so that a table's cells are not broken in a file."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def print_heading(console: Console, text: str) -> None:
    """A line above a table."""
    console.print(Text(printable(text), style="bold"), soft_wrap=True)  # a table's own title wraps at its width


def print_table(console: Console, head: Sequence[str], entries: Sequence[Sequence[str]]) -> None:
    """Rows of texts, the first column to the left; nothing if there is none."""
    if not entries:
        return
    table = Table(box=box.SIMPLE_HEAD, show_header=any(head))
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for entry in entries:
        table.add_row(*(Text(printable(cell)) for cell in entry))
    console.print(table)

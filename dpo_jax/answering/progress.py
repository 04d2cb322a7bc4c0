"""How far a file of answers has come, on standard error: a bar on a terminal, elsewhere a line now and then."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LINE_SECONDS = 10.0  # between two lines, where there is no terminal


class Tracker:
    """Counts prompts and tokens; a context manager.

    Args:
      total, done: prompts of the file, and those that were answered before.
      quiet: nothing is shown.
    """

    def __init__(self, total: int, done: int, *, quiet: bool, console: Console | None = None):
        self.total, self.done, self.before = total, done, done
        self.answers = self.tokens = 0
        self.console = console or Console(stderr=True)
        self.quiet = quiet
        self._start = self._last = time.monotonic()
        self._bar: Progress | None = None
        if self.console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("{task.completed:,.0f}/{task.total:,.0f} prompts"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[words]}", markup=False),
                console=self.console,
                expand=True,
            )
            self._bar.add_task("", total=total, completed=done, words="")

    def __enter__(self) -> "Tracker":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        if kind is None and not self.quiet:
            self._print(f"{self.done - self.before:,} prompts, {self.answers:,} answers, {self._words()}")

    def ended(self, tokens: int, answers: int = 1) -> None:
        """So many answers, of so many tokens together, have ended."""
        self.answers += answers
        self.tokens += tokens
        self._show()

    def answered(self, prompts: int) -> None:
        """So many more prompts have all their answers."""
        self.done += prompts
        self._show()

    def _show(self) -> None:
        if self.quiet:
            return
        if self._bar:
            self._bar.update(self._bar.tasks[0].id, completed=self.done, words=self._words())
        elif time.monotonic() - self._last >= LINE_SECONDS:
            self._last = time.monotonic()
            self._print(f"{self.done:,}/{self.total:,} prompts, {self._words()}")

    def _words(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        words = f"{self.tokens:,} tokens, {self.tokens / seconds:,.0f} tokens/s"
        new, rest = self.done - self.before, self.total - self.done
        if not rest:
            return f"{words}, {seconds:,.1f} s"
        if not new:
            return words
        left = round(seconds / new * rest)
        return f"{words}, left {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

"""How far judging has come, on standard error: a bar on a terminal, elsewhere a line now and then."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LINE_SECONDS = 10.0  # between two lines, where there is no terminal


class JudgingTracker:
    """Counts what is judged; a context manager.

    Args:
      total, done: of all, and those that were judged before.
      what: is judged, in words.
      quiet: nothing is shown.
    """

    def __init__(self, total: int, done: int, what: str, *, quiet: bool = False, console: Console | None = None):
        self.total, self.done, self.before, self.what, self.quiet = total, done, done, what, quiet
        self.console = console or Console(stderr=True)
        self._start = self._last = time.monotonic()
        self._bar: Progress | None = None
        if self.console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn(f"{{task.completed:,.0f}}/{{task.total:,.0f}} {what}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[words]}", markup=False),
                console=self.console,
                expand=True,
            )
            self._bar.add_task("", total=total, completed=done, words="")

    def __enter__(self) -> "JudgingTracker":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        if kind is None and not self.quiet and self.done > self.before:
            self._print(f"{self.done - self.before:,} {self.what} judged, {self._words()}")

    def judged(self, more: int) -> None:
        """So many more are judged."""
        self.done += more
        if self.quiet:
            return
        if self._bar:
            self._bar.update(self._bar.tasks[0].id, completed=self.done, words=self._words())
        elif time.monotonic() - self._last >= LINE_SECONDS:
            self._last = time.monotonic()
            self._print(f"{self.done:,}/{self.total:,} {self.what}, {self._words()}")

    def _words(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        new, rest = self.done - self.before, self.total - self.done
        words = f"{new / seconds:,.1f} {self.what}/s"
        if not rest:
            return f"{words}, {seconds:,.1f} s"
        left = round(seconds / max(1, new) * rest)
        return f"{words}, left {left // 3600}:{left // 60 % 60:02}:{left % 60:02}" if new else words

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

"""The exceptions with which a run ends, and its exit codes (docs/faults.md)."""

import signal

BAD_INPUT = 2
NOT_FINITE = 65  # too many updates in a row were skipped
STUCK = 70  # nothing moved any more, or another process is gone
SAVE_FAILED = 74  # or the disk is full


def escaped(text: str) -> str:
    r"""The text in one line that no terminal acts on: what is not printable stands as Python writes it in a string.

    Names from files and words of other programs may hold escape sequences, line ends and halves of surrogate pairs.

    >>> escaped("a\x1b[31m\nerror: b")
    'a\\x1b[31m\\nerror: b'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Stopped(Exception):  # noqa: N818 - not an error
    """A signal asked for the end; the state was saved.

    Attributes:
      signal: its number; that of SIGTERM where another process of this run got it. The exit code is 128 more.
    """

    signal: int = signal.SIGTERM

    @property
    def name(self) -> str:
        """The signal's name."""
        return signal.Signals(self.signal).name


class UserError(Exception):
    """What the user can mend, said in one line: the thing, what was found, how to mend it.

    Command lines print the message without a traceback and exit with `code`; 2 is bad input. It is one line whatever
    the names in it hold, see `escaped`.
    """

    def __init__(self, message: str, *, code: int = BAD_INPUT):
        super().__init__(escaped(message))
        self.code = code

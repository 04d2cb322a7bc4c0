"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """Bad input, said in one line: the thing, what was found, how to mend it.

    Command lines print the message without a traceback and exit with code 2.
    """

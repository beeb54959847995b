"""The exception for mistakes a user can mend."""

from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the message is one sentence that says what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """


def printable(text: object, most: int = 80) -> str:
    """What a file says, for a message: no terminal is moved by it, and no line is broken."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
    return line[:most] or "something without a name"


def some(names: Iterable[str], most: int = 5) -> str:
    """The first names of a list for a message, and how many more there are."""
    names = [printable(name, 300) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

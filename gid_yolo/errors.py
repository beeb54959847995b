"""The exception for mistakes a user can mend."""

from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the message is one sentence that says what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """


def some(names: Iterable[str], most: int = 5) -> str:
    """The first names of a list for a message, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

"""The exception for mistakes a user can mend."""


class UserError(ValueError):
    """Bad input: the message is one sentence that says what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """

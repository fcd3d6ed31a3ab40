"""The one exception a user is meant to read."""


class UserError(ValueError):
    """Bad input: the message says in one line what is wrong, where, and how to mend it.

    The command line prints it without a traceback (``--debug`` shows one) and exits with code 2.
    """

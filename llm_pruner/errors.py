"""The one exception that is the user's to mend: the command line prints its message and exits with 2."""


class PrunerError(ValueError):
    """Bad input or an unsupported combination; the message says what is wrong and what to do."""

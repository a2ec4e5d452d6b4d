"""The exceptions that are the user's to mend: the command line prints their message and exits with 2."""


class PrunerError(ValueError):
    """Bad input or an unsupported combination; the message says what is wrong and what to do."""


class Unavailable(PrunerError):
    """A model or data set is not here: the hub does not give it, or a folder holds a config alone."""

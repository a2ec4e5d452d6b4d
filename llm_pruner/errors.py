"""The exceptions that are the user's to mend: the command line prints their message and exits with 2."""


class PrunerError(ValueError):
    """Bad input or an unsupported combination; the message says what is wrong and what to do."""


class HubUnreachable(PrunerError):
    """The hub does not give a model or data set: there is no network, or no such name."""

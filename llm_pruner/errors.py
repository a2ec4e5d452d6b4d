"""Errors that a user can resolve: the command line prints their message as one line and exits with code 2."""


class PrunerError(ValueError):
    """Bad input or an unsupported combination; the message says what is wrong and what to do.

    >>> import llm_pruner as lp
    >>> lp.register_criterion("l1", max)
    Traceback (most recent call last):
    llm_pruner.errors.PrunerError: criterion name 'l1' is taken by a built-in criterion: choose another name
    """


class Unavailable(PrunerError):
    """A model or data set that this machine lacks: the hub cannot deliver it, or a folder holds only a config."""

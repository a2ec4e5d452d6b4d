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


def is_panic(error: BaseException) -> bool:
    """Return True for a panic of a library in Rust, which is no Exception: tokenizers has them of damaged files."""
    return type(error).__name__ == "PanicException"


def in_one_line(error: BaseException, most: int = 200) -> str:
    """Return kind and message of another library's error in one line, at most so many characters of the message.

    >>> in_one_line(OSError("no such\\n  host"))
    'OSError: no such host'
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())[:most]}"

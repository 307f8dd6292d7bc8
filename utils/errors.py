"""The base class of every error that a user can cause and fix."""

from typing import ClassVar


class AnnealError(Exception):
    """An error with a complete message: what failed, where, and how to fix it.

    Commands print the message without a traceback and exit with `exit_code`.
    """

    exit_code: ClassVar[int] = 2
    """2: rejected before training. Subclasses for failures after training has started set 1."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def last_line(error: BaseException | str) -> str:
    """Return the last line of an error's message or of a traceback, which states the cause of an error in another process."""
    otherwise = "no reason given" if isinstance(error, str) else type(error).__name__
    return (str(error).strip().splitlines() or [otherwise])[-1].strip()

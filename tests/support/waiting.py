"""A wait for what another thread or process does."""

import time
from collections.abc import Callable

_SECONDS = 120


def wait_until(condition: Callable[[], bool], *, fails: str = "the condition is not met") -> None:
    """Wait until a condition holds.

    Args:
        condition: The condition.
        fails: The error if it does not hold within two minutes: a guard against hanging, which no machine is too slow for.
    """
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{fails} within {_SECONDS} s"
        time.sleep(0.01)

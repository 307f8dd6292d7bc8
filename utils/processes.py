"""Processes that live and die together."""

import ctypes
import os
import signal
from collections.abc import Callable

FORWARDED = (signal.SIGINT, signal.SIGTERM)

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> Callable[[], None]:
    """Return what a fresh child runs, so that the kernel kills it when its parent (a pid) dies."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return in_child


def run_in_own_session(work: Callable[[], int]) -> int:
    """Do the work in a child with a session of its own, and return its exit code; a signal's is 128 + its number.

    A signal to a whole process group (Ctrl-C, `timeout`, a service manager) then reaches this process alone, which
    hands SIGINT and SIGTERM to the child: what the child has started goes on until the child itself ends it.
    Must be called while there is one thread.
    """
    tie_to_parent = die_with(os.getpid())
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    child = os.fork()
    if child == 0:
        os.setsid()
        tie_to_parent()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        return work()
    for number in FORWARDED:
        signal.signal(number, lambda received, _: os.kill(child, received))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code

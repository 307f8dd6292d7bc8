"""Processes: what they import, that they live and die together, and whether one still lives."""

import ctypes
import gc
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

FORWARDED = (signal.SIGINT, signal.SIGTERM)

_PR_SET_PDEATHSIG = 1


@contextmanager
def importing() -> Iterator[None]:
    """Import large packages without the garbage collector, which takes a quarter of the time to find what stays anyway.

    What lives then (and the few cycles that imports leave), it never looks at again, so its collections in training are shorter.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


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


def this_machine() -> str:
    """The same for processes that see one another by their ids: this boot, and this process namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        return socket.gethostname()
    return f"{boot.read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"


def started_after_boot(process: int) -> float | None:
    """Seconds from this machine's boot to the start of a process (an id), which no clock that is set changes; None: it is gone."""
    try:
        found = psutil.Process(process)
        if found.status() == psutil.STATUS_ZOMBIE:  # killed, and nobody has collected it
            return None
        return round(found.create_time() - psutil.boot_time(), 2)
    except psutil.NoSuchProcess:
        return None

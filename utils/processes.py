"""Process helpers: fast imports, child processes that exit with their parent, and process identity."""

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
    """Pause the garbage collector while large packages are imported, which saves a quarter of the import time.

    Objects that are alive afterwards are frozen, so that later collections during training skip them.
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
    """Return a function for a new child process, so that the kernel kills the child when its parent (a pid) exits."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return in_child


def run_in_own_session(work: Callable[[], int]) -> int:
    """Run `work` in a child process with its own session and return its exit code; 128 + number for a signal.

    A signal to the process group (Ctrl-C, `timeout`, a service manager) then reaches only this process, which
    forwards SIGINT and SIGTERM to the child. Processes started by the child keep running until the child stops them.
    Call this while the process has a single thread.
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
    """Return an id shared by all processes that can see each other's pids: the boot id and the pid namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        return socket.gethostname()
    return f"{boot.read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"


def started_after_boot(process: int) -> float | None:
    """Return the seconds from boot to the start of a process; None if it is gone. Changes of the clock have no effect."""
    try:
        found = psutil.Process(process)
        if found.status() == psutil.STATUS_ZOMBIE:  # killed, but not yet reaped
            return None
        return round(found.create_time() - psutil.boot_time(), 2)
    except psutil.NoSuchProcess:
        return None

"""Process helpers: fast imports, child processes that exit with their parent, and process identity."""

import ctypes
import gc
import getpass
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    *([] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]),
)
"""The signals that stop a process. SIGHUP, which a closed terminal sends, does not if it is ignored, as under nohup."""

SENT_AS_SIGTERM = signal.SIGRTMIN + 1
"""The signal that a process of this project sends to itself or to its child instead of SIGTERM.

Ray replaces the handler of SIGTERM when it connects, and the kernel's default action follows when it disconnects (2.60.0). No
library uses this signal.
"""

_PR_SET_PDEATHSIG = 1
_ended_pipe: int | None = None
"""In the child of `run_in_own_session`: the end of the pipe to its parent."""


class Stopped(KeyboardInterrupt):
    """A SIGINT, SIGTERM or SIGHUP that this process received before there was something to save."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number

    @property
    def name(self) -> str:
        """Return the signal's name, such as SIGTERM."""
        return signal.Signals(self.number).name

    @property
    def exit_code(self) -> int:
        """Return the exit code of a process that a signal stopped: 128 + its number."""
        return 128 + self.number


_last_stopped: Stopped | None = None


def raise_signals() -> None:
    """Raise `Stopped` in the main thread on each of the FORWARDED signals from now on, except while code cleans up after a `Stopped`."""
    handle_signals(_raise_stopped)


def record_signals(then: Callable[[], object] | None = None) -> list[int]:
    """Append each of the FORWARDED signals from now on to the returned list; nothing is interrupted.

    A SIGHUP after another signal is not appended: a shell and the kernel both send it when a terminal closes, and a second signal
    stops at once. `then` is called after each signal.
    """
    received: list[int] = []

    def record(number: int) -> None:
        if number != signal.SIGHUP or not received:
            received.append(number)
        if then:
            then()

    handle_signals(record)
    return received


def restore_handlers() -> None:
    """Install this process's handlers again after code that is not Python has replaced them."""
    for number in (*FORWARDED, SENT_AS_SIGTERM):
        signal.signal(number, signal.getsignal(number))


def handle_signals(handler: Callable[[int], object]) -> None:
    """Call `handler` in the main thread with the number of each of the FORWARDED signals from now on."""

    def on_signal(number: int, _: FrameType | None) -> None:
        handler(signal.SIGTERM if number == SENT_AS_SIGTERM else number)

    for number in (*FORWARDED, SENT_AS_SIGTERM):
        signal.signal(number, on_signal)


def ignore_signals() -> None:
    """Ignore the FORWARDED signals until this process has exited, since its exit code is decided.

    While the interpreter shuts down, Python replaces all other handlers by the default, which would terminate the process with
    another code. Blocking the signals would not help: threads of libraries receive them as well.
    """
    for number in (*FORWARDED, SENT_AS_SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def is_stopping() -> bool:
    """Return whether this thread cleans up after a `Stopped`."""
    handled = sys.exc_info()[1]  # inside `finally` and `with` blocks: the exception that ends them
    while handled is not None and not isinstance(handled, Stopped):
        handled = handled.__context__
    return handled is not None


def last_stopped() -> Stopped | None:
    """Return the last `Stopped` that a signal has raised: calls of Ray replace it by a KeyboardInterrupt (2.60.0)."""
    return _last_stopped


def _raise_stopped(number: int) -> None:
    global _last_stopped
    if not is_stopping():
        _last_stopped = Stopped(number)
        raise _last_stopped


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


def run_in_own_session(work: Callable[[], int], *, on_lost: Callable[[str], None]) -> int:
    """Run `work` in a child process with its own session and return its exit code; 128 + number for a signal.

    A signal to the process group (Ctrl-C, `timeout`, a service manager) then reaches only this process, which
    sends the FORWARDED signals to the child. Processes started by the child keep running until the child stops them.
    Call this after `raise_signals`, while the process has a single thread.

    Args:
        work: Called in the child.
        on_lost: Called here with the kind of exit if the child exited before `work` returned or raised an exception.
    """
    tie_to_parent = die_with(os.getpid())
    reader, writer = os.pipe()
    global _ended_pipe
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    child = os.fork()
    if child == 0:
        os.close(reader)
        _ended_pipe = writer
        os.setsid()
        tie_to_parent()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        try:
            return work()
        finally:
            _tell_end()
    os.close(writer)
    for number in FORWARDED:
        sent = SENT_AS_SIGTERM if number == signal.SIGTERM else number
        signal.signal(number, partial(_send, child, sent))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # until it is reaped, the handlers can signal it
    ignore_signals()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os.set_blocking(reader, False)  # processes that outlive the child may hold the other end
    if _is_empty(reader):
        on_lost(f"exit code {code}" if code >= 0 else signal.Signals(-code).name)
    return code if code >= 0 else 128 - code


def exit_at_once(code: int) -> NoReturn:
    """End this process from any thread, without cleanup, after the error has been printed."""
    _tell_end()
    os._exit(code)


def _tell_end() -> None:
    """Let the parent of `run_in_own_session` know that this process reports its end itself."""
    if _ended_pipe is not None:
        os.write(_ended_pipe, b"!")


def _send(process: int, number: int, *_: object) -> None:
    os.kill(process, number)


def _is_empty(pipe: int) -> bool:
    try:
        return os.read(pipe, 1) == b""
    except BlockingIOError:
        return True
    finally:
        os.close(pipe)


def user_and_host() -> str:
    """Return this user and machine for other users, such as ada@gpu-1."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without a passwd entry for this user id
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


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

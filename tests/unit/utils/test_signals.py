"""Signals of a process and of a child in its own session: what they interrupt, and the exit code."""

import signal
import subprocess
import sys
import textwrap

import pytest


def _run(program: str) -> tuple[int, str]:
    """Run a program; return its exit code and output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize("cleanup", ["finally", "with", "handler"])
def test_second_signal_does_not_interrupt_the_cleanup(cleanup: str):
    """Another exception, handled during the cleanup, changes nothing."""
    code, output = _run(f"""
        import os, signal, sys
        from contextlib import contextmanager
        from utils.processes import Stopped, raise_signals

        def clean_up():
            try:
                raise OSError
            except OSError:
                os.kill(os.getpid(), signal.SIGTERM)
            print("cleaned up")

        @contextmanager
        def cleaned():
            try:
                yield
            finally:
                clean_up()

        def interrupted():
            if "{cleanup}" == "with":
                with cleaned():
                    os.kill(os.getpid(), signal.SIGTERM)
            elif "{cleanup}" == "finally":
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                finally:
                    clean_up()
            else:
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                except Stopped:
                    clean_up()
                    raise

        raise_signals()
        try:
            interrupted()
        except Stopped as stopped:
            sys.exit(stopped.exit_code)
    """)
    assert (code, output) == (128 + signal.SIGTERM, "cleaned up\n")


def test_signal_that_a_library_swallowed_is_raised_again():
    code, output = _run("""
        import os, signal
        from utils.processes import Stopped, raise_signals

        raise_signals()
        for _ in range(2):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except Stopped as stopped:
                print(stopped.name)
    """)
    assert (code, output) == (0, "SIGINT\nSIGINT\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_after_the_work_changes_no_exit_code(number: signal.Signals):
    """Both the child and its parent receive signals while they shut down."""
    code, output = _run(f"""
        import os, signal, sys
        from utils.processes import ignore_signals, raise_signals, run_in_own_session

        class AtShutdown:
            def __del__(self):
                os.kill(os.getppid(), {number})
                os.kill(os.getpid(), {number})

        def work():
            global last
            last = AtShutdown()
            return 3

        raise_signals()
        parent = os.getpid()
        code = run_in_own_session(work, on_lost=print)
        ignore_signals()
        if os.getpid() == parent:
            os.kill(parent, {number})
        sys.exit(code)
    """)
    assert (code, output) == (3, "")


def test_closed_terminal_stops_a_child_in_its_own_session_once():
    """The shell and the kernel both send SIGHUP; a second signal would stop at once."""
    code, output = _run("""
        import os, signal, sys, time
        from utils.processes import raise_signals, record_signals, run_in_own_session

        def work():
            received = record_signals()
            for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
                os.kill(os.getppid(), number)  # two pending signals of one kind are one signal
                while number not in received:
                    time.sleep(0.01)
                time.sleep(0.2)
            print(*(signal.Signals(number).name for number in received), flush=True)
            return 5

        raise_signals()
        sys.exit(run_in_own_session(work, on_lost=print))
    """)
    assert (code, output) == (5, "SIGHUP SIGTERM\n")


def test_closed_terminal_stops_nothing_under_nohup():
    code, output = _run("""
        import os, signal
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        from utils.processes import raise_signals

        raise_signals()
        os.kill(os.getpid(), signal.SIGHUP)
        print("continues")
    """)
    assert (code, output) == (0, "continues\n")


def test_child_in_its_own_session_receives_the_signals_of_its_parent():
    code, output = _run("""
        import os, signal, sys, time
        from utils.processes import Stopped, raise_signals, run_in_own_session

        def work():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Ray does
            for number in (signal.SIGTERM, signal.SIGINT):
                try:
                    os.kill(os.getppid(), number)
                    time.sleep(30)
                except Stopped as stopped:
                    print(stopped.name, flush=True)
            return 5

        raise_signals()
        sys.exit(run_in_own_session(work, on_lost=print))
    """)
    assert (code, output) == (5, "SIGTERM\nSIGINT\n")

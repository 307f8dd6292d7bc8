"""Console output: keep our own lines on the screen and send library output to a log file."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

_STDERR = 2
_screen = _STDERR
"""File descriptor of standard error as it was before `library_output_in`."""


class _Stream(io.TextIOWrapper):
    """A text stream that reports a closed terminal as a closed pipe."""

    def write(self, text: str, /) -> int:
        with _closed_terminal_as_pipe():
            return super().write(text)

    def flush(self) -> None:
        with _closed_terminal_as_pipe():
            super().flush()


@contextmanager
def _closed_terminal_as_pipe() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EIO:
            raise BrokenPipeError from error
        raise


class Output(Console):
    """A console that survives a closed pipe or terminal, as with `| head`: it drops further output and the process continues."""

    def write(self, text: str) -> None:
        """Write text unchanged and flush it."""
        try:
            self.file.write(text)
            self.file.flush()
        except BrokenPipeError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Redirect output to /dev/null instead of exiting: a run must not stop because its progress is not read."""
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), self.file.fileno())


def open_consoles() -> tuple[Output, Output]:
    """Return (stdout, stderr) consoles on their own file descriptors, so that redirecting library output skips them."""
    return _on_copy_of(sys.stdout.fileno()), _on_copy_of(sys.stderr.fileno())


def _on_copy_of(descriptor: int) -> Output:
    binary = os.fdopen(os.dup(descriptor), "wb")
    file = _Stream(binary, encoding="utf-8", errors="replace", line_buffering=True)
    # In a file or a pipe, do not wrap lines.
    width = None if file.isatty() else 100_000
    return Output(
        file=file, highlight=False, soft_wrap=not file.isatty(), markup=False, emoji=False, width=width
    )


@contextmanager
def library_output_in(path: Path) -> Iterator[None]:
    """Append everything that this process prints, down to the file descriptors, to a log file."""
    global _screen
    path.parent.mkdir(parents=True, exist_ok=True)
    _flush()
    saved = os.dup(1), os.dup(2)
    if is_outermost := _screen == _STDERR:
        _screen = saved[1]
    with path.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        _flush()
        if is_outermost:
            _screen = _STDERR
        for target, descriptor in zip((1, 2), saved, strict=True):
            os.dup2(descriptor, target)
            os.close(descriptor)


def write_to_screen(text: str) -> None:
    """Write text to standard error from any thread, also while `library_output_in` redirects it."""
    # On a terminal, replace the line of a progress bar, and show the cursor that it hides.
    beginning = "\r\x1b[K\x1b[?25h" if os.isatty(_screen) else ""
    with suppress(OSError):  # a closed pipe or terminal
        os.write(_screen, f"{beginning}{text}".encode())


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a log on a full disk must not end the run
            stream.flush()

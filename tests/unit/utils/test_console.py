"""Console output is printed unchanged, and a closed pipe raises no error."""

import os

import pytest

from utils import console
from utils.console import Output, _on_copy_of, write_to_screen


def open_pipe() -> tuple[int, Output]:
    """Return the read end of a pipe and an Output that writes to it."""
    reader, writer = os.pipe()
    output = _on_copy_of(writer)
    os.close(writer)
    return reader, output


def test_output_is_printed_unchanged():
    reader, output = open_pipe()
    output.print('{"path": "a:b:c", "says": ":fire:"}')
    output.write("a\tb\n")
    output.file.close()
    with os.fdopen(reader, encoding="utf-8") as file:
        assert file.read() == '{"path": "a:b:c", "says": ":fire:"}\na\tb\n'


def test_printing_to_a_closed_pipe_is_ignored():
    reader, output = open_pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        os.write(output.file.fileno(), b"the pipe is closed")
    for _ in range(2):
        output.print("a line")
        output.write("a line\n")
    output.file.close()
    assert output.file.closed


def test_text_of_a_thread_replaces_a_progress_bar(monkeypatch: pytest.MonkeyPatch):
    """Rich hides the cursor while it shows a bar, and a process that exits at once does not show it again."""
    ours, screen = os.openpty()
    monkeypatch.setattr(console, "_screen", screen)
    write_to_screen("error: lost\n")
    assert os.read(ours, 100) == b"\r\x1b[K\x1b[?25herror: lost\r\n"
    reading, writing = os.pipe()
    monkeypatch.setattr(console, "_screen", writing)
    write_to_screen("error: lost\n")
    assert os.read(reading, 100) == b"error: lost\n"
    for descriptor in (ours, screen, reading, writing):
        os.close(descriptor)

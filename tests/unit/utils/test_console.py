"""Console output is printed unchanged, and a closed pipe raises no error."""

import os

import pytest

from utils.console import Output, _on_copy_of


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

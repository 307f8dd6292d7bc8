"""The screen: what is printed arrives as it is, and a reader who leaves ends nothing."""

import os

import pytest

from utils.console import Output, _on_copy_of


def open_pipe() -> tuple[int, Output]:
    """Where one may read, and a console that writes there."""
    reader, writer = os.pipe()
    output = _on_copy_of(writer)
    os.close(writer)
    return reader, output


def test_text_stays_as_it_is():
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

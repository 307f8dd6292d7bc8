"""Tests of how errors of other software are shortened."""

import pytest

from utils.errors import first_line, last_line


@pytest.mark.parametrize(
    ("error", "first", "last"),
    [
        (ValueError("one"), "one", "one"),
        (ValueError("\n one \n\n two \n\n"), "one ", "two"),
        (ValueError(), "ValueError", "ValueError"),
        (TimeoutError(" \n"), "TimeoutError", "TimeoutError"),
    ],
)
def test_error_is_shortened_to_a_line_that_is_never_empty(error: Exception, first: str, last: str):
    assert first_line(error) == first
    assert last_line(error) == last


def test_last_line_of_a_traceback_is_its_error():
    assert last_line("Traceback ...\n  File\nKeyError: 'a'\n") == "KeyError: 'a'"
    assert last_line("") == "no reason given"

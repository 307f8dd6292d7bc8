"""Errors of data and rows, and the limits and words that they share."""

from typing import Any

from utils.errors import AnnealError

MAX_ROW_BYTES = 8_000_000  # about two million tokens, longer than any model's context


class DataError(AnnealError):
    """A data error that stops the run; the message names the file and row, the fault and the fix."""


class RowError(ValueError):
    """A fault in one row; the caller adds the file and the row number."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind
        """Short fault name by which rejected rows are counted."""


def json_type(value: Any) -> str:
    """Return the JSON type of a value, as error messages name it."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(
        type(value), f"of type {type(value).__name__}"
    )  # Parquet also has bytes, dates and other types

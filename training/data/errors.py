"""Errors of data and rows, and the limits and words that they share."""

from collections.abc import Callable
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

    def __reduce__(self) -> tuple[type["RowError"], tuple[str, str]]:
        return RowError, (self.kind, str(self))  # pickle would call RowError(reason)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object (a hook of `json`); raise RowError if it has a key twice, of which Python would drop the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise RowError("key twice", f"has the key `{repeated[:40]}` twice in one object. Remove one of them")
    return found


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


def short(value: Any) -> str:
    """Return a value as messages show it, at most 40 characters."""
    shown = repr(value) if isinstance(value, str | int | float | None) else json_type(value)
    return shown if len(shown) <= 40 else shown[:40] + "…"


def only_one_call(name: str, count: int) -> str:
    """Return the error for a message with several calls where a template renders one.

    Args:
        name: Name of the message.
        count: Number of its calls.
    """
    return (
        f"{name} has {count} calls, but the chat template renders only one per message. Write each call in a message of its own, followed "
        "by its result"
    )


def check_text(text: Any, what: Callable[[], str] | str) -> str:
    """Return a text that can be tokenized; raise RowError if it is blank, too large or not valid Unicode.

    Args:
        text: The value.
        what: Name of the value in messages; a function if building it takes time.
    """

    def called() -> str:
        return what if isinstance(what, str) else what()

    if type(text) is not str:
        raise RowError("wrong type", f"{called()} is {json_type(text)}, not a string")
    if not text or text.isspace():
        raise RowError("empty content", f"{called()} is empty")
    if len(text) > MAX_ROW_BYTES:
        million = f"{len(text) / 1e6:.1f} million characters, above the limit of {MAX_ROW_BYTES / 1e6:.0f} million per row"
        raise RowError("too large", f"{called()} has {million}. Split long documents")
    if "\x00" in text:
        raise RowError("NUL character", f"{called()} contains a NUL character")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                "not UTF-8",
                f"{called()} contains a lone surrogate or an invalid UTF-8 byte (at character {error.start + 1})",
            ) from None
    return text

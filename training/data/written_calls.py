"""Calls in the text of an answer: JSON in <tool_call> tags (Hermes) or after <functioncall> (Glaive), and other notations in tags."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from training.data.errors import RowError
from training.data.records import Message
from training.data.rendered import Span
from training.data.tools import Tool, read_calls

Notation = Literal["json", "xml", "keys", "glaive"]
"""JSON in tags; <function=name> in tags (Qwen3.6); name and <arg_key> in tags (GLM-4.5); JSON after <functioncall>."""

_BEGIN = re.compile(
    r"<tool_call>\s*(?:(?P<json>\{)|(?P<xml><\w)|(?P<keys>[\w.-]+\s*<))|<functioncall>\s*(?P<glaive>\{)"
)
_OPENING = re.compile(r"<(tool_call|functioncall)>\s*(?=\{)")
_CLOSING = {
    "tool_call": re.compile(r"\}\s*</tool_call>"),
    "functioncall": re.compile(r"\}\s*(?:</functioncall>|<\|endoftext\|>|\Z)"),
}


@dataclass(frozen=True)
class WrittenCall:
    """A call as JSON, or as Python prints it, in a text."""

    tag: str
    text: str
    """The call without its tags."""
    place: Span
    """Place of the call with its tags."""
    begin: int
    """Place of the call's text."""


def calls_in(content: str) -> Iterator[WrittenCall]:
    """Yield the calls that stand between braces in a content. The time is linear in its length: one regular expression's is not."""
    cursor, unclosed = 0, set[str]()
    while opening := _OPENING.search(content, cursor):
        tag, begin = opening[1], opening.end()
        closing = None if tag in unclosed else _CLOSING[tag].search(content, begin)
        if closing is None:
            unclosed.add(tag)
            cursor = begin
            continue
        cursor = closing.end()
        yield WrittenCall(tag, content[begin : closing.start() + 1], (opening.start(), cursor), begin)


def notation_of(text: str) -> Notation | None:
    """Return the notation of the first call in a text, or None if it writes none."""
    if "<tool_call>" not in text and "<functioncall>" not in text:
        return None
    found = _BEGIN.search(text)
    return found.lastgroup if found else None  # pyright: ignore[reportReturnType]


def writes_calls(message: Message) -> bool:
    """Return whether an assistant message has calls in its text."""
    return (
        message["role"] == "assistant"
        and "tool_calls" not in message
        and notation_of(message["content"]) is not None
    )


def is_plain_json(content: str) -> bool:
    """Return whether all calls of a content are JSON in tags with a name and an object of arguments, as most templates write them."""
    found = list(calls_in(content))
    return len(found) == len(_BEGIN.findall(content)) and all(map(_is_plain, found))


def _is_plain(written: WrittenCall) -> bool:
    if written.tag != "tool_call":
        return False
    try:
        call = json.loads(written.text)
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(call, dict)
        and call.keys() == {"name", "arguments"}
        and isinstance(call["name"], str)
        and isinstance(call["arguments"], dict)
    )


def with_tool_calls(message: Message, tools: Sequence[Tool] | None, notes: list[str]) -> Message:
    """Return an assistant message whose text ends with calls, with them as `tool_calls`.

    Args:
        message: The message.
        tools: The row's tools.
        notes: Gets a note if calls are converted from Python.

    Raises:
        RowError: A call cannot be read, or words stand between the calls or after them, which `tool_calls` cannot say.
    """
    content = message["content"]
    found = list(calls_in(content))
    words = content[: found[0].place[0]] if found else content
    if notation_of(words):
        raise RowError("template", "a call in its text is not JSON between <tool_call> and </tool_call>")
    places = [*(place for call in found for place in call.place), len(content)]
    if any(content[end:begin].strip() for end, begin in [*pairwise(places)][1::2]):
        raise RowError(
            "template", "words stand between or after the calls in its text. Move them before the calls"
        )
    calls = [
        call
        for number, each in enumerate(found, start=1)
        for call in read_calls(each.text, f"call {number} in its text", tools, notes)
    ]
    return {**message, "content": words.rstrip(), "tool_calls": calls}

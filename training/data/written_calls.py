"""Calls in the text of an answer: JSON in <tool_call> tags (Hermes) or after <functioncall> (Glaive), and other notations in tags."""

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from training.data.errors import RowError
from training.data.records import Message
from training.data.tools import Tool, read_calls

Notation = Literal["json", "xml", "keys", "glaive"]
"""JSON in tags; <function=name> in tags (Qwen3.6); name and <arg_key> in tags (GLM-4.5); JSON after <functioncall>."""

_BEGIN = re.compile(
    r"<tool_call>\s*(?:(?P<json>\{)|(?P<xml><\w)|(?P<keys>[\w.-]+\s*<))|<functioncall>\s*(?P<glaive>\{)"
)
_CALL = re.compile(
    r"<tool_call>\s*(\{.*?\})\s*</tool_call>|<functioncall>\s*(\{.*?\})\s*(?:</functioncall>|<\|endoftext\|>|\Z)",
    re.DOTALL,
)


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
    found = list(_CALL.finditer(content))
    return len(found) == len(_BEGIN.findall(content)) and all(_is_plain(call[1]) for call in found)


def _is_plain(text: str | None) -> bool:
    try:
        call = json.loads(text or "")
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
    found = list(_CALL.finditer(content))
    words = content[: found[0].start()] if found else content
    if notation_of(words):
        raise RowError("template", "a call in its text is not JSON between <tool_call> and </tool_call>")
    places = [*(place for call in found for place in call.span()), len(content)]
    if any(content[end:begin].strip() for end, begin in [*pairwise(places)][1::2]):
        raise RowError(
            "template", "words stand between or after the calls in its text. Move them before the calls"
        )
    calls = [
        call
        for number, each in enumerate(found, start=1)
        for call in read_calls(each[1] or each[2], f"call {number} in its text", tools, notes)
    ]
    return {**message, "content": words.rstrip(), "tool_calls": calls}

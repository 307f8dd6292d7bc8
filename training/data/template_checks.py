"""Checks that every text of a row reaches the rendering: templates skip what they do not read, without an error."""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from training.data.errors import RowError, only_one_call
from training.data.records import Message
from training.data.template_forms import thought_of

DROPPED_TEXT = "dropped text"
OTHER_CONTEXT = "other context"
TEMPLATE_KINDS = {"template", DROPPED_TEXT, OTHER_CONTEXT}
"""Faults of rows that another chat template would render."""
_ARGUMENT = "an argument of a tool call"
_TOOLS = "`tools`"
_NUMBER = re.compile(r"message (\d+)")
# Templates print the types of JSON schemas in their own spelling.
_TYPES = {"function", "object", "string", "number", "integer", "boolean", "array", "null"}


def check_answer(text: str, message: Message, name: str) -> None:
    """Check that a rendered text contains every part of an assistant message, without overlaps.

    Args:
        text: The rendered text.
        message: The message.
        name: Name of the message in errors.
    """
    reasoning, content = thought_of(message)
    drops = f"{name}: the chat template drops"
    if reasoning:
        _strike(text, [(f"{drops} reasoning", reasoning)])
        text = text.partition(reasoning.strip())[2]  # the answer follows
    parts = [(f"{drops} content", content)]
    calls = message.get("tool_calls", ())
    for call in calls:
        arguments = call["function"]["arguments"]
        if arguments and repr(arguments) in text and json.dumps(arguments, ensure_ascii=False) not in text:
            raise RowError(
                "template",
                f"{name}: the chat template prints the arguments of a tool call as Python, not as JSON. Set chat_template",
            )
        parts += _parts_of(call, drops)
    try:
        _strike(text, parts)
    except RowError:
        if len(calls) > 1 and _is_only_first(text, calls):
            raise RowError(DROPPED_TEXT, only_one_call(name, len(calls))) from None
        raise


def _parts_of(call: dict[str, Any], drops: str) -> list[tuple[str, str]]:
    """Return the texts of a call that its rendering must have, with the error for each."""
    function = call["function"]
    leaves = [(f"{drops} {_ARGUMENT}", leaf) for leaf in _leaves(function["arguments"])]
    return [(f"{drops} the name of a tool call", function["name"]), *leaves]


def _is_only_first(text: str, calls: Sequence[dict[str, Any]]) -> bool:
    """Return whether a text has the first of several calls, and no other."""
    try:
        rest = _strike(text, _parts_of(calls[0], ""))
    except RowError:
        return False
    return not any(call["function"]["name"] in rest for call in calls[1:])


def check_parts(text: str, messages: Sequence[Message]) -> None:
    """Check that a template reads lists of parts and does not print them."""
    for index, message in enumerate(messages):
        content = message["content"]
        if isinstance(content, list) and any(
            str(part) in text or json.dumps(part, ensure_ascii=False) in text for part in content
        ):
            raise RowError(
                "template", f"message {index + 1}: the chat template reads content only as a string"
            )


def check_tools(text: str, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> None:
    """Check that the names of tools stand in a prompt, beside the contents and calls of its messages."""
    if not tools:
        return
    parts = [("", name) for message in messages for name in _called_names(message)]
    text = _strike(text, [*(("", content) for content in _contents_of(messages)), *parts])
    functions = [tool.get("function", tool) for tool in tools]
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    _strike(
        text, [(f"{_TOOLS}: the chat template drops a tool", name) for name in names if isinstance(name, str)]
    )


def _called_names(message: Message) -> list[str]:
    return [call["function"]["name"] for call in message.get("tool_calls", ())]


def check_context(text: str, messages: Sequence[Message], names: Sequence[str]) -> None:
    """Check that the contents of messages stand in a prompt. Templates may remove the reasoning of earlier turns.

    Args:
        text: The prompt.
        messages: The messages.
        names: Name of each message in errors.
    """
    reasons = [f"{name}: the chat template drops content" for name in names]
    _strike(text, list(zip(reasons, _contents_of(messages), strict=True)))


def _contents_of(messages: Sequence[Message]) -> list[str]:
    return [
        thought_of(message)[1] if message["role"] == "assistant" else message["content"]
        for message in messages
    ]


def drops_tool_texts(text: str, tools: Sequence[dict[str, Any]]) -> bool:
    """Return whether a string of a tool's schema, other than the names of types, does not stand in a text."""
    leaves = (leaf for tool in tools for leaf in _leaves(tool, keys=False) if leaf.lower() not in _TYPES)
    return any(not any(spelling in text for spelling in _spellings(leaf)) for leaf in leaves)


def clearest(errors: list[RowError]) -> RowError:
    """Return the error to report when no form of a row can be rendered.

    It is one that names a text, of the form in which most messages are rendered, or else one of a form that the template reads, or
    else the first.
    """
    dropped = [error for error in errors if error.kind == DROPPED_TEXT]
    read = [error for error in errors if error.kind == OTHER_CONTEXT]
    return max(dropped, key=_message_of) if dropped else [*read, *errors][0]


def _message_of(error: RowError) -> int:
    if str(error).startswith(_TOOLS):
        return sys.maxsize  # checked once all messages are rendered
    found = _NUMBER.match(str(error))
    return int(found[1]) if found else 0


def _strike(text: str, parts: Sequence[tuple[str, str]]) -> str:
    """Remove parts from a text, as written or as JSON strings; raise RowError for one that has no place of its own.

    Args:
        text: The text.
        parts: (reason of the error, part), in their usual order; some templates move system messages and calls.

    Returns:
        The text without the parts.
    """
    parts = [(reason, part.strip()) for reason, part in parts if part.strip()]
    rest, cursor = [], 0
    for reason, part in parts:
        places = ((text.find(spelling, cursor), len(spelling)) for spelling in _spellings(part, reason))
        place, length = next((found for found in places if found[0] >= 0), (-1, 0))
        if place < 0:
            break
        rest.append(text[cursor:place])
        cursor = place + length
    else:
        return "\0".join([*rest, text[cursor:]])
    for reason, part in sorted(parts, key=lambda entry: -len(entry[1])):
        spelling = next((spelling for spelling in _spellings(part, reason) if spelling in text), None)
        if spelling is None:
            # Reasoning may stand in a column, too; the content of a message does not.
            is_column = reason.startswith((_TOOLS, "the system column")) or reason.endswith("reasoning")
            how = " (ignore_columns excludes a column)" if is_column else ""
            raise RowError(
                DROPPED_TEXT,
                f"{reason} ({_shown(part)}). Remove it{how}, use a model whose template renders it, or set chat_template",
            )
        text = text.replace(spelling, "\0", 1)
    return text


def _spellings(part: str, reason: str = "") -> Iterator[str]:
    """Yield how templates write a text: as it is, as a JSON string, or, of an argument, as Python writes it in single quotes (LFM2)."""
    yield part
    escaped = json.dumps(part, ensure_ascii=False)[1:-1]
    if escaped != part or not part.isascii():
        yield escaped
        yield json.dumps(part)[1:-1]
    if reason.endswith(_ARGUMENT):
        quoted = part.replace("\\", "\\\\").replace("'", "\\'")
        yield quoted.replace("\n", "\\n").replace("\r", "\\r")


def _leaves(value: Any, *, keys: bool = True) -> Iterator[str]:
    """Yield the texts inside JSON: strings, numbers and, if asked for, keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)
    elif isinstance(value, dict):
        for key, entry in value.items():
            if keys:
                yield key
            yield from _leaves(entry, keys=keys)
    elif isinstance(value, list):
        for entry in value:
            yield from _leaves(entry, keys=keys)


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 40 else line[:40] + "…")

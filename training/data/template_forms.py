"""Forms of messages: chat templates read reasoning, calls and content under different keys and in different shapes."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from training.data.records import Chat, Message
from utils.files import checksum_bytes

_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>(.*)", re.DOTALL)
_ID_CHARACTERS = 9  # Mistral's templates reject other ids


@dataclass(frozen=True)
class Form:
    """How messages are handed to a template: templates read different keys."""

    reasoning: str | None = None
    """Key of a turn's reasoning; None: inside the content, as written."""
    arguments_as_text: bool = False
    """True to hand over the arguments of calls as JSON text."""
    short_ids: bool = False
    """True to replace the ids of calls with nine characters."""
    null_content: bool = False
    """True to hand over no content beside calls."""
    parts: bool = False
    """True to hand over content as a list of text parts."""


def answers_of(messages: Sequence[Message]) -> list[int]:
    """Return the indices of the assistant messages."""
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _has_calls(messages: Sequence[Message]) -> bool:
    return any("tool_calls" in message for message in messages)


def _has_reasoning(messages: Sequence[Message]) -> bool:
    return any("reasoning_content" in message for message in messages)


def _is_thought(message: Message) -> bool:
    """Return whether a turn's content holds its reasoning before its answer, as models write it."""
    return (
        message["role"] == "assistant" and "</think>" in message["content"] and thought_of(message)[0] != ""
    )


def features_of(chat: Chat) -> tuple[bool, ...]:
    """Return the features of a chat that a form depends on."""
    return (
        bool(chat.tools),
        _has_calls(chat.messages),
        _has_reasoning(chat.messages),
        any(map(_is_thought, chat.messages)),
    )


def thought_of(message: Message) -> tuple[str, str]:
    """Return (reasoning, content) of an assistant turn; both texts are stripped of the tags around the reasoning."""
    if "reasoning_content" in message:
        return message["reasoning_content"], message["content"]
    found = _THOUGHT.fullmatch(message["content"]) if "</think>" in message["content"] else None
    if found and (found[2].strip() or "tool_calls" in message):
        return found[1].strip(), found[2]
    return "", message["content"]


def adapted(message: Message, form: Form, number: int) -> Message:
    """Return a message in the form that a template reads."""
    if form == Form() and "reasoning_content" not in message:
        return message
    changed = {key: value for key, value in message.items() if key != "reasoning_content"}
    reasoning, content = thought_of(message) if message["role"] == "assistant" else ("", message["content"])
    if reasoning and form.reasoning:
        content = content if "reasoning_content" in message else content.lstrip()
        changed |= {form.reasoning: reasoning, "content": content}
    elif "reasoning_content" in message:
        changed["content"] = f"<think>\n{reasoning.strip()}\n</think>\n\n{content}"
    if form.parts:
        changed["content"] = [{"type": "text", "text": changed["content"]}]
    if "tool_calls" in message:
        changed["tool_calls"] = [
            _adapted_call(call, form, f"{number} {place}") for place, call in enumerate(message["tool_calls"])
        ]
        if form.null_content and not message["content"].strip():
            changed["content"] = None
    if form.short_ids and "tool_call_id" in message:
        changed["tool_call_id"] = _short_id(message["tool_call_id"])
    return changed


def _adapted_call(call: dict[str, Any], form: Form, place: str) -> dict[str, Any]:
    function = call["function"]
    if form.arguments_as_text:
        function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    ids = {"id": _short_id(call.get("id", place))} if form.short_ids else {}
    return {**call, "function": function, **ids}


def _short_id(text: str) -> str:
    """Return an id of nine letters and digits."""
    if len(text) == _ID_CHARACTERS and text.isascii() and text.isalnum():
        return text
    return checksum_bytes(text.encode()).removeprefix("crc64nvme:")[:_ID_CHARACTERS]


def possible_forms(chat: Chat, template: str) -> Iterator[Form]:
    """Yield the forms of a chat, the usual one first."""
    calls, reasons = _has_calls(chat.messages), _has_reasoning(chat.messages)
    reasoning: tuple[str | None, ...] = (None,)
    if reasons:
        reasoning = (*_REASONING_KEYS, None) if "</think>" in template else _REASONING_KEYS
    elif any(_is_thought(message) for message in chat.messages):
        reasoning = (*_REASONING_KEYS, None)
    either = (False, True)
    for parts, null, ids, text, key in product(
        either,
        either if calls else (False,),
        either if calls else (False,),
        either if calls else (False,),
        reasoning,
    ):
        yield Form(key, text, ids, null, parts)

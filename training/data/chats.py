"""Chats: validate messages, and convert the spellings of other tools into OpenAI's chat format."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from training.data.errors import RowError, check_text, json_type, short
from training.data.flags import IN_LOSS, OUT_OF_LOSS, flag_of, is_in_loss, is_quality_tag
from training.data.records import REASONING_KEYS, Chat, Message
from training.data.template_forms import split_thought
from training.data.tools import (
    Tool,
    as_function,
    check_json,
    parse_printed,
    python_value,
    read_calls,
    read_tools,
    without_foreign_nulls,
)
from training.data.written_calls import calls_in

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "tool_result": "tool",
    "function_result": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
_SYSTEM = ("system", "developer")
_CONTENTS = ("content", "value", "text")
"""Names of a message's content."""
_TEXT_AND_CALLS = (
    *("role", "from", "content", "value", "text", "name"),
    *("tool_call_id", "tool_calls", "function_call", "functions", "tools"),
)
_FORMS_OF_PARTS = {
    "tool_use": "Write calls as `tool_calls` of the message: name, arguments and id",
    "tool_result": "Write results as messages with the role tool: content and tool_call_id",
}
"""Type of Anthropic's parts -> how a row says the same."""
_CHANNELS = ("analysis", "commentary", "final")  # of gpt-oss
_REASONING = (*REASONING_KEYS, "thought", "tool_plan", "reasoning_details")
"""Keys of a message that hold its reasoning."""
_KNOWN = {*_TEXT_AND_CALLS, *_REASONING, *IN_LOSS, *OUT_OF_LOSS}
# Calls that a model writes as text: Hermes, Granite, Glaive, ToolACE's [name(key=value)].
_WRITTEN_CALL = re.compile(r"tool_call|<functioncall>|\[\s*[\w][\w .:/-]*\(")
_WRITTEN_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_MEDIA = re.compile(
    r"((image|img|audio|video)s?(_(url|path|file)s?)?|file(_url)?s?|input_(image|audio|file)|pixel_values)"
)


@dataclass
class _Reading:
    """The messages of a chat read so far."""

    tools: list[Tool] | None
    messages: list[Message] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    """Position of each message in the row; several may have been merged into it."""
    untrained: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    """Parts that were changed or not used, as counted in the plan."""
    texts: list[str] = field(default_factory=list)
    """Contents merged into the last message, joined once it is complete: joining each time takes quadratic time."""
    thoughts: list[str] = field(default_factory=list)
    """Reasoning of the last message, likewise."""


def read_chat(
    values: Any, what: str, tools: list[Tool] | None, *, system: str | list[Any] | None = None
) -> Chat:
    """Validate a list of messages.

    Args:
        values: The messages, or their JSON text (CSV and some Parquet files).
        what: Name of the column in messages.
        tools: The row's tools.
        system: Text or text parts of a system column beside the messages.

    Raises:
        RowError: The messages cannot be trained on.
    """
    messages = listed(values, what)
    if system is None and _is_usual(messages) and not (tools and "<tools>" in messages[0]["content"]):
        for position, message in enumerate(messages, start=1):
            check_text(
                message["content"], lambda position=position, role=message["role"]: _at(position, role)
            )
        return Chat(messages, tools)
    reading = _read_messages(messages, tools)
    _add_system(system, reading)
    _cut(reading)
    if reading.tools and _lists_tools(reading.messages[0], reading.tools):
        reading.tools = None
        reading.notes.append("the system message lists the tools, so the column `tools` is not used")
    return Chat(
        reading.messages,
        reading.tools,
        tuple(sorted(reading.untrained)),
        notes=tuple(reading.notes),
        numbers=tuple(reading.numbers),
    )


def read_question(values: Any, tools: list[Tool] | None) -> Chat:
    """Validate messages that ask for an answer, by the rules of `read_chat`; none of them is removed.

    Args:
        values: The messages.
        tools: The tools that the answer may call.

    Raises:
        RowError: The messages cannot be rendered.
    """
    reading = _read_messages(listed(values, "messages"), tools)
    return Chat(reading.messages, reading.tools, notes=tuple(reading.notes))


def _read_messages(messages: list[Any], tools: list[Tool] | None) -> _Reading:
    reading = _Reading(tools)
    for position, value in enumerate(messages, start=1):
        _append(_read_message(value, position, reading), position, reading)
    _join_texts(reading)
    if reading.messages and _is_thought_alone(reading.messages[-1]):
        raise RowError("role order", _no_answer(len(messages)))
    return reading


def listed(value: Any, what: str) -> list[Any]:
    """Return a list of messages; CSV and some Parquet files store it as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_printed(value, what)
    if not isinstance(value, list | tuple):
        raise RowError("wrong type", f"{what} is {json_type(value)}, not a list of messages")
    if not value:
        raise RowError("empty content", f"{what} is an empty list")
    return list(value)


def turns_of(values: list[Any]) -> list[Any]:
    """Return the messages of a chat column whose entries are texts (LIMA) or exchanges of `input` and `output` (Capybara, XTuner).

    Entries may also be messages as JSON texts, which tables have for messages of different types.
    """
    if values and all(isinstance(value, str) and value.lstrip().startswith("{") for value in values):
        values = [_message_of(value) for value in values]
    if len(values) > 1 and all(isinstance(value, str) for value in values):
        roles = ("user", "assistant")
        return [{"role": roles[number % 2], "content": text} for number, text in enumerate(values)]
    if not all(isinstance(value, dict) and {"input", "output"} <= value.keys() for value in values):
        return values
    messages: list[Any] = []
    for value in values:
        others = {key: entry for key, entry in value.items() if key not in ("system", "input", "output")}
        if value.get("system"):
            messages.append({"role": "system", "content": value["system"]})
        messages.append({"role": "user", "content": value["input"]})
        messages.append({"role": "assistant", "content": value["output"], **others})
    return messages


def _message_of(text: str) -> Any:
    """Return the message that a text holds as JSON, or the text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if is_message(value) else text


def written_turns(text: str) -> list[Message]:
    """Return the messages of a text in the form of HH-RLHF, without an empty answer at its end; empty for another text."""
    if not text.startswith("\n\nHuman:"):
        return []
    _, *parts = _WRITTEN_TURN.split(text)
    roles = ["user" if name == "Human" else "assistant" for name in parts[::2]]
    messages = [{"role": role, "content": content} for role, content in zip(roles, parts[1::2], strict=True)]
    return messages[:-1] if roles[-1] == "assistant" and not messages[-1]["content"].strip() else messages


def _is_usual(messages: list[Any]) -> bool:
    """Return whether messages have only a role and a text, and roles alternate; most rows do, and need nothing else."""
    expected = "user"
    for position, message in enumerate(messages):
        if type(message) is not dict or len(message) != 2 or type(message.get("content")) is not str:
            return False
        if message["content"].isspace() or not message["content"] or "<tool_call>" in message["content"]:
            return False
        role = message.get("role")
        if role != expected and not (position == 0 and role == "system"):
            return False
        if role == expected:
            expected = "assistant" if expected == "user" else "user"
    return expected == "user" and len(messages) > 1


def _at(position: int, role: str) -> str:
    return f"message {position} ({role})"


def _read_message(value: Any, position: int, reading: _Reading) -> Message:
    if not isinstance(value, dict):
        raise RowError("wrong type", f"message {position} is not an object with role and content")
    name = _written_role(value)
    role = _ROLES.get(name)
    if role is None:
        keys = ", ".join(map(str, list(value)[:6])) or "none"
        said = value.get("role") or value.get("from")
        raise RowError(
            "unknown role",
            f"message {position} has the role {short(said)} (keys found: {keys}). Known roles: {', '.join(_ROLES)}",
        )
    at = _at(position, role)
    _check_written_once(value, at)
    message: Message = {"role": role}
    content = _written_content(value)
    given = [key for key in ("tool_calls", "function_call") if _calls_something(value.get(key))]
    if len(given) == 2:
        raise RowError("two calls", f"{at} has both `tool_calls` and `function_call`. Remove one of them")
    calls = value[given[0]] if given else None
    if name in ("function_call", "tool_call") and not calls:
        calls, content = content, ""
    message["content"], thought = _content_of(content, role, at, reading.notes)
    if role == "assistant" and "<tool_call>" in message["content"]:
        message["content"] = _with_json_calls(message["content"], at, reading)
    reasoning = _reasoning_of(value, thought, role, at, reading)
    if reasoning:
        message["content"] = _without_thought(message["content"], reasoning, at)
        message["reasoning_content"] = reasoning
    for key in ("name", "tool_call_id"):
        if value.get(key):
            message[key] = check_text(value[key], lambda key=key: f"{at}: `{key}`")
    if calls:
        if role != "assistant":
            raise RowError("role order", f"{at} has tool_calls, which only assistant messages may have")
        message["tool_calls"] = read_calls(
            calls, f"message {position}: tool call", reading.tools, reading.notes
        )
    _read_functions(value, at, reading)
    if role == "assistant" and not is_in_loss(value, at):
        reading.untrained.add(len(reading.messages))
    if role != "assistant" and any(flag_of(value.get(key)) for key in IN_LOSS):
        reading.notes.append(
            f"the weight of {role} messages is not used: only assistant messages are in the loss"
        )
    _note_unread(value, role, at, reading)
    if role == "assistant" and isinstance(value.get("channel"), str):
        message = _of_channel(message, value, at)
    is_empty = not message["content"].strip()
    if is_empty and "reasoning_content" in message and "tool_calls" not in message:
        return {**message, "content": ""}  # the answer follows as another message
    if is_empty and "tool_calls" not in message and role not in (*_SYSTEM, "tool"):
        unread = [key for key in value if key not in _KNOWN and value[key]]
        keys = f" (keys found: {', '.join(value)})" if unread and content is None else ""
        raise RowError("empty content", f"{at} is empty{keys}. Write its content, or remove the message")
    return message


def _with_json_calls(content: str, at: str, reading: _Reading) -> str:
    """Return a content whose calls are JSON: some rows of Hermes have them as Python prints a dictionary."""

    parts, cursor = [], 0
    for written in calls_in(content):
        try:
            json.loads(written.text)
        except (ValueError, RecursionError):
            call = python_value(written.text)
            if call is None or written.tag != "tool_call":
                continue  # another notation, such as Qwen3 Coder's
            check_json(call, f"{at}: <tool_call>")
            reading.notes.append("calls that are written as Python are converted to JSON")
            parts += [content[cursor : written.begin], json.dumps(call, ensure_ascii=False)]
            cursor = written.begin + len(written.text)
    return "".join([*parts, content[cursor:]])


def _of_channel(message: Message, value: dict[str, Any], at: str) -> Message:
    """Return an assistant message of a channel of gpt-oss: its analysis is the reasoning of the message that follows."""
    channel, recipient = value["channel"], value.get("recipient")
    is_call = "tool_calls" in message
    if recipient not in (None, "", "all", "user") and not is_call:
        raise RowError(
            "unsupported content",
            f"{at} is a call (recipient: {short(recipient)}). Write it under `tool_calls`",
        )
    if channel == "commentary" and not is_call:
        raise RowError(
            "unsupported content",
            f"{at} has channel: commentary without a call, which no template renders. Put its text beside the call, or remove it",
        )
    if channel != "analysis" or is_call or not message["content"].strip():
        return message
    if "reasoning_content" in message:
        raise RowError("two reasonings", f"{at} has channel: analysis and reasoning. Keep one of them")
    return {"role": "assistant", "content": "", "reasoning_content": message["content"]}


def _written_role(message: dict[str, Any]) -> str:
    """Return the role as a row writes it, in the spelling of the table of roles; empty if it is no text."""
    return _role_name(message.get("role") or message.get("from"))


def _role_name(said: Any) -> str:
    return said.strip().lower().replace("-", "_") if isinstance(said, str) else ""


def _written_content(message: dict[str, Any]) -> Any:
    """Return a message's content under one of its names, or None; a refusal of OpenAI's API is an answer's content."""
    given = [message[key] for key in (*_CONTENTS, "refusal") if message.get(key) is not None]
    return next((content for content in given if content not in ("", [])), given[0] if given else None)


def _check_written_once(message: dict[str, Any], at: str) -> None:
    """Reject a message that says its role or its content twice, differently."""
    contents = [key for key in _CONTENTS if message.get(key) not in (None, "", [])]
    if any(message[key] != message[contents[0]] for key in contents[1:]):
        raise RowError(
            "two contents",
            f"{at} has different values in {' and '.join(f'`{key}`' for key in contents)}. Remove one of them",
        )
    roles = [_ROLES.get(_role_name(message[key])) for key in ("role", "from") if message.get(key)]
    if len(roles) == 2 and roles[0] != roles[1]:
        raise RowError(
            "two roles",
            f"{at} has the role {short(message['role'])}, but is from {short(message['from'])}. Remove one of them",
        )


def _calls_something(calls: Any) -> bool:
    """Return whether a value holds calls; Arrow fills absent ones with nulls, and tables have texts."""
    if isinstance(calls, dict):
        return any(value is not None for value in calls.values())
    return bool(calls) and calls not in ("null", "[]", "{}")


def _content_of(content: Any, role: str, at: str, notes: list[str]) -> tuple[str, str]:
    """Return (text, reasoning) of a message's content: a string, text parts, or the result of a tool."""
    if content is None or (content == [] and role != "tool"):
        return "", ""
    if isinstance(content, str):
        if content.strip():
            check_text(content, lambda: at)
        return content, ""
    if role == "tool":
        check_json(content, at)
        given, content = content, without_foreign_nulls(content, at)
        if content != given:
            notes.append("null entries of objects in results of tools are removed")
    elif isinstance(content, list | tuple):
        content = [_part_of(part) for part in content]
    is_parts = (
        isinstance(content, list | tuple)
        and bool(content)
        and all(isinstance(part, dict) and "type" in part for part in content)
    )
    kinds = {str(part["type"]) for part in content} if is_parts else set()
    # Results of tools are any JSON: objects with a `type` need not be parts of a message.
    if is_parts and (role != "tool" or kinds == {"text"} or any(map(_MEDIA.fullmatch, kinds))):
        return _join_parts(content, at, notes)
    if role == "tool":
        return json.dumps(content, ensure_ascii=False), ""
    raise RowError(
        "wrong type", f"{at}: content is {json_type(content)}, not a string or a list of text parts"
    )


def _part_of(part: Any) -> Any:
    """Return a text, or a text without a type, as a text part; Arrow fills in nulls for the keys of other parts."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        return part
    keys = {key for key, value in part.items() if value is not None}
    return {"type": "text", "text": part["text"]} if keys == {"text"} else part


def _join_parts(parts: Any, at: str, notes: list[str]) -> tuple[str, str]:
    texts, thoughts = [], []
    for part in parts:
        kind = part["type"]
        unread = [key for key, entry in part.items() if key not in ("type", "text", kind) and entry]
        is_text = kind in ("text", "input_text", "output_text")
        for key in unread:
            if is_text and key not in ("annotations", "cache_control"):
                raise RowError(
                    "unsupported content", f"{at} has a text part with `{key}`. Only text is supported"
                )
            notes.append(f"`{key}` of {'text' if is_text else kind} parts is not used")
        if is_text:
            text = part.get("text")
            is_blank = isinstance(text, str) and not text.strip()
            texts.append(text if is_blank else check_text(text, f"{at}: text part"))
        elif kind in ("thinking", "reasoning"):
            if part.get(kind) and part.get("text") and part[kind] != part["text"]:
                raise RowError(
                    "two reasonings",
                    f"{at} has a {kind} part with different texts in `{kind}` and `text`. Keep one of them",
                )
            thought = part.get(kind) or part.get("text") or part.get(kind)
            if isinstance(thought, list | tuple):  # of text parts, as in mistral_common's ThinkChunk
                thought = "".join(_content_of(thought, "assistant", f"{at}: {kind} part", notes))
            if not isinstance(thought, str) or thought.strip():  # APIs may return a signature alone
                thoughts.append(check_text(thought, f"{at}: {kind} part"))
        else:
            advice = _FORMS_OF_PARTS.get(kind, "Only text is supported")
            raise RowError("unsupported content", f"{at} has a part of type {short(kind)}. {advice}")
    return "".join(texts), "\n".join(thoughts)


def _reasoning_of(value: dict[str, Any], thought: str, role: str, at: str, reading: _Reading) -> str:
    if value.get("reasoning_details"):
        value = {**value, "reasoning_details": _text_of_details(value, at, reading.notes)}
    given = [key for key in _REASONING if value.get(key) is not None and str(value[key]).strip()]
    texts = {check_text(value[key], lambda key=key: f"{at}: `{key}`") for key in given} | ({thought} - {""})
    if len(texts) > 1:
        raise RowError(
            "two reasonings",
            f"{at} has different texts in {' and '.join([f'`{key}`' for key in given] + ['a thinking part'] * bool(thought))}. Keep one of them",
        )
    if texts and role != "assistant":
        raise RowError("role order", f"{at} has reasoning, which only assistant messages may have")
    return next(iter(texts), "")


def _text_of_details(value: dict[str, Any], at: str, notes: list[str]) -> str:
    """Return the text of `reasoning_details` (OpenRouter); empty if it holds only other details of reasoning that stands under its key."""
    details = value["reasoning_details"]
    if not isinstance(details, list | tuple):
        raise RowError("wrong type", f"{at}: `reasoning_details` is {json_type(details)}, not a list")
    parts = [part for part in details if isinstance(part, dict)]
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    unread = {
        key: True for part in parts for key, entry in part.items() if key not in ("type", "text") and entry
    }
    if len(texts) == len(details) or any(value.get(key) for key in _REASONING if key != "reasoning_details"):
        notes += [f"`{key}` of `reasoning_details` is not used" for key in unread]
        return "".join(texts)
    raise RowError(
        "unsupported content",
        f"{at} has `reasoning_details` without plain text. Write the reasoning as `reasoning_content`, or remove the key",
    )


def _without_thought(content: str, reasoning: str, at: str) -> str:
    """Return the content of a message with reasoning, without the same reasoning in tags."""
    own, rest = split_thought(content)
    if rest == content:
        return content
    if own not in ("", reasoning.strip()):
        raise RowError(
            "two reasonings", f"{at} has another text in <think> than under its key. Keep one of them"
        )
    return rest.lstrip()


def _read_functions(value: dict[str, Any], at: str, reading: _Reading) -> None:
    """Read the tools that a system message brings (Qwen-Agent, Glaive)."""
    for key in ("functions", "tools"):
        if not value.get(key):
            continue
        found = read_tools(value[key], f"{at}: `{key}`", wrap=True)
        if not reading.tools:
            reading.tools = found
        elif found != [as_function(tool) for tool in reading.tools]:
            raise RowError(
                "two tool lists", f"{at} has `{key}`, but the row has other tools already. Keep one of them"
            )


def _note_unread(value: dict[str, Any], role: str, at: str, reading: _Reading) -> None:
    for key, content in value.items():
        if key == "refusal" and not any(value.get(name) for name in _CONTENTS):
            continue
        if key in _KNOWN or content is None or content in ("", [], {}):
            continue
        if key in ("channel", "recipient") and role == "assistant" and value.get("channel") in _CHANNELS:
            continue
        if _MEDIA.fullmatch(key):
            raise RowError("unsupported content", f"{at} has `{key}`. Only text is supported")
        if key == "train_detail":
            raise RowError(
                "wrong weight",
                f"{at} has `train_detail`, which puts parts of a message in the loss. A message is in the loss or not: use weight: 0 or 1",
            )
        if is_quality_tag(key, content):
            raise RowError(
                "quality tag",
                f"{at} has `{key}` ({short(content)}), which says how good the message is, but only a column rates an answer, with "
                "preference_tuning_config: {loss: kto}. Remove the bad messages and the key, exclude them with weight: 0, or write the column",
            )
        reading.notes.append(f"`{key}` of messages is not used")


def _append(message: Message, position: int, reading: _Reading) -> None:
    """Add a message; merge it with the previous one if both are plain texts of one role."""
    role, messages = message["role"], reading.messages
    if role in _SYSTEM and not message["content"].strip():
        return
    previous = messages[-1] if messages else None
    if previous is not None and _is_thought_alone(previous):
        _add_thought(message, position, reading)
        return
    if previous is None or role != previous["role"] or role == "tool":
        _join_texts(reading)
        if role == "tool" and not _follows_a_call(messages):
            raise RowError(
                "role order",
                f"message {position}: a tool message must follow an assistant message with tool_calls, but none precedes it",
            )
        messages.append(message)
        reading.numbers.append(position)
        return
    _merge(message, position, reading)


def _merge(message: Message, position: int, reading: _Reading) -> None:
    """Merge a message into the previous one of its role: texts, or calls without a text; reject others."""
    previous, role = reading.messages[-1], message["role"]
    is_calls = message.keys() == {"role", "content", "tool_calls"}
    adds_calls = is_calls and not message["content"]
    others = sorted((message.keys() | previous.keys()) - {"role", "content"})
    if adds_calls and ("tool_calls" not in previous or previous.keys() == message.keys()):
        others = []
    is_untrained = {len(reading.messages) - 1 + step in reading.untrained for step in (0, 1)}
    if others or len(is_untrained) > 1:
        cause = f"of `{others[0]}`" if others else "only one of them is in the loss"
        fix = "Write them as one message" if others else "Give both the same weight"
        raise RowError(
            "role order",
            f"messages {position - 1} and {position} are both from the {role} and cannot be merged, because {cause}. {fix}, or put a "
            "message of another role between them",
        )
    reading.untrained.discard(len(reading.messages))
    if not adds_calls:
        reading.texts = reading.texts or [previous["content"]]
        reading.texts.append(message["content"])
        reading.notes.append(f"consecutive {role} messages are merged")
    elif "tool_calls" in previous:
        previous["tool_calls"] += message["tool_calls"]
        reading.notes.append("consecutive calls are merged into one message")
    else:
        previous["tool_calls"] = message["tool_calls"]
        reading.notes.append("consecutive assistant messages are merged")


def _join_texts(reading: _Reading) -> None:
    """Join the texts that were merged into the last message."""
    if reading.texts:
        reading.messages[-1]["content"] = "\n\n".join(reading.texts)
        reading.texts = []


def _is_thought_alone(message: Message) -> bool:
    """Return whether a message is reasoning whose answer is the next message, such as an analysis of gpt-oss."""
    return "reasoning_content" in message and not message["content"] and "tool_calls" not in message


def _add_thought(message: Message, position: int, reading: _Reading) -> None:
    """Add a message with the reasoning of the message before it."""
    previous = reading.messages[-1]
    if message["role"] != "assistant":
        raise RowError("role order", _no_answer(position - 1))
    if len(reading.untrained & {len(reading.messages) - 1, len(reading.messages)}) == 1:
        raise RowError(
            "wrong weight",
            f"only one of messages {position - 1} and {position} is in the loss, but they are one turn. Give both the same weight",
        )
    reading.untrained.discard(len(reading.messages))
    reading.thoughts = reading.thoughts or [previous["reasoning_content"]]
    own = message.get("reasoning_content")
    if _is_thought_alone(message):
        reading.thoughts += [message["reasoning_content"]] if reading.thoughts != [own] else []
        return
    thought, reading.thoughts = "\n\n".join(reading.thoughts), []
    if own not in (None, thought):
        raise RowError(
            "two reasonings",
            f"messages {position - 1} and {position} have different reasoning. Write it in one message",
        )
    previous |= {**message, "reasoning_content": thought}


def _no_answer(position: int) -> str:
    return (
        f"message {position} has only reasoning (under its key, or with channel: analysis), but no message of the assistant follows it. "
        "Add its answer, or remove it"
    )


def _follows_a_call(messages: list[Message]) -> bool:
    previous = messages[-1] if messages else {"role": ""}
    if previous["role"] == "tool":
        return True  # it follows one itself
    return previous["role"] == "assistant" and (
        "tool_calls" in previous or _WRITTEN_CALL.search(previous["content"]) is not None
    )


def _add_system(content: str | list[Any] | None, reading: _Reading) -> None:
    system = _content_of(content, "system", "the system column", reading.notes)[0]
    if not system.strip():
        return
    first = reading.messages[0]
    if first["role"] in _SYSTEM and first["content"].strip() == system.strip():
        return
    if first["role"] == "system":
        raise RowError(
            "two system texts", "has a system column and another system message. Remove one of them"
        )
    reading.messages.insert(0, {"role": "system", "content": system})
    reading.numbers.insert(0, 0)
    reading.untrained = {index + 1 for index in reading.untrained}


def _lists_tools(message: Message, tools: list[Tool]) -> bool:
    """Return whether a system message lists all tools itself, as those of Hermes do; a template would list them again."""
    text = message["content"]
    if message["role"] not in _SYSTEM or "<tools>" not in text:
        return False
    functions = [tool.get("function", tool) for tool in tools]
    return all(isinstance(function, dict) and str(function.get("name")) in text for function in functions)


def _cut(reading: _Reading) -> None:
    """Remove messages after the last answer."""
    messages = reading.messages
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("nothing trained", "has no assistant message, so it has no loss tokens")
    while messages[-1]["role"] != "assistant":
        reading.notes.append(f"{messages.pop()['role']} messages after the last answer are removed")


def mask_messages(messages: list[Any], mask: Any, what: str) -> list[Any]:
    """Apply a loss mask to messages as they are written; it has one entry per message or per assistant message.

    Args:
        messages: The messages.
        mask: A list in which 0 or false excludes a turn from the loss, or its JSON text.
        what: Name of the mask's column in messages.
    """
    if isinstance(mask, str):
        mask = parse_printed(mask, what)
    answers = [index for index, message in enumerate(messages) if is_answer(message)]
    if not isinstance(mask, list | tuple) or any(flag not in (0, 1) for flag in mask):
        raise RowError("wrong weight", f"{what} is not a list of 0 and 1")
    if len(mask) == len(messages):
        mask = [mask[index] for index in answers]
    if len(mask) != len(answers):
        raise RowError(
            "wrong weight",
            f"{what} has {len(mask)} entries for {len(answers)} assistant messages. Write one entry for each of them",
        )
    excluded = {index for index, flag in zip(answers, mask, strict=True) if not flag}
    return [
        {**message, "weight": 0} if index in excluded else message for index, message in enumerate(messages)
    ]


def as_context(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message that is not in the loss, unless it says itself whether it is."""
    is_judged = any(message.get(key) is not None for key in (*IN_LOSS, *OUT_OF_LOSS))
    return message if is_judged else {**message, "weight": 0}


def is_answer(message: Any) -> bool:
    """Return whether a value is a message of the assistant, in any of its spellings."""
    return isinstance(message, dict) and _ROLES.get(_written_role(message)) == "assistant"


def answers_to_questions(messages: list[Any]) -> list[int]:
    """Return the positions of the assistant messages as written, without a greeting before the first question."""
    roles = [
        _ROLES.get(_written_role(message)) if isinstance(message, dict) else None for message in messages
    ]
    begin = roles.index("user") if "user" in roles else 0
    return [place for place in range(begin, len(roles)) if roles[place] == "assistant"]


def is_reply(message: Any) -> bool:
    """Return whether a value is a message of the assistant or the result of a tool."""
    return isinstance(message, dict) and _ROLES.get(_written_role(message)) in ("assistant", "tool")


def is_message(value: Any) -> bool:
    """Return whether a value looks like a message."""
    return isinstance(value, dict) and ("role" in value or "from" in value)


def words_of(message: Any) -> tuple[str | None, str] | None:
    """Return the role and the text of a message, whatever its keys, without outer whitespace; None for another value."""
    if not is_message(message):
        return None
    content = _written_content(message)
    if isinstance(content, list | tuple):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return _ROLES.get(_written_role(message)), str(content or "").strip()


def read_history(value: Any, what: str) -> list[Message]:
    """Convert Alpaca's history, a list of [question, answer] pairs, into messages."""
    if isinstance(value, str):
        value = parse_printed(value, what) if value.strip() else []
    if value and not isinstance(value, list | tuple):
        raise RowError("wrong type", f"{what} is {json_type(value)}, not a list of pairs")
    messages: list[Message] = []
    for number, pair in enumerate(value or (), start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError("wrong type", f"{what}: entry {number} is not a pair of question and answer")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": check_text(text, f"{what}: entry {number}")})
    return messages


def is_media(key: str) -> bool:
    """Return whether a column's name is that of images, audio or video."""
    return _MEDIA.fullmatch(key) is not None


def mapped(row: Mapping[str, Any], columns: Mapping[str, str], name: str) -> Any:
    """Return the value of a standard column under the name that it has in the file, unless `columns` gives that name to another."""
    return row.get(columns.get(name, name)) if name in columns or name not in columns.values() else None

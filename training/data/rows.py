"""Row schemas: detect the format of a raw row, validate it and convert it into a training example."""

import json
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from configs.schema import DataFormat
from training.data.errors import MAX_ROW_BYTES, RowError, json_type
from training.data.records import Chat, Example, Filled, Message, Pair, Task, Text

FORMAT_NAMES: dict[DataFormat, str] = {
    "messages": "chats (messages)",
    "conversations": "ShareGPT chats (conversations)",
    "prompt_completion": "prompt and completion",
    "instruction": "instruction, input and output",
    "text": "plain text",
    "preference": "preference pairs (chosen, rejected)",
    "classification": "text and label",
}
_COLUMNS: dict[DataFormat, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "classification": ("text", "label"),
    "text": ("text",),
}
"""Required columns per format; the first format that matches a row is used."""
_FORMATS_OF_TASK: dict[Task, tuple[DataFormat, ...]] = {
    "instruction_tuning": ("messages", "conversations", "prompt_completion", "instruction"),
    "causal_lm": ("messages", "conversations", "prompt_completion", "instruction", "text"),
    "preference_tuning": ("preference",),
    "classification": (
        "classification",
        "messages",
        "conversations",
        "prompt_completion",
        "instruction",
    ),
}
_ROLES = ("system", "user", "assistant", "tool")
_KEPT_KEYS = ("name", "tool_call_id", "reasoning_content")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class RowSchema:
    """The schema by which the rows of a source are parsed."""

    task: Task
    data_format: DataFormat
    columns: Mapping[str, str]
    """Standard column name -> column name in the file."""
    prompt_template: str | None
    labels: tuple[str, ...]
    """Labels from `classifier_config.label_tokens`."""


def recognise(
    row: dict[str, Any], columns: Mapping[str, str], task: Task, prompt_template: str | None = None
) -> DataFormat:
    """Detect the format of a row from its columns that are not null.

    Raises:
        RowError: The task supports no format that matches the row.
    """
    if prompt_template is not None and any(
        row.get(columns.get(name, name)) is not None for name in places_of(prompt_template)
    ):
        return "prompt_completion" if "completion" in places_of(prompt_template) else "instruction"
    found: list[DataFormat] = [
        name
        for name, needed in _COLUMNS.items()
        if all(row.get(columns.get(column, column)) is not None for column in needed)
    ]
    allowed = _FORMATS_OF_TASK[task]
    for name in found:
        if name in allowed:
            return name
    has_empty_columns = any(
        all(columns.get(column, column) in row for column in _COLUMNS[name]) for name in allowed
    )
    if found and not has_empty_columns:
        better = next(other for other, formats in _FORMATS_OF_TASK.items() if found[0] in formats)
        raise RowError(
            "wrong format", f"has the format {FORMAT_NAMES[found[0]]}, which needs task: {better}, not {task}"
        )
    raise RowError("wrong columns", _missing_columns(row, columns, allowed))


def _missing_columns(row: dict[str, Any], columns: Mapping[str, str], allowed: tuple[DataFormat, ...]) -> str:
    needed = {column for name in allowed for column in _COLUMNS[name]}
    for ours, theirs in columns.items():
        if ours in needed and theirs not in row:
            return f"has no column `{theirs}`, which `columns` maps to `{ours}` ({_found(row)})"
    expected = ", or ".join(" and ".join(f"`{column}`" for column in _COLUMNS[name]) for name in allowed)
    return f"has no {expected} ({_found(row)}). If the columns have other names, map them, e.g. columns: {{prompt: question}}"


def _found(row: dict[str, Any]) -> str:
    names = [f"{name} (null)" if value is None else str(name)[:40] for name, value in row.items()]
    return f"found: {', '.join(names[:6]) or 'nothing'}"


def read_row(row: dict[str, Any], reading: RowSchema) -> Example:
    """Validate one row and convert it into an example.

    Raises:
        RowError: The row cannot be trained on.
    """
    if reading.prompt_template is not None:
        return _fill(row, reading.prompt_template, reading.columns)
    chat = _READERS[reading.data_format](row, reading.columns)
    if isinstance(chat, Chat) and reading.task == "classification":
        return _labelled(chat, reading.labels)
    if isinstance(chat, Chat) and reading.task == "causal_lm" and chat.untrained:
        raise RowError(
            "wrong weight",
            f"message {chat.untrained[0] + 1} has weight 0, but task: causal_lm trains on every token. Remove the weights, or use "
            "task: instruction_tuning",
        )
    if isinstance(chat, Chat) and not _trains_anything(chat):
        raise RowError("nothing trained", "has only assistant messages of weight 0, so it has no loss tokens")
    return chat


def _trains_anything(chat: Chat) -> bool:
    answers = sum(message["role"] == "assistant" for message in chat.messages)
    return answers > len(chat.untrained)


def _labelled(chat: Chat, labels: tuple[str, ...]) -> Chat:
    answer = str(chat.messages[-1].get("content", "")).strip()
    if answer not in labels:
        known = ", ".join(labels[:8]) + (", …" if len(labels) > 8 else "")
        raise RowError(
            "unknown label",
            f"has the label {answer[:40]!r}, which is not in classifier_config.label_tokens ({known})",
        )
    messages = [*chat.messages[:-1], {**chat.messages[-1], "content": answer}]
    return Chat(messages, chat.tools, label=labels.index(answer))


# --- prompt_template --------------------------------------------------------------------------------------------


def places_of(prompt_template: str) -> list[str]:
    """Return the columns that a prompt template names; the last one is the answer."""
    return [name for _, name, _, _ in string.Formatter().parse(prompt_template) if name]


def _fill(row: dict[str, Any], prompt_template: str, columns: Mapping[str, str]) -> Filled:
    names = places_of(prompt_template)
    values: dict[str, str] = {}
    for name in names:
        is_empty_input = name == "input" and not row.get(columns.get(name, name))
        values[name] = "" if is_empty_input else _text_of(row, name, columns)
    answer = values.pop(names[-1])
    head = prompt_template.rstrip()[: -len(names[-1]) - 2]
    return Filled(head.format(**values), answer)


# --- Formats ----------------------------------------------------------------------------------------------------


def _called(name: str, columns: Mapping[str, str]) -> str:
    return f"`{columns.get(name, name)}`"


def _text_of(row: dict[str, Any], name: str, columns: Mapping[str, str]) -> str:
    text = row.get(columns.get(name, name))
    if text is None and columns.get(name, name) not in row:
        raise RowError("wrong columns", f"has no {_called(name, columns)} ({_found(row)})")
    return _check_text(text, lambda: _called(name, columns))


def _check_text(text: Any, what: Callable[[], str]) -> str:
    if type(text) is not str:
        raise RowError("wrong type", f"{what()} is {json_type(text)}, not a string")
    if not text or text.isspace():
        raise RowError("empty content", f"{what()} is empty")
    if len(text) > MAX_ROW_BYTES:
        million = f"{len(text) / 1e6:.1f} million characters, above the limit of {MAX_ROW_BYTES / 1e6:.0f} million per row"
        raise RowError("too large", f"{what()} has {million}. Split long documents")
    if "\x00" in text:
        raise RowError("NUL character", f"{what()} contains a NUL character")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                "not UTF-8",
                f"{what()} contains a lone surrogate or an invalid UTF-8 byte (at character {error.start + 1})",
            ) from None
    return text


def _read_messages(row: dict[str, Any], columns: Mapping[str, str]) -> Chat:
    name = columns.get("messages", "messages")
    tools = _tools_of(row, columns)
    return _check_chat(_listed(row.get(name), f"`{name}`"), tools)


def _read_conversations(row: dict[str, Any], columns: Mapping[str, str]) -> Chat:
    name = columns.get("conversations", "conversations")
    turns = _listed(row.get(name), f"`{name}`")
    messages = [_from_sharegpt(position, turn) for position, turn in enumerate(turns, start=1)]
    system = row.get("system")
    has_system = isinstance(messages[0], dict) and messages[0].get("role") == "system"
    if isinstance(system, str) and system.strip() and not has_system:
        messages = [{"role": "system", "content": system}, *messages]
    return _check_chat(messages, _tools_of(row, columns))


def _from_sharegpt(position: int, turn: Any) -> Any:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    said = turn["from"]
    if not isinstance(said, str) or said not in _SHAREGPT_ROLES:
        raise RowError(
            "unknown role",
            f"message {position} is from {_short(said)}. Known: {', '.join(_SHAREGPT_ROLES)}",
        )
    return {"role": _SHAREGPT_ROLES[said], "content": turn.get("value"), "weight": turn.get("weight")}


def _read_prompt_completion(row: dict[str, Any], columns: Mapping[str, str]) -> Chat:
    prompt, completion = (row.get(columns.get(name, name)) for name in ("prompt", "completion"))
    if isinstance(prompt, list) or isinstance(completion, list):
        return _check_chat(
            [
                *_side(prompt, "user", _called("prompt", columns)),
                *_side(completion, "assistant", _called("completion", columns)),
            ],
            _tools_of(row, columns),
        )
    return _two_turns(_text_of(row, "prompt", columns), _text_of(row, "completion", columns))


def _read_instruction(row: dict[str, Any], columns: Mapping[str, str]) -> Chat:
    question = _text_of(row, "instruction", columns)
    more = row.get(columns.get("input", "input"))
    if more is not None and not (isinstance(more, str) and not more.strip()):
        question = f"{question}\n\n{_text_of(row, 'input', columns)}"
    return _two_turns(question, _text_of(row, "output", columns))


def _read_text(row: dict[str, Any], columns: Mapping[str, str]) -> Text:
    return Text(_text_of(row, "text", columns))


def _read_classification(row: dict[str, Any], columns: Mapping[str, str]) -> Chat:
    label = row.get(columns.get("label", "label"))
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    return _two_turns(_text_of(row, "text", columns), _check_text(label, lambda: _called("label", columns)))


def _two_turns(question: str, answer: str) -> Chat:
    return Chat([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def _read_preference(row: dict[str, Any], columns: Mapping[str, str]) -> Pair:
    prompt = row.get(columns.get("prompt", "prompt"))
    sides = [
        _side(row.get(columns.get(name, name)), "assistant", _called(name, columns))
        for name in ("chosen", "rejected")
    ]
    if prompt is not None:
        shared = _side(prompt, "user", _called("prompt", columns))
        # Some data sets repeat the prompt at the start of both responses.
        sides = [side[len(shared) :] if side[: len(shared)] == shared else side for side in sides]
    else:
        same = 0
        while same < min(map(len, sides)) and sides[0][same] == sides[1][same]:
            same += 1
        shared = sides[0][:same]
        if not shared or not all(side[same:] for side in sides):
            raise RowError(
                "no shared prompt",
                "without a `prompt`, `chosen` and `rejected` must begin with the same messages and then differ",
            )
        sides = [side[same:] for side in sides]
    tools = _tools_of(row, columns)
    checked = []
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        try:
            checked.append(_check_chat([*shared, *side], tools).messages[len(shared) :])
        except RowError as error:
            raise RowError(error.kind, f"{_called(name, columns)}: {error}") from None
    if checked[0] == checked[1]:
        raise RowError("nothing to prefer", "has identical `chosen` and `rejected` responses")
    return Pair(
        _check_chat([*shared, *sides[0]], tools).messages[: len(shared)], checked[0], checked[1], tools
    )


def _side(value: Any, role: str, what: str) -> list[Any]:
    """Convert a column that contains a string or a list of messages into a list of messages."""
    if isinstance(value, str) and not value.lstrip().startswith("[{"):
        return [{"role": role, "content": _check_text(value, lambda: what)}]
    return _listed(value, what)


_READERS: dict[DataFormat, Callable[[dict[str, Any], Mapping[str, str]], Example]] = {
    "messages": _read_messages,
    "conversations": _read_conversations,
    "prompt_completion": _read_prompt_completion,
    "instruction": _read_instruction,
    "text": _read_text,
    "preference": _read_preference,
    "classification": _read_classification,
}
assert set(_READERS) == set(_COLUMNS) == set(get_args(DataFormat))


# --- Chats ------------------------------------------------------------------------------------------------------


def _listed(value: Any, what: str) -> list[Any]:
    """Return a list of messages; CSV and some Parquet files store it as a JSON string."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _from_json(value, what)
    if not isinstance(value, list | tuple):
        raise RowError("wrong type", f"{what} is {json_type(value)}, not a list of messages")
    if not value:
        raise RowError("empty content", f"{what} is an empty list")
    return list(value)


def _from_json(value: str, what: str) -> Any:
    try:
        return json.loads(value)
    except ValueError as error:
        raise RowError("not JSON", f"{what} is a string that is not valid JSON ({error})") from None
    except RecursionError:
        raise RowError("nested too deeply", f"{what} is nested too deeply") from None


def _tools_of(row: dict[str, Any], columns: Mapping[str, str]) -> list[dict[str, Any]] | None:
    name = columns.get("tools", "tools")
    tools = row.get(name)
    if isinstance(tools, str):
        tools = _from_json(tools, f"`{name}`") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise RowError("wrong type", f"`{name}` is {json_type(tools)}, not a list of JSON schemas")
    for number, tool in enumerate(tools, start=1):
        if not isinstance(tool, dict):
            raise RowError("wrong type", f"tool {number} of `{name}` is {json_type(tool)}, not a JSON schema")
    _check_nesting(tools, f"`{name}`")
    return tools


def _check_nesting(value: Any, what: str) -> None:
    """Check that a value can be serialized, since chat templates print it as JSON."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except RecursionError:
        raise RowError("nested too deeply", f"{what} is nested too deeply") from None
    except (ValueError, TypeError) as error:
        raise RowError("wrong type", f"{what} cannot be serialized as JSON ({error})") from None
    if "\\u0000" in text.replace("\\\\", ""):  # JSON escapes a literal backslash as two
        raise RowError("NUL character", f"{what} contains a NUL character")


def _check_chat(messages: list[Any], tools: list[dict[str, Any]] | None) -> Chat:
    checked: list[Message] = []
    untrained: list[int] = []
    previous = None
    for position, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise RowError("wrong type", f"message {position} is not an object with role and content")
        role = message.get("role")
        if role is None and "from" in message:
            raise RowError(
                "wrong format",
                f"message {position} has `from`, not `role`. ShareGPT chats need data_format: conversations; if their column is "
                "named messages, also set columns: {conversations: messages}",
            )
        if role not in _ROLES:
            raise RowError(
                "unknown role", f"message {position} has the role {_short(role)}. Known: {', '.join(_ROLES)}"
            )
        if len(message) == 2 and "content" in message:
            content = message["content"]
            clean = message
        else:
            clean = _clean_message(message, position)
            content = clean.get("content")
            if role == "assistant" and _weight_of(message, position) == 0:
                untrained.append(position - 1)
        if content != "" or "tool_calls" not in clean:
            _check_text(content, lambda position=position, role=role: f"message {position} ({role})")
        _check_order(role, previous, position, checked)
        checked.append(clean)
        previous = role
    if previous != "assistant":
        if not any(message["role"] == "assistant" for message in checked):
            raise RowError("nothing trained", "has no assistant message, so it has no loss tokens")
        raise RowError(
            "role order", f"ends with a {previous} message; the last message must be from the assistant"
        )
    return Chat(checked, tools, tuple(untrained))


def _check_order(role: str, previous: str | None, position: int, before: list[Message]) -> None:
    if role == "system" and previous is not None:
        raise RowError("role order", f"message {position}: a system message must be the first message")
    if role == "assistant" and previous in (None, "system"):
        raise RowError(
            "role order",
            f"message {position}: an assistant message must follow a user message, but none precedes it",
        )
    if role == "tool":
        if previous == "tool" or (previous == "assistant" and "tool_calls" in before[-1]):
            return
        raise RowError(
            "role order",
            f"message {position}: a tool message must follow an assistant message with tool_calls, but none precedes it",
        )
    if role == previous:
        raise RowError(
            "role order",
            f"messages {position - 1} and {position} are both from the {role}; roles must alternate",
        )


def _short(value: Any) -> str:
    shown = repr(value) if isinstance(value, str | int | float | None) else json_type(value)
    return shown if len(shown) <= 40 else shown[:40] + "…"


def _weight_of(message: dict[str, Any], position: int) -> float:
    weight = message.get("weight")
    if weight is None:
        return 1
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(
            "wrong weight",
            f"message {position} has weight {_short(weight)}. Use 1 to include the message in the loss, or 0 to exclude it",
        )
    return weight


def _clean_message(message: dict[str, Any], position: int) -> Message:
    """Return a message without Parquet's filler nulls and without keys that no template reads."""
    role = message["role"]
    clean: Message = {"role": role, "content": message.get("content")}
    for key in _KEPT_KEYS:
        if value := message.get(key):
            clean[key] = _check_text(value, lambda key=key: f"message {position} ({role}): `{key}`")
    calls = message.get("tool_calls")
    if not calls:
        return clean
    if role != "assistant":
        raise RowError(
            "role order",
            f"message {position} ({role}) has tool_calls, which only assistant messages may have",
        )
    if isinstance(calls, str):
        calls = _from_json(calls, f"message {position}: `tool_calls`")
    if not isinstance(calls, list):
        raise RowError("wrong type", f"message {position}: `tool_calls` is {json_type(calls)}, not a list")
    clean["tool_calls"] = [
        _clean_call(call, f"message {position}: tool call {number}") for number, call in enumerate(calls, 1)
    ]
    if clean["content"] is None:
        clean["content"] = ""  # templates print a null as None
    return clean


def _clean_call(call: Any, what: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("wrong type", f"{what} is not an object with function.name and function.arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _from_json(arguments, f"{what}: arguments") if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise RowError("wrong type", f"{what}: arguments is {json_type(arguments)}, not an object")
    _check_nesting([function["name"], arguments], what)
    clean: dict[str, Any] = {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
    if isinstance(call.get("id"), str):
        clean["id"] = call["id"]
    return clean

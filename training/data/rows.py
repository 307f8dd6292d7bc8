"""Row schemas: detect the format of a raw row, validate it and convert it into a training example."""

import json
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Number
from typing import Any, get_args

from configs.schema import DataFormat
from training.data.chats import (
    answers_to_questions,
    as_context,
    is_answer,
    is_media,
    is_message,
    is_reply,
    listed,
    mapped,
    mask_messages,
    read_chat,
    read_history,
    turns_of,
    words_of,
    written_turns,
)
from training.data.class_names import ClassNumber
from training.data.errors import RowError, check_text, json_type, short
from training.data.flags import excludes_something, flag_of, is_quality_tag
from training.data.pretokenized import (
    LOSS_COLUMNS,
    OTHER_COLUMNS,
    check_loss,
    has_loss_column,
    read_tokens,
)
from training.data.records import REASONING_KEYS, Chat, Example, Filled, Message, Pair, Task, Text, Tokens
from training.data.template_forms import greeting_of, thought_of
from training.data.tools import (
    Tool,
    check_json,
    has_input_schema,
    parse_printed,
    python_value,
    read_tools,
    without_foreign_nulls,
)

FORMAT_NAMES: dict[DataFormat, str] = {
    "messages": "chats (messages)",
    "conversations": "ShareGPT chats (conversations)",
    "prompt_completion": "prompt and completion",
    "instruction": "instruction, input and output",
    "text": "plain text",
    "preference": "preference pairs (chosen, rejected)",
    "classification": "text and label",
    "tokens": "pretokenised rows (input_ids)",
}
_COLUMNS: dict[DataFormat, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "classification": ("text", "label"),
    "text": ("text",),
    "tokens": ("input_ids",),
}
"""Required columns per format; the first format that matches a row is used. Tokens come first if a row says which are in the loss."""
_OPTIONAL_COLUMNS: dict[DataFormat, tuple[str, ...]] = {
    "preference": ("prompt", "history", "system", "tools", "chat_template_kwargs"),
    "messages": ("system", "tools", "loss_mask", "chat_template_kwargs", *REASONING_KEYS),
    "conversations": ("system", "tools", "loss_mask", "chat_template_kwargs", *REASONING_KEYS),
    "instruction": ("input", "system", "history", "tools", "chat_template_kwargs", *REASONING_KEYS),
    "prompt_completion": ("system", "history", "tools", "chat_template_kwargs", *REASONING_KEYS),
    "classification": (),
    "text": (),
    "tokens": (*LOSS_COLUMNS, *OTHER_COLUMNS),
}
ALL_COLUMNS = {name: frozenset({*needed, *_OPTIONAL_COLUMNS[name]}) for name, needed in _COLUMNS.items()}
"""Format -> standard columns that it reads."""
_OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "conversations": ("conversation",),
    "input": ("context",),
    "output": ("response",),
    "prompt": ("question", "query", "problem", "input.messages"),
    "completion": ("answer", "response", "solution", "answers"),
    "system": ("system_prompt",),
    "reasoning_content": ("cot", "thought", "thinking_trajectories"),
    "tools": ("functions", "input.tools"),
    "chosen": ("preferred_output",),
    "rejected": ("non_preferred_output",),
}
"""Standard column -> names in other tools' files, which are understood unless `columns` maps the standard column."""
_FORMATS_OF_TASK: dict[Task, tuple[DataFormat, ...]] = {
    "instruction_tuning": ("messages", "conversations", "prompt_completion", "instruction", "tokens"),
    "causal_lm": ("messages", "conversations", "prompt_completion", "instruction", "text", "tokens"),
    "preference_tuning": ("preference",),
    "classification": (
        "classification",
        "messages",
        "conversations",
        "prompt_completion",
        "instruction",
    ),
}
_UNPAIRED: tuple[DataFormat, ...] = ("messages", "conversations", "prompt_completion", "instruction")
"""Formats that preference tuning reads as one response with a label."""
_CHATS = ("conversations", "messages")
_SETTINGS = frozenset(
    (
        *("on", "off", "true", "false", "yes", "no", "none", "auto"),
        *("minimal", "low", "medium", "high", "xhigh"),
    )
)
"""Values of a column such as `reasoning` that say whether, or how much, a model is to reason."""
_RATINGS = ("label", "kto_tag")
"""Columns that say whether the response is good: of TRL, and of LLaMA-Factory."""


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
    unpaired: bool = False
    """True if a row of preference tuning may be one response with a label (loss: kto)."""


def recognise(
    row: dict[str, Any],
    columns: Mapping[str, str],
    task: Task,
    prompt_template: str | None = None,
    *,
    unpaired: bool = False,
    preferred: DataFormat | None = None,
) -> DataFormat:
    """Detect the format of a row from its columns that are not null.

    Args:
        row: The row.
        columns: Standard column name -> column name in the file.
        task: The run's task.
        prompt_template: The YAML's prompt_template.
        unpaired: True if a row of preference tuning may be one response with a label.
        preferred: Format of a row that has the columns of several.

    Raises:
        RowError: The task supports no format that matches the row.
    """
    row = _with_input_as_columns(row)
    if prompt_template is not None and any(
        mapped(row, columns, name) is not None for name in places_of(prompt_template)
    ):
        return "prompt_completion" if "completion" in places_of(prompt_template) else "instruction"
    found: list[DataFormat] = [
        name
        for name, needed in _COLUMNS.items()
        if all(row.get(_name_of(row, columns, column)) is not None for column in needed)
        and not (name in _CHATS and name not in columns and name in columns.values())
    ]
    allowed = (*_FORMATS_OF_TASK[task], *(_UNPAIRED if unpaired else ()))
    if "tokens" in found and "tokens" in allowed and has_loss_column(row):
        return "tokens"
    for name in sorted(found, key=lambda name: name != preferred):
        if name in allowed:
            return name
    has_empty_columns = any(
        all(columns.get(column, column) in row for column in _COLUMNS[name]) for name in allowed
    )
    if found and task == "preference_tuning" and rating_of(row, columns) is not None:
        raise RowError(
            "wrong format",
            "has one response with a label, not a pair of chosen and rejected, which only loss: kto trains on. Set "
            "preference_tuning_config: {loss: kto}",
        )
    if found and not has_empty_columns:
        tasks = " or ".join(other for other, formats in _FORMATS_OF_TASK.items() if found[0] in formats)
        raise RowError(
            "wrong format", f"has the format {FORMAT_NAMES[found[0]]}, which needs task: {tasks}, not {task}"
        )
    raise RowError("wrong columns", _missing_columns(row, columns, allowed))


def _missing_columns(row: dict[str, Any], columns: Mapping[str, str], allowed: tuple[DataFormat, ...]) -> str:
    needed = {column for name in allowed for column in _COLUMNS[name]}
    for ours, theirs in columns.items():
        if ours in needed and theirs not in row:
            return f"has no column `{theirs}`, which `columns` maps to `{ours}` ({_found(row)})"
    if is_message(row):
        return f'is one message. Write one conversation per row: {{"messages": [...]}} ({_found(row)})'
    lists = [
        name
        for name, value in row.items()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    chats = [(name, row[name][0]) for name in lists if is_message(row[name][0])]
    if chats and "messages" in allowed:
        name, message = chats[0]
        standard = "messages" if "role" in message else "conversations"
        return f"has messages in the column `{name}`. Set columns: {{{standard}: {name}}} ({_found(row)})"
    if any("text" in row[name][0] and "label" in row[name][0] for name in lists):
        return f"has segments of text under `{lists[0]}`. Tokenize them, and write their `input_ids` and `labels` ({_found(row)})"
    if len(row) == 1 and lists:
        return f"has its rows in a list under `{lists[0]}`. Write the list alone, or one row per line ({_found(row)})"
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
    row = _with_input_as_columns(row)
    if reading.task == "classification":
        row = _with_class_names(row, reading)
    if reading.prompt_template is not None:
        filled = _fill(row, reading.prompt_template, reading.columns)
        names = {reading.columns.get(name, name) for name in places_of(reading.prompt_template)}
        for name in _OPTIONAL_COLUMNS["instruction"]:
            theirs = reading.columns.get(name, name)
            if theirs not in names and row.get(theirs) not in (None, "", [], {}):
                raise RowError(
                    "unused column",
                    f"has a column `{theirs}`, which prompt_template does not name. Add {{{theirs}}} to prompt_template, or ignore the column "
                    f"with ignore_columns: [{theirs}]",
                )
        return replace(filled, notes=_judge_unread(row, names, reading))
    example = _read_columns(row, reading)
    if isinstance(example, Chat | Pair) and has_input_schema(mapped(row, reading.columns, "tools")):
        example = replace(example, notes=(*example.notes, "`input_schema` of tools is read as `parameters`"))
    if isinstance(example, Chat | Pair) and row.get("chat_template_kwargs"):
        example = replace(example, variables=_variables_of(row["chat_template_kwargs"]))
    if isinstance(example, Tokens):
        check_loss(example, whole_text=reading.task == "causal_lm")
    if not isinstance(example, Chat):
        return example
    if reading.task != "causal_lm":
        example = _with_greeting_as_context(example)
    if reading.task == "preference_tuning":
        return _rated(example, row, reading.columns)
    if reading.task == "classification":
        return _labelled(example, reading.labels)
    if reading.task == "causal_lm" and example.untrained:
        raise RowError(
            "wrong weight",
            f"message {example.untrained[0] + 1} is excluded from the loss, but task: causal_lm trains on every token. Remove its "
            "weight, or use task: instruction_tuning",
        )
    answers = sum(message["role"] == "assistant" for message in example.messages)
    if answers <= len(example.untrained):
        raise RowError(
            "nothing trained",
            "has only assistant messages that are excluded from the loss (weight 0, or before the first user message)",
        )
    return example


def _with_class_names(row: dict[str, Any], reading: RowSchema) -> dict[str, Any]:
    """Return a row with the names of classes in place of numbers that are no labels (`datasets.ClassLabel`)."""
    names = {
        column: value.name
        for column, value in row.items()
        if isinstance(value, ClassNumber) and str(value) not in reading.labels
    }
    return {**row, **names} if names else row


def _with_greeting_as_context(chat: Chat) -> Chat:
    """Exclude assistant messages before the first question from the loss: the model is never asked for them."""
    greeting = sorted(set(greeting_of(chat.messages)).difference(chat.untrained))
    if not greeting:
        return chat
    note = "assistant messages before the first user message are not in the loss"
    return replace(chat, untrained=tuple(sorted((*chat.untrained, *greeting))), notes=(*chat.notes, note))


def _with_input_as_columns(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of OpenAI's preference format with the fields of its `input` as columns; other rows unchanged."""
    given = row.get("input")
    if "preferred_output" not in row or not isinstance(given, dict):
        return row
    columns = {f"input.{name}": value for name, value in given.items()}
    return {name: value for name, value in row.items() if name != "input"} | columns


def _variables_of(value: Any) -> dict[str, Any]:
    """Return a row's variables of the chat template, without the nulls that Arrow adds."""
    called = "`chat_template_kwargs`"
    is_text = isinstance(value, str)
    if is_text:
        value = parse_printed(value, called)
    if not isinstance(value, dict):
        raise RowError("wrong type", f"{called} is {json_type(value)}, not an object")
    check_json(value, called)
    given = {name: entry for name, entry in value.items() if entry is not None}
    return given if is_text else without_foreign_nulls(given, called)  # Arrow fills in no nulls inside a text


def _read_columns(row: dict[str, Any], reading: RowSchema) -> Example:
    """Read a row by its format, and note or reject the columns that the format does not use."""
    known = ALL_COLUMNS[reading.data_format]
    if reading.data_format == "prompt_completion" and reading.task == "instruction_tuning":
        row = _with_prompt_as_context(row, reading.columns)
    if reading.task == "preference_tuning":
        is_pair = reading.data_format == "preference"
        known = known.union(_prompt_columns(row, reading.columns) if is_pair else _RATINGS)
    settings = _settings_of(row, reading)
    if not reading.columns and not settings and row.keys() <= known:
        return _READERS[reading.data_format](row, reading.columns)
    own = {ours: theirs for ours, theirs in reading.columns.items() if ours in known}
    columns = _columns_of(row, own, reading.data_format)
    read = {name: value for name, value in row.items() if name not in settings}
    example = _READERS[reading.data_format](read, columns)
    unread = _judge_unread(row, {columns.get(name, name) for name in known} - settings, reading)
    return replace(example, notes=(*example.notes, *unread)) if unread else example


def _settings_of(row: dict[str, Any], reading: RowSchema) -> set[str]:
    """Return the columns with a name of reasoning that are no reasoning of the answer: settings, and rationales of a label."""
    names = [reading.columns.get(key, key) for key in (*REASONING_KEYS, *_OTHER_NAMES["reasoning_content"])]
    if row.keys().isdisjoint(names):
        return set()
    return {
        name
        for name in names
        if (value := row.get(name)) is not None
        and (
            reading.task == "classification"
            or isinstance(value, Number)
            or (isinstance(value, str) and value.strip().lower() in _SETTINGS)
        )
    }


def _with_prompt_as_context(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return a row whose prompt excludes its answers from the loss, unless they say that they are in it."""
    name = _name_of(row, columns, "prompt")
    prompt = row.get(name)
    if prompt is None or (
        isinstance(prompt, str) and not (_written_messages(prompt) or written_turns(prompt))
    ):
        return row
    messages = _side(row, "prompt", "user", {**columns, "prompt": name})
    if not any(map(is_answer, messages)):
        return row
    return {**row, name: [as_context(message) if is_answer(message) else message for message in messages]}


def _columns_of(
    row: dict[str, Any], columns: Mapping[str, str], data_format: DataFormat
) -> Mapping[str, str]:
    """Return the mapping of columns, extended by the names of other tools that this row has."""
    taken = set(columns.values())
    unmapped = {name: value for name, value in row.items() if name not in taken}
    found = {name: _name_of(unmapped, columns, name) for name in ALL_COLUMNS[data_format]}
    for name, theirs in found.items():
        others = [
            each
            for each in _OTHER_NAMES.get(name, ())
            if unmapped.get(each) not in (None, "", row.get(theirs))
        ]
        if name not in columns and theirs != name and others:
            raise RowError(
                "two columns",
                f"has `{theirs}` and `{others[0]}`, which may both be the {name}. Choose one with columns: {{{name}: {others[0]}}}",
            )
    return {**columns, **{name: theirs for name, theirs in found.items() if theirs != name}}


def _name_of(row: dict[str, Any], columns: Mapping[str, str], name: str) -> str:
    """Return a column's name in the file: as `columns` maps it, else the standard one or one of other tools that is not null."""
    if name in columns:
        return columns[name]
    return next((each for each in (name, *_OTHER_NAMES.get(name, ())) if row.get(each) is not None), name)


def _judge_unread(row: dict[str, Any], used: set[str], reading: RowSchema) -> tuple[str, ...]:
    """Return a note for each column that is not used; reject columns that change what should be learned."""
    task, notes = reading.task, []
    standard = {theirs: ours for ours, theirs in reading.columns.items()}
    for name, value in row.items():
        if name in used or value is None or value in ("", [], {}):
            continue
        if is_media(name):
            raise RowError(
                "unsupported content",
                f"has a column `{name}`. Only text is supported. If the text does not need it, set ignore_columns: [{name}]",
            )
        key = standard.get(name, name)
        is_rated = is_quality_tag(key, value) and (reading.data_format != "text" or _is_verdict(key, value))
        if task in ("instruction_tuning", "causal_lm") and is_rated:  # the bad answers would be trained too
            raise RowError(
                "quality tag",
                f"has a column `{name}` ({short(value)}), which says how good the answer is, but task: {task} trains every "
                f"answer. Remove the bad rows and the column, ignore it with ignore_columns: [{name}], or use task: preference_tuning (true or "
                "false needs preference_tuning_config: {loss: kto})",
            )
        if excludes_something(key, value):
            advice = {
                "tokens": "Write what it excludes as `labels`",
                "messages": "Write what it excludes as `loss_mask`",
            }
            fix = advice.get(
                reading.data_format.replace("conversations", "messages"),
                "Remove it, and the rows that it excludes",
            )
            raise RowError(
                "wrong weight",
                f"has a column `{name}` ({short(value)}), which says what is in the loss, but is not read in this format. {fix}, or ignore it "
                f"with ignore_columns: [{name}]",
            )
        notes.append(f"column `{name}` is not used")
    return tuple(notes)


def _is_verdict(key: str, value: Any) -> bool:
    """Return whether a column beside a plain text says that it is good or bad; a number is usually its class or a filter's score."""
    return key in _RATINGS and str(value).strip().lower() in ("true", "false")


def rating_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> Any:
    """Return the label of an unpaired row under one of its names, or None."""
    return next((value for name in _RATINGS if (value := mapped(row, columns, name)) is not None), None)


def _rated(chat: Chat, row: dict[str, Any], columns: Mapping[str, str]) -> Pair:
    """Return the last answer of a chat as the chosen or the rejected response, by the row's label."""
    rating = rating_of(row, columns)
    given = {name: value for name in _RATINGS if (value := mapped(row, columns, name)) is not None}
    if len({flag_of(value) for value in given.values()}) > 1:
        raise RowError(
            "two labels",
            f"has {' and '.join(f'{_called(name, columns)} ({short(value)})' for name, value in given.items())}. Remove one of them",
        )
    if rating is None:
        raise RowError(
            "no label",
            "has neither `chosen` and `rejected` nor a `label` (or `kto_tag`) of true or false for its answer",
        )
    is_good = flag_of(rating)
    if is_good is None:
        raise RowError(
            "wrong label", f"has the label {short(rating)}. Use true for a good answer, false for a bad one"
        )
    completion = row.get(_name_of(row, columns, "completion"))
    if isinstance(completion, list | tuple) and len(completion) > 1:
        raise RowError(
            "several answers",
            f"{_called('completion', columns)} has {len(completion)} messages, but only one answer can be rated. Move the others to "
            f"{_called('prompt', columns)}",
        )
    prompt, answer = chat.messages[:-1], chat.messages[-1:]
    if len(prompt) in chat.untrained:
        raise RowError(
            "wrong weight", "has an answer that is excluded from the loss, but a label. Remove one of them"
        )
    sides = (answer, []) if is_good else ([], answer)
    return Pair(prompt, *sides, chat.tools, chat.variables, chat.notes)


def _labelled(chat: Chat, labels: tuple[str, ...]) -> Chat:
    """Return a chat that ends with its label, which alone is trained, without the reasoning of the label."""
    reasoning, content = thought_of(chat.messages[-1])
    answer = content.strip()
    if answer not in labels:
        known = ", ".join(labels[:8]) + (", …" if len(labels) > 8 else "")
        fix = "Write the text of the class instead of its number" if answer.isdigit() else "Fix the label"
        raise RowError(
            "unknown label",
            f"has the label {answer[:40]!r}, which is not in classifier_config.label_tokens ({known}). {fix}, or add it there",
        )
    if len(chat.messages) - 1 in chat.untrained:
        raise RowError(
            "wrong weight",
            "has a label that is excluded from the loss (by a weight or mask, or because no user message precedes it), but only labels are "
            "trained. Remove the weight or mask, put the text into a user message, or remove the row",
        )
    last = {key: value for key, value in chat.messages[-1].items() if key != "reasoning_content"}
    notes = (*chat.notes, "reasoning of labels is not used") if reasoning else chat.notes
    return replace(
        chat,
        messages=[*chat.messages[:-1], {**last, "content": answer}],
        label=labels.index(answer),
        notes=notes,
    )


# --- prompt_template --------------------------------------------------------------------------------------------


def places_of(prompt_template: str) -> list[str]:
    """Return the columns that a prompt template names; the last one is the answer."""
    return [name for _, name, _, _ in string.Formatter().parse(prompt_template) if name]


def _fill(row: dict[str, Any], prompt_template: str, columns: Mapping[str, str]) -> Filled:
    names = places_of(prompt_template)
    values: dict[str, str] = {}
    for name in names:
        is_empty_input = name == "input" and not mapped(row, columns, name)
        values[name] = "" if is_empty_input else _text_of(row, name, columns)
    answer = values.pop(names[-1])
    head = prompt_template.rstrip()[: -len(names[-1]) - 2]
    return Filled(head.format(**values), answer)


# --- Formats ----------------------------------------------------------------------------------------------------


def _called(name: str, columns: Mapping[str, str]) -> str:
    return f"`{columns.get(name, name)}`"


def _text_of(row: dict[str, Any], name: str, columns: Mapping[str, str]) -> str:
    text = mapped(row, columns, name)
    if text is None and columns.get(name, name) not in row:
        raise RowError("wrong columns", f"has no {_called(name, columns)} ({_found(row)})")
    return check_text(text, lambda: _called(name, columns))


def _system_of(row: dict[str, Any], columns: Mapping[str, str]) -> str | list[Any] | None:
    """Return the text or the text parts of a system column, or None if it is empty."""
    system = mapped(row, columns, "system")
    if system is None or system == [] or (isinstance(system, str) and not system.strip()):
        return None
    if isinstance(system, list):
        return system
    return check_text(system, lambda: _called("system", columns))


def _tools_of(row: dict[str, Any], columns: Mapping[str, str], *, wrap: bool = False) -> list[Tool] | None:
    name = columns.get("tools", "tools")
    return read_tools(row.get(name), f"`{name}`", wrap=wrap or name == "functions")


def _read_messages(row: dict[str, Any], columns: Mapping[str, str]) -> Chat:
    return _read_chat_column("messages", row, columns)


def _read_conversations(row: dict[str, Any], columns: Mapping[str, str]) -> Chat:
    return _read_chat_column("conversations", row, columns)


def _read_chat_column(name: str, row: dict[str, Any], columns: Mapping[str, str]) -> Chat:
    messages, called = mapped(row, columns, name), _called(name, columns)
    mask = mapped(row, columns, "loss_mask")
    messages = turns_of(listed(messages, called))
    if mask is not None:
        messages = mask_messages(messages, mask, _called("loss_mask", columns))
    if reasoning := _reasoning_of(row, columns):
        messages = _with_reasoning_of_row(messages, reasoning, columns)
    tools = _tools_of(row, columns, wrap=name == "conversations")
    try:
        return read_chat(messages, called, tools, system=_system_of(row, columns))
    except RowError as error:
        if error.kind == "nothing trained":
            raise RowError(error.kind, f"{error}. {_place_of_answer(row, called)}") from None
        raise


def _place_of_answer(row: dict[str, Any], called: str) -> str:
    """Return what to do about messages without an answer, which a column beside them may hold."""
    named = ("completion", "output", *_OTHER_NAMES["completion"])
    for name, value in row.items():
        if isinstance(value, str) and (name in named or "answer" in name):
            return (
                f"If `{name}` is the answer, set columns: {{prompt: {called.strip('`')}, completion: {name}}}"
            )
    return "End the messages with the answer"


def _read_prompt_completion(row: dict[str, Any], columns: Mapping[str, str]) -> Chat:
    prompt = _side(row, "prompt", "user", columns)
    completion = _answer_side(row, "completion", [], columns)
    _check_no_prefix(prompt, completion, "completion", columns)
    messages = [*_history_of(row, columns), *prompt, *completion]
    messages[-1] = _with_reasoning(messages[-1], _reasoning_of(row, columns), columns)
    return read_chat(messages, "the row", _tools_of(row, columns), system=_system_of(row, columns))


def _read_instruction(row: dict[str, Any], columns: Mapping[str, str]) -> Chat:
    question = {"role": "user", "content": _question_of(row, columns)}
    calls = _calls_of(row, "output", columns)
    answer = calls or {"role": "assistant", "content": _text_of(row, "output", columns)}
    messages = [*_history_of(row, columns), question, answer]
    messages[-1] = _with_reasoning(messages[-1], _reasoning_of(row, columns), columns)
    return read_chat(messages, "the row", _tools_of(row, columns, wrap=True), system=_system_of(row, columns))


def _question_of(row: dict[str, Any], columns: Mapping[str, str]) -> str:
    """Return the instruction of a row, with its input if it has one."""
    question, more = mapped(row, columns, "instruction"), mapped(row, columns, "input")
    if more is None or (isinstance(more, str) and not more.strip()):
        return _text_of(row, "instruction", columns)
    text = _text_of(row, "input", columns)
    if isinstance(question, str) and not question.strip():
        return text
    return f"{_text_of(row, 'instruction', columns)}\n\n{text}"


def _reasoning_of(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """Return the texts of the row's reasoning columns by their standard names."""
    found: dict[str, str] = {}
    for key in REASONING_KEYS:
        value = mapped(row, columns, key)
        if isinstance(value, list | tuple) and len(value) == 1:
            value = value[0]  # s1's `thinking_trajectories`
        if not value:
            continue
        if not isinstance(value, str):
            theirs = columns.get(key, key)
            raise RowError(
                "wrong type",
                f"`{theirs}` is {json_type(value)}, not a string. Write the reasoning of the answer as a text, or set ignore_columns: [{theirs}]",
            )
        if value.strip():
            found[key] = value
    return found


def _with_reasoning_of_row(
    messages: list[Any], reasoning: dict[str, str], columns: Mapping[str, str]
) -> list[Any]:
    """Add the reasoning of columns beside a chat to its answer; reject a chat with several answers."""
    answers = answers_to_questions(messages)
    if len(answers) > 1:
        theirs = columns.get(next(iter(reasoning)), next(iter(reasoning)))
        raise RowError(
            "several answers",
            f"has a column `{theirs}`, but {len(answers)} assistant messages, and does not say which of them has this reasoning. Write it as "
            f"`reasoning_content` of that message, or set ignore_columns: [{theirs}]",
        )
    return [
        _with_reasoning(message, reasoning, columns) if place in answers else message
        for place, message in enumerate(messages)
    ]


def _with_reasoning(answer: Any, reasoning: dict[str, str], columns: Mapping[str, str]) -> Any:
    """Add the reasoning of columns beside the answer to it."""
    if not reasoning or not isinstance(answer, dict):
        return answer
    for key, text in reasoning.items():
        if answer.get(key) not in (None, "", text):
            raise RowError(
                "two reasonings",
                f"has different texts in the column {_called(key, columns)} and in `{key}` of the answer. Keep one of them",
            )
    return {**answer, **reasoning}


def _history_of(row: dict[str, Any], columns: Mapping[str, str]) -> list[Message]:
    return read_history(mapped(row, columns, "history"), _called("history", columns))


def _read_text(row: dict[str, Any], columns: Mapping[str, str]) -> Text:
    return Text(_text_of(row, "text", columns))


def _read_classification(row: dict[str, Any], columns: Mapping[str, str]) -> Chat:
    label = mapped(row, columns, "label")
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    answer = check_text(label, lambda: _called("label", columns))
    return Chat(_two_turns(_text_of(row, "text", columns), answer))


def _two_turns(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _written_messages(text: str) -> list[Any]:
    """Return the messages that a text holds as JSON, or as Python prints them; empty if it is another text, such as an answer in JSON."""
    if not text.lstrip().startswith("["):
        return []
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError):
        messages = python_value(text) if text.lstrip().startswith("[{") else None
    return messages if isinstance(messages, list) and all(map(is_message, messages)) else []


def _side(row: dict[str, Any], name: str, role: str, columns: Mapping[str, str]) -> list[Any]:
    """Convert a column that contains a text, a message or a list of messages into a list of messages."""
    value = mapped(row, columns, name)
    if isinstance(value, list | tuple):
        return listed(value, _called(name, columns))
    if is_message(value):
        return [value]
    if isinstance(value, str) and value.lstrip().startswith("[{") and (messages := _written_messages(value)):
        return messages
    if isinstance(value, str) and (messages := written_turns(value)):
        return messages
    return [{"role": role, "content": _text_of(row, name, columns)}]


def _answer_side(row: dict[str, Any], name: str, prompt: list[Any], columns: Mapping[str, str]) -> list[Any]:
    """Convert an answer column into messages. A text is the answer, unless it holds the assistant's messages or repeats the prompt.

    Args:
        row: The row.
        name: Standard name of the column.
        prompt: The messages that the text may repeat.
        columns: Standard column name -> column name in the file.
    """
    value = mapped(row, columns, name)
    if message := _calls_of(row, name, columns):
        return [message]
    if isinstance(value, str):
        messages = written_turns(value) or _written_messages(value)
        is_continued = bool(messages) and is_answer(messages[0]) and all(map(is_reply, messages))
        repeats = not set(map(words_of, prompt[-1:])).isdisjoint(map(words_of, messages))
        if not is_continued and not repeats:
            return [{"role": "assistant", "content": _text_of(row, name, columns)}]
    return _side(row, name, "assistant", columns)


def _calls_of(row: dict[str, Any], name: str, columns: Mapping[str, str]) -> Message | None:
    """Return the message of an answer that is a list of calls of the row's tools, or its JSON (xLAM); None for another answer."""
    value = mapped(row, columns, name)
    calls = value
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            calls = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not (isinstance(calls, list) and calls and all(map(_is_call, calls))):
        return None
    known = {tool.get("function", tool).get("name") for tool in _tools_of(row, columns, wrap=True) or ()}
    if not {call["name"] for call in calls} <= known:
        return None
    return {"role": "assistant", "content": "", "tool_calls": value}


def _is_call(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and value.keys() <= {"name", "arguments", "id"}
    )


def _check_no_prefix(prompt: list[Any], answer: list[Any], name: str, columns: Mapping[str, str]) -> None:
    """Reject a prompt that ends with the start of the answer: only a part of that message would be in the loss."""
    if prompt and is_answer(prompt[-1]) and is_answer(answer[0]):
        raise RowError(
            "unfinished answer",
            f"{_called('prompt', columns)} ends with an assistant message, which {_called(name, columns)} continues. Move its text to the start "
            f"of {_called(name, columns)}, or end the prompt with a user message",
        )


def _joined(prompt: list[Any], side: list[Any], name: str, columns: Mapping[str, str]) -> list[Any]:
    """Return the messages of a side of a pair after its prompt, of which the side may repeat the last messages or all."""
    numbers: dict[Any, int] = {}
    words, context = (
        [numbers.setdefault(words_of(message) or object(), len(numbers)) for message in messages]
        for messages in (prompt if side[1:] else [], side[:-1])
    )
    if repeated := _count_repeated(words, context):
        return [*prompt[:-repeated], *side]
    if words and words[-1] in context and not is_answer(side[0]):
        raise RowError(
            "two prompts",
            f"repeats the last message of {_called('prompt', columns)}, but has other messages before it. Remove the prompt from "
            f"{_called(name, columns)}",
        )
    _check_no_prefix(prompt, side, name, columns)
    return [*prompt, *side]


def _count_repeated(prompt: list[int], context: list[int]) -> int:
    """Return how many of the last messages of a prompt are repeated: the fewest that begin the context, or all, anywhere in it."""
    end = [-1]  # equal to no message
    shared = _prefixes(context[: len(prompt)] + end + prompt)
    count = shared[-1]
    while count and shared[count - 1]:
        count = shared[count - 1]
    return count or (len(prompt) if len(prompt) in _prefixes(prompt + end + context) else 0)


def _prefixes(numbers: list[int]) -> list[int]:
    """Return, for each end, how many of the numbers before it are also the first ones of the list (Knuth, Morris and Pratt)."""
    counts = [0] * len(numbers)
    for end in range(1, len(numbers)):
        count = counts[end - 1]
        while count and numbers[end] != numbers[count]:
            count = counts[count - 1]
        counts[end] = count + (numbers[end] == numbers[count])
    return counts


def _prompt_of_pair(row: dict[str, Any], columns: Mapping[str, str]) -> list[Any]:
    """Return the messages before both answers of a pair."""
    match _prompt_columns(row, columns):
        case ["prompt", *_]:
            return [*_history_of(row, columns), *_side(row, "prompt", "user", columns)]
        case ["instruction", *_]:
            return [*_history_of(row, columns), {"role": "user", "content": _question_of(row, columns)}]
        case [name]:
            messages = listed(mapped(row, columns, name), _called(name, columns))
            if messages and is_answer(messages[-1]):
                raise RowError(
                    "several answers",
                    f"{_called(name, columns)} ends with an answer, but `chosen` and `rejected` answer its last question. Remove the answer "
                    "from it",
                )
            return messages
    return []


def _prompt_columns(row: dict[str, Any], columns: Mapping[str, str]) -> tuple[str, ...]:
    """Return the columns that hold the prompt of a pair: `prompt`, or those that LLaMA-Factory has in its place."""
    if mapped(row, columns, "prompt") is not None:
        return ("prompt", "history")
    if mapped(row, columns, "instruction") is not None:
        return ("instruction", "input", "history")
    if _has_no_question(mapped(row, columns, "chosen")):
        return tuple(name for name in _CHATS if mapped(row, columns, name) is not None)[:1]
    return ()


def _has_no_question(value: Any) -> bool:
    """Return whether a side of a pair is an answer alone: a text, a message, or a list of the assistant's messages."""
    if isinstance(value, str):
        return not (written_turns(value) or _written_messages(value))
    if isinstance(value, list | tuple):
        return bool(value) and all(map(is_answer, value))
    return is_message(value)


def _read_preference(row: dict[str, Any], columns: Mapping[str, str]) -> Pair:
    """Read two conversations; the messages that they share are the prompt."""
    prompt = _prompt_of_pair(row, columns)
    tools, system = _tools_of(row, columns), _system_of(row, columns)
    chats: list[Chat] = []
    for name in ("chosen", "rejected"):
        side = _answer_side(row, name, prompt, columns) if prompt else _side(row, name, "assistant", columns)
        try:
            messages = _joined(prompt, side, name, columns)
            chats.append(read_chat(messages, _called(name, columns), tools, system=system))
        except RowError as error:
            raise RowError(error.kind, f"{_called(name, columns)}: {error}") from None
    chosen, rejected = (chat.messages for chat in chats)
    if chosen == rejected:
        raise RowError("nothing to prefer", "has identical `chosen` and `rejected` responses")
    same = 0
    while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
        same += 1
    if all(message["role"] in ("system", "developer") for message in chosen[:same]):
        raise RowError(
            "no shared prompt",
            f"has no question that `chosen` and `rejected` answer: without a `prompt`, both must begin with the same messages and then differ "
            f"({_found(row)}). If the prompt has another name, map it, e.g. columns: {{prompt: question}}",
        )
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[same]["role"] != "assistant" or len(messages) > same + 1:
            raise RowError(
                "several answers",
                f"{_called(name, columns)} has messages after the first one that differs (message {same + 1}), but only one answer can be "
                "compared. End both conversations with the first answers that differ",
            )
    if any(same in chat.untrained for chat in chats):
        raise RowError(
            "wrong weight",
            "has an answer of weight 0, but both answers of a pair are compared. Remove the weight",
        )
    notes = tuple(dict.fromkeys(note for chat in chats for note in chat.notes))
    if any(
        isinstance(text := mapped(row, columns, name), str)
        and written_turns(text)
        and messages[-1].get("content") != text
        for name, messages in (("chosen", chosen), ("rejected", rejected))
    ):
        notes = (*notes, "texts with `Human:` and `Assistant:` are read as messages")
    return Pair(chosen[:same], chosen[same:], rejected[same:], chats[0].tools, notes=notes)


_READERS: dict[DataFormat, Callable[[dict[str, Any], Mapping[str, str]], Example]] = {
    "messages": _read_messages,
    "conversations": _read_conversations,
    "prompt_completion": _read_prompt_completion,
    "instruction": _read_instruction,
    "text": _read_text,
    "preference": _read_preference,
    "classification": _read_classification,
    "tokens": read_tokens,
}
assert set(_READERS) == set(_COLUMNS) == set(get_args(DataFormat))

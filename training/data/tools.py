"""Tools and tool calls: validate them and convert other spellings into OpenAI's form."""

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

from training.data.errors import RowError, check_text, json_type, unique_keys

Tool = dict[str, Any]
_NAMES_OF_ARGUMENTS = ("args", "argument", "input", "params", "parameter", "kwargs")
"""Names that other tools have for the arguments of a call."""
_QUOTED_ARGUMENTS = re.compile(r"""\{\s*"name":\s*"([^"]+)",\s*"arguments":\s*'(.*)'\s*\}""", re.DOTALL)
"""A call of Glaive, whose arguments are JSON in single quotes."""


def read_tools(value: Any, what: str, *, wrap: bool) -> list[Tool] | None:
    """Return the tools of a row as JSON schemas, or None if it has none.

    Args:
        value: The column's value: a list, or its JSON text.
        what: Name of the column in messages.
        wrap: True to convert a bare function into {"type": "function", "function": ...}.

    Raises:
        RowError: The value is not a list of JSON schemas.
    """
    is_text = isinstance(value, str)
    if is_text:
        value = parse_printed(value, what) if value.strip() else None
    if not value:
        return None
    if isinstance(value, dict) and ("function" in value or isinstance(value.get("name"), str)):
        value = [value]
    if not isinstance(value, list | tuple):
        raise RowError("wrong type", f"{what} is {json_type(value)}, not a list of JSON schemas")
    tools: list[Tool] = []
    for number, tool in enumerate(value, start=1):
        is_written = is_text or isinstance(tool, str)
        if isinstance(tool, str) and tool.lstrip().startswith("{"):
            tool = parse_printed(tool, f"tool {number} of {what}")
        if not isinstance(tool, dict):
            raise RowError("wrong type", f"tool {number} of {what} is {json_type(tool)}, not a JSON schema")
        clean = tool if is_written else _without_filler(tool, what)  # Arrow fills in no nulls inside a text
        if "function" in clean and not isinstance(clean["function"], dict):
            kind = json_type(clean["function"])
            raise RowError("wrong type", f"tool {number} of {what}: `function` is {kind}, not an object")
        clean = _with_parameters(clean)
        tools.append(as_function(clean) if wrap else clean)
    check_json(tools, what)
    return tools


def has_input_schema(value: Any) -> bool:
    """Return whether a column of tools has them as Anthropic writes them, with `input_schema`."""
    if isinstance(value, str):
        return '"input_schema"' in value
    return isinstance(value, list | tuple) and any(
        isinstance(tool, dict) and tool.get("input_schema") for tool in value
    )


def _with_parameters(tool: Tool) -> Tool:
    """Return a tool of Anthropic's API with its `input_schema` as `parameters`; another tool as it is."""
    if not isinstance(tool.get("input_schema"), dict) or "parameters" in tool:
        return tool
    return {"parameters" if key == "input_schema" else key: value for key, value in tool.items()}


def as_function(tool: Tool) -> Tool:
    """Return a bare function as OpenAI writes it, {"type": "function", "function": ...}; another tool as it is."""
    is_bare = "function" not in tool and isinstance(tool.get("name"), str)
    return {"type": "function", "function": tool} if is_bare else tool


def _without_filler(tool: Tool, what: str) -> Tool:
    """Remove keys whose value is null: Arrow adds the keys of other rows. A null `default` stays if the type allows null."""
    try:
        return _without_empty_keys(tool)
    except RecursionError:
        raise RowError("nested too deeply", f"{what} is nested too deeply") from None


def _without_empty_keys(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {
            key: _without_empty_keys(value)
            for key, value in schema.items()
            if value is not None or (key == "default" and _allows_null(schema))
        }
    if isinstance(schema, list | tuple):
        return [_without_empty_keys(value) for value in schema]
    return schema


def _list_of(schema: dict[str, Any], key: str) -> Sequence[Any]:
    """Return the list under a key of a schema; empty if the key holds none."""
    value = schema.get(key)
    return value if isinstance(value, list | tuple) else ()


def _allows_null(schema: Any) -> bool:
    if not isinstance(schema, dict):
        return False
    kinds = schema.get("type")
    variants = [*_list_of(schema, "anyOf"), *_list_of(schema, "oneOf")]
    return (
        bool(schema.get("nullable"))
        or kinds == "null"
        or (isinstance(kinds, list | tuple) and "null" in kinds)
        or None in _list_of(schema, "enum")
        or any(map(_allows_null, variants))
    )


def read_calls(value: Any, what: str, tools: Sequence[Tool] | None, notes: list[str]) -> list[dict[str, Any]]:
    """Return the tool calls of a message, with their arguments as objects.

    Args:
        value: A list of calls, one call, or the text of either: JSON, or as Python prints it.
        what: Name of the message and key in messages.
        tools: The row's tools, whose schemas tell which nulls are meant.
        notes: Gets a note if null arguments are removed, or calls are converted from Python.

    Raises:
        RowError: A call has no name, or its arguments are not an object.
    """
    is_text = isinstance(value, str)
    if is_text:
        value = _parse_calls(value, what, notes)
    calls = [value] if isinstance(value, dict) else value
    if not isinstance(calls, list | tuple):
        raise RowError("wrong type", f"{what} is {json_type(value)}, not a list")
    return [
        _read_call(call, f"{what} {number}" if len(calls) > 1 or not is_text else what, tools, notes, is_text)
        for number, call in enumerate(calls, 1)
    ]


def _parse_calls(text: str, what: str, notes: list[str]) -> Any:
    """Parse calls that are written as JSON, as JSON with arguments in single quotes (Glaive), or as Python prints them."""
    try:
        return parse_json(text, what)
    except RowError as error:
        found = _QUOTED_ARGUMENTS.fullmatch(text.strip())
        is_quoted = found is not None and _is_json(found[2])
        value = {"name": found[1], "arguments": found[2]} if found and is_quoted else python_value(text)
        if error.kind != "not JSON" or value is None:
            raise
        notes.append("calls that are written as Python are converted to JSON")
        return value


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def python_value(text: str) -> Any:
    """Return the value that a text holds as Python prints it, or None if it holds none."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _read_call(
    call: Any, what: str, tools: Sequence[Tool] | None, notes: list[str], is_text: bool
) -> dict[str, Any]:
    function = _function_of(call, what)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError("wrong type", f"{what} is not an object with function.name and function.arguments")
    name = check_text(function["name"], f"{what}: name")
    given = [key for key in ("arguments", "parameters") if function.get(key) is not None]
    if len(given) == 2:
        raise RowError("wrong type", f"{what} has both `arguments` and `parameters`. Remove one of them")
    arguments = function[given[0]] if given else {}
    if isinstance(arguments, str):
        is_text = True
        arguments = parse_json(arguments, f"{what}: arguments") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise RowError("wrong type", f"{what}: arguments is {json_type(arguments)}, not an object")
    unknown = sorted(
        key
        for holder in (call, function)
        for key, value in holder.items()
        if value is not None
        and key not in ("id", "type", "index", "function", "name", "arguments", "parameters")
    )
    if unknown:
        is_arguments = not given and unknown[0] in _NAMES_OF_ARGUMENTS
        advice = "Rename it to `arguments`" if is_arguments else "Remove it"
        raise RowError("unknown key", f"{what} has the key `{unknown[0]}`, which no template reads. {advice}")
    if not is_text:  # Arrow fills in no nulls inside a text
        given_arguments = arguments
        arguments = without_foreign_nulls(arguments, f"{what}: arguments", _parameters_of(name, tools))
        if arguments != given_arguments:
            notes.append("null arguments of calls are removed, unless the schema of the tool allows null")
    check_json([name, arguments], what)
    clean: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if isinstance(call.get("id"), str) and call["id"]:
        clean["id"] = call["id"]
    return clean


def _function_of(call: Any, what: str) -> Any:
    """Return the function of a call, merged with a name and arguments that are written beside `function`."""
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict) or function is call:
        return function
    function = dict(function)
    for key in ("name", "arguments", "parameters"):
        if call.get(key) in (None, "", {}):
            continue
        if function.get(key) not in (None, call[key]):
            raise RowError(
                "wrong type", f"{what} has different `{key}` inside and beside `function`. Remove one of them"
            )
        function[key] = call[key]
    return function


def _parameters_of(name: str, tools: Sequence[Tool] | None) -> Any:
    """Return the schema of a tool's arguments, or None."""
    functions = (tool.get("function", tool) for tool in tools or ())
    return next((function.get("parameters") for function in functions if function.get("name") == name), None)


def without_foreign_nulls(value: Any, what: str, schema: Any = None) -> Any:
    """Remove null entries of objects unless the schema allows null there: Arrow adds the keys of other rows, at every depth.

    Args:
        value: A JSON value.
        what: Name of the value in messages.
        schema: Its JSON schema.
    """
    try:
        return _without_nulls(value, schema)
    except RecursionError:
        raise RowError("nested too deeply", f"{what} is nested too deeply") from None


def _without_nulls(value: Any, schema: Any) -> Any:
    if isinstance(value, dict):
        known = {
            key: entry
            for part in _variants(schema)
            if isinstance(part.get("properties"), dict)
            for key, entry in part["properties"].items()
            if entry is not None
        }
        return {
            key: _without_nulls(entry, known.get(key))
            for key, entry in value.items()
            if entry is not None or _allows_null(known.get(key))
        }
    if isinstance(value, list | tuple):
        items = next((part["items"] for part in _variants(schema) if part.get("items")), None)
        return [_without_nulls(entry, items) for entry in value]
    return value


def _variants(schema: Any) -> list[dict[str, Any]]:
    """Return a schema and the alternatives that it lists."""
    if not isinstance(schema, dict):
        return []
    listed = [part for key in ("anyOf", "oneOf", "allOf") for part in _list_of(schema, key)]
    return [schema, *(part for part in listed if isinstance(part, dict))]


def parse_json(value: str, what: str) -> Any:
    """Parse JSON text inside a row; raise RowError if it is invalid."""
    try:
        return json.loads(value, object_pairs_hook=unique_keys)
    except RowError as error:
        raise RowError(error.kind, f"{what} {error}") from None
    except ValueError as error:
        raise RowError("not JSON", f"{what} is a string that is not valid JSON ({error})") from None
    except RecursionError:
        raise RowError("nested too deeply", f"{what} is nested too deeply") from None


def parse_printed(value: str, what: str) -> Any:
    """Parse JSON text inside a row, or a list or dictionary as Python prints it (pandas in CSV files); raise RowError if it is neither."""
    try:
        return parse_json(value, what)
    except RowError as error:
        found = python_value(value) if error.kind == "not JSON" else None
        if not isinstance(found, dict | list):
            raise
        return found


def check_json(value: Any, what: str) -> None:
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

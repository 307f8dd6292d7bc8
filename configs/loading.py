"""Load a FinetuneConfig from a YAML file and `key=value` overrides.

Every error is reported on its own line: file and line (or the override), the key, the value, and how to fix it.
"""

import copy
import difflib
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from configs import legacy, other_tools
from configs.schema import LENGTH_KEYS, ConflictError, FinetuneConfig, Section, sections_of
from configs.yaml_source import (
    MAX_BYTES,
    MAX_DEPTH,
    SECRETS_COME_FROM,
    TEMPLATES,
    ConfigError,
    Document,
    KeyPath,
    Origin,
    Problem,
    dotted,
    looks_secret,
    names_secret,
    parse_yaml,
    plain_scalar,
    shown,
    without_variables,
)

__all__ = ["ConfigError", "LoadedConfig", "flat", "load_config", "load_text", "to_yaml"]

MAX_PROBLEMS = 50
"""Maximum number of lines in a report; a file with more errors is probably not a configuration."""

# Lines of a file come first in a report, then the overrides in order.
_AFTER_ALL_LINES = MAX_BYTES + 1
_INDENT = 2  # indentation of yaml.dump


@dataclass(frozen=True)
class LoadedConfig:
    """A validated configuration, with warnings about its source."""

    config: FinetuneConfig

    path: Path
    """The YAML file."""

    warnings: tuple[str, ...]
    """One line each: deprecated keys that still work, and their replacements."""

    rejections: tuple[str, ...]
    """One line each: settings that no run supports. The configuration may be printed, but not run."""

    given_keys: frozenset[str]
    """Keys set by the file or an override (dotted for sections), under their current names; the others have their
    defaults."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a YAML file, apply overrides in order, and validate the result.

    Accesses only the file itself: no bucket, no data, no other file. A ConfigError contains all errors.

    Args:
        path: the YAML file.
        overrides: `key=value`, with dotted keys (`lora_config.r=16`) and values as in the YAML; `key=null` unsets a key.
    """
    return load_text(read_text(path), path, overrides)


def load_text(text: str, path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Validate the text of a YAML; arguments and errors as of load_config."""
    document = _parse(text, path)
    if tool := _other_tool(document.data):
        raise ConfigError(
            f"{path}: is a YAML of {other_tools.TOOL_NAMES[tool]}. Translate it: python main.py convert {shlex.quote(str(path))} --to NEW.yaml"
        )
    for number, override in enumerate(overrides):
        _apply_override(document, override, _AFTER_ALL_LINES + number)
    _reject_repeated(document, overrides)
    _let_an_override_decide_the_length(document)
    migration = legacy.migrate(document)
    document.problems += _secrets(document)
    config, errors = _validate(document.data)
    if errors:
        document.problems += islice(_field_problems(document, errors), MAX_PROBLEMS)
        document.problems += _conflicts_beside(document, errors)
    if document.problems or config is None:
        ordered = sorted(document.problems, key=lambda problem: (problem.rank, problem.origin.order))
        lines = list(dict.fromkeys(str(problem) for problem in ordered))
        raise ConfigError("\n".join(lines[:MAX_PROBLEMS]))
    return LoadedConfig(
        config=config,
        path=path,
        warnings=_lines(migration.warnings),
        rejections=_lines(migration.rejections),
        given_keys=frozenset(_keys(document.data)),
    )


def to_yaml(config: FinetuneConfig) -> str:
    """Return the resolved configuration as YAML from which `load_config` restores it, with keys in declaration order."""
    return _dump(without_variables(config.model_dump(mode="json")))


def default_keys(loaded: LoadedConfig) -> list[str]:
    """Return the keys that neither the file nor an override sets, dotted for sections, in declaration order."""
    return [key for key in flat(loaded.config.model_dump(mode="json")) if key not in loaded.given_keys]


def to_marked_yaml(loaded: LoadedConfig) -> str:
    """Return the resolved configuration as YAML, with a comment after each default."""
    comments = dict.fromkeys(default_keys(loaded), "default")
    settings = without_variables(loaded.config.model_dump(mode="json"))
    return "\n".join(commented_yaml(settings, comments)) + "\n"


def commented_yaml(settings: Mapping[str, Any], comments: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of settings as YAML, with these comments after the lines of their keys (dotted for sections)."""
    above: list[str] = []
    for line in _dump(settings).splitlines():
        depth = (len(line) - len(line.lstrip())) // _INDENT
        above = [*above[:depth], line.strip().partition(":")[0]]
        comment = comments.get(".".join(above))
        yield f"{line}  # {comment}" if comment else line


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Flatten sections into dotted keys: {"lora_config": {"r": 8}} -> {"lora_config.r": 8}."""
    keys = {}
    for key, value in settings.items():
        name = f"{above}{key}"
        keys |= flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return keys


def _dump(settings: Mapping[str, Any]) -> str:
    return yaml.dump(dict(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes text which YAML would otherwise read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    reads_as_text = isinstance(plain_scalar(text), str) and text.isprintable()
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if reads_as_text else '"')


_Dumper.add_representer(str, _represent_text)


def read_text(path: Path) -> str:
    """Return the text of a YAML file; raise a ConfigError if it cannot be read, is too large, or is not UTF-8."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file: check the path") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: is a directory: give a YAML file in it") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(
            f"{path}: is larger than {MAX_BYTES:,} bytes, the limit for a configuration: check the path"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text: save the file as UTF-8") from error


def _parse(text: str, path: Path) -> Document:
    document = parse_yaml(text, lambda line: Origin(f"{path}:{line}", line), legacy.IGNORED, os.environ)
    if document.data is None and not document.problems:
        raise ConfigError(f"{path}:1: is empty: add at least `model_id` and `train_path`")
    if not isinstance(document.data, dict):
        raise ConfigError(f"{document.origin(()).label}: is not a mapping: write lines of `key: value`")
    return document


_FEWEST_OTHER_KEYS = 3


def _other_tool(data: dict[str, Any]) -> other_tools.Tool | None:
    """Return the tool that a file was written for: one that names no model as we do, and has several of the tool's own keys."""
    if "model_id" in data or (tool := other_tools.detect(data)) is None:
        return None
    own = [key for key in data if key not in FinetuneConfig.model_fields and other_tools.find(key, tool)]
    return tool if tool == "torchtune" or len(own) >= _FEWEST_OTHER_KEYS else None


def _reject_repeated(document: Document, overrides: Sequence[str]) -> None:
    """Add a problem for a key that the command line sets twice."""
    keys = [override.partition("=")[0].strip() for override in overrides]
    for number, key in enumerate(keys):
        if key in keys[:number]:
            origin = Origin("command line", _AFTER_ALL_LINES + number, from_override=True)
            document.problems.append(
                Problem(tuple(key.split(".")), origin, f"`{dotted((key,))}` is set twice: keep one")
            )


def _apply_override(document: Document, override: str, order: int) -> None:
    """Set one key of the document, creating missing sections on the path."""
    key, separator, value_text = override.partition("=")
    key = key.strip()
    value_shown = shown(value_text)[1:-1]
    if looks_secret(value_text) or any(names_secret(part) for part in key.split(".")):
        value_shown = "(not shown)"
    origin = Origin(f"override '{shown(key)[1:-1]}{separator}{value_shown}'", order, from_override=True)
    path = tuple(key.split("."))
    if not separator or not all(path) or len(path) > MAX_DEPTH:
        document.problems.append(
            Problem((override,), origin, "invalid override: write key=value, or section.key=value")
        )
        return
    if not value_text.strip():
        text = f"no value after `=`: was a variable not set? {key}=null unsets the key"
        document.problems.append(Problem(path, origin, text))
        return
    try:
        value = parse_yaml(
            value_text, lambda line: origin, variables=None if path[0] in TEMPLATES else os.environ
        )
    except ConfigError as error:
        document.problems.append(Problem(path, origin, str(error).removeprefix(f"{origin.label}: ")))
        return
    section = document.data
    for depth, part in enumerate(path[:-1], start=1):
        if section.get(part) is None:
            document.put(path[:depth], Document({}, {(): origin}))
        section = section[part]
        if not isinstance(section, dict):
            outer = dotted(path[:depth])
            text = f"`{outer}` is {shown(section)}, which has no keys: set `{outer}` itself"
            document.problems.append(Problem(path, origin, text))
            return
    is_known = path[-1] in section or key in FinetuneConfig.model_fields
    if value.data is None and not value.problems and is_known:
        section.pop(path[-1], None)
        return
    document.put(path, value)


def _let_an_override_decide_the_length(document: Document) -> None:
    """Remove other length keys if an override sets one: `max_steps=20` replaces the file's num_epochs."""
    given = [key for key in LENGTH_KEYS if document.data.get(key) is not None]
    overridden = [key for key in given if document.origin((key,)).from_override]
    for key in given:
        if overridden and key not in overridden:
            del document.data[key]


def _secrets(document: Document) -> Iterator[Problem]:
    """Yield a problem for every value that looks like a token or a key."""
    for path, value in _leaves(document.data, ()):
        if isinstance(value, str) and looks_secret(value):
            yield Problem(
                path,
                document.origin(path),
                f"`{dotted(path)}` looks like a secret (not shown here): {SECRETS_COME_FROM}",
                rank=0,
            )


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _leaves(below, (*path, key))
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from _leaves(below, (*path, index))
    else:
        yield path, value


def _validate(data: dict[str, Any]) -> tuple[FinetuneConfig | None, list[ErrorDetails]]:
    try:
        return FinetuneConfig.model_validate(data), []
    except ValidationError as error:
        return None, error.errors(include_url=False)


def _field_problems(document: Document, errors: list[ErrorDetails]) -> Iterator[Problem]:
    """Yield pydantic's errors as problems: one per value, and none for a value that has a problem already."""
    known = {problem.path for problem in document.problems}
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for error in errors:
        by_path.setdefault(_path_in_data(document.data, error), []).append(error)
    sections = {path[:length] for path in by_path for length in range(1, len(path))}
    for path, here in by_path.items():
        if any(path[:length] in known for length in range(1, len(path) + 1)):
            continue
        # A section that may also be a name fails as both: report only the errors inside the section.
        if path in sections:
            continue
        yield from _explain(document, path, here)


def _conflicts_beside(document: Document, errors: list[ErrorDetails]) -> list[Problem]:
    """Return the conflicts between keys that other errors hide: those that the file still has without its wrong values.

    A conflict that names a wrong key is left out, because the right value may resolve it.
    """
    wrong = {_path_in_data(document.data, error) for error in errors} | {
        problem.path for problem in document.problems
    }
    if any(path in {(), ("?",)} for path in wrong):
        return []
    data = copy.deepcopy(document.data)
    for path in sorted(wrong, key=len, reverse=True):
        _remove(data, path)
    needed = {name: "x" for name, field in FinetuneConfig.model_fields.items() if field.is_required()}
    _, conflicts = _validate({**needed, **data})
    top = {str(path[0]) for path in wrong}
    return [
        replace(problem, rank=3)
        for problem in _field_problems(document, conflicts)
        if "value_error" in {error["type"] for error in conflicts}
        and not top
        & {word.partition(".")[0].partition(":")[0] for word in re.findall("`(.*?)`", problem.text)}
    ]


def _remove(data: Any, path: KeyPath) -> None:
    """Remove a value. A wrong item of a list removes the list, and a missing key its section."""
    for depth, part in enumerate(path):
        below = data.get(part) if isinstance(data, dict) else None
        is_last = depth == len(path) - 1 or not isinstance(below, dict) or path[depth + 1] not in below
        if is_last and isinstance(data, dict):
            data.pop(part, None)
        if is_last:
            return
        data = below


def _path_in_data(data: Any, error: ErrorDetails) -> KeyPath:
    """Return the error's location without the type names that pydantic inserts between keys."""
    path: KeyPath = ()
    for part in error["loc"]:
        children: Any = dict(enumerate(data)) if isinstance(data, list) else data
        if isinstance(children, dict) and part in children:
            data, path = children[part], (*path, part)
    if error["type"] == "missing":
        path = (*path, error["loc"][-1])
    return path


def _explain(document: Document, path: KeyPath, errors: list[ErrorDetails]) -> Iterator[Problem]:
    origin = document.origin(path)
    kinds = {error["type"]: error for error in errors}
    if "value_error" in kinds:
        cause = kinds["value_error"].get("ctx", {})["error"]
        if isinstance(cause, ConflictError):
            for key, text in cause.conflicts:
                below = (*path, *key.split("."))
                yield Problem(below, document.origin(below), _in_section(path, text))
            return
        value = shown(kinds["value_error"]["input"])
        yield Problem(path, origin, f"`{dotted(path)}` is {value}: {cause}")
    elif "missing" in kinds:
        yield Problem(
            path,
            origin,
            f"`{dotted(path)}` is missing: {_to_write(_help(path))}",
            rank=1 if len(path) == 1 else 2,
        )
    elif "extra_forbidden" in kinds:
        value = kinds["extra_forbidden"]["input"]
        yield Problem(path, origin, _unknown_key(document.data, path, value, origin))
    elif errors[0]["loc"][-1] == "[key]":
        expected = _choices(errors[0])
        yield Problem(
            path, origin, f"`{dotted(path)}` is not a key of `{dotted(path[:-1])}`: use one of {expected}"
        )
    else:
        value = errors[0]["input"]
        yield Problem(
            path,
            origin,
            f"`{dotted(path)}` is {shown(value)}: {_expected(errors)}{_hint(path, value, errors)}",
        )


def _in_section(path: KeyPath, text: str) -> str:
    return f"{dotted(path)}: {text}" if path else text


def _expected(errors: list[ErrorDetails]) -> str:
    phrases = list(dict.fromkeys(_phrase(error) for error in errors))
    if "a number" in phrases and "an integer" in phrases:
        phrases.remove("an integer")
    return f"write {' or '.join(phrases)}"


def _phrase(error: ErrorDetails) -> str:
    """Return a description of the accepted values for one of pydantic's error types."""
    limits = error.get("ctx", {})
    match error["type"]:
        case "literal_error":
            return _choices(error)
        case "bool_type":
            return "true or false"
        case "int_type" | "int_from_float":
            return "an integer"
        case "float_type":
            return "a number"
        case "string_type":
            return "text"
        case "list_type":
            return "a list"
        case "dict_type" | "model_type" | "model_attributes_type":
            return "a section of `key: value` lines"
        case "greater_than":
            return f"a number above {limits['gt']}"
        case "greater_than_equal":
            return f"a number of at least {limits['ge']}"
        case "less_than":
            return f"a number below {limits['lt']}"
        case "finite_number":
            return "a finite number"
        case "string_too_short":
            return "some text, or remove the key"
        case "string_too_long":
            return f"at most {limits['max_length']} characters"
        case "too_short":
            return f"at least {limits['min_length']} items"
        case "string_pattern_mismatch":
            return "only letters, digits, `.`, `_` and `-`, starting with a letter or digit"
        case "union_tag_invalid" | "union_tag_not_found":
            return f"`provider: {'`, `provider: '.join(_LOGGERS)}`"
    return f"something else ({error['msg']})"


_LOGGERS = ("wandb", "mlflow", "tensorboard")


def _choices(error: ErrorDetails) -> str:
    """Return pydantic's list of choices without quotes: `'a', 'b' or 'c'` -> a, b or c."""
    return error.get("ctx", {})["expected"].replace("'", "")


def _hint(path: KeyPath, value: Any, errors: list[ErrorDetails]) -> str:
    kinds = {error["type"] for error in errors}
    if value is None:
        return "" if _is_required(path) else ", or remove the key to use its default"
    if path == ("deepspeed",) and isinstance(value, str) and value.endswith(".json"):
        return f" (write a file as {{config_path: {value}}})"
    instead, reason = _other_tools_value(path, value)
    if instead:
        return f" ({instead})"
    if (sections := _sections_at(path)) and len(path) == 1 and not isinstance(value, dict | list):
        return _section_hint(str(path[0]), value, sections)
    if isinstance(value, str) and "bool_type" in kinds and value.lower() in ("yes", "no", "on", "off"):
        return f" ({value} is text in this YAML)"
    if (
        isinstance(value, str)
        and kinds & {"int_type", "float_type"}
        and not isinstance(plain_scalar(value), str)
    ):
        return " (write numbers without quotes)"
    if isinstance(value, float) and "int_type" in kinds and value.is_integer() and abs(value) < 1e15:
        return f": {int(value)}"
    if isinstance(value, str) and "literal_error" in kinds:
        choices = [choice.strip() for error in errors for choice in _choices_list(error)]
        if value.lower() == "gpu" and "cuda" in choices:
            return " (use `cuda` for a GPU)"
        if near := difflib.get_close_matches(value.lower(), choices, n=1):
            return f" (did you mean `{near[0]}`?)"
    return f" ({reason})" if reason else ""


def _other_tools_value(path: KeyPath, value: Any) -> tuple[str, str]:
    """Return (what to write for a value that another tool accepts, such as `deepspeed: 3`; why it has no counterpart)."""
    if (instead := _OTHER_VALUES.get((dotted(path), value if isinstance(value, str) else ""))) is not None:
        return instead, ""
    row = next((row for row in other_tools.TABLE if row.theirs == row.ours == dotted(path)), None)
    if row is None:
        return "", ""
    try:
        settings = row.settings(value)
    except other_tools.NoCounterpartError as error:
        return "", str(error)
    except (TypeError, ValueError, AttributeError):
        return "", ""
    return ("" if not settings or settings == {row.ours: value} else f"write {written(settings)}"), ""


_OTHER_VALUES = {
    ("task", "dpo"): "write `task: preference_tuning`, whose default loss is dpo",
    ("task", "sft"): "write `task: instruction_tuning`",
    ("task", "pt"): "write `task: causal_lm`",
    ("task", "pretrain"): "write `task: causal_lm`",
    ("task", "pretraining"): "write `task: causal_lm`",
    ("dtype", "fp16"): other_tools.NO_FP16,
    ("dtype", "float16"): other_tools.NO_FP16,
} | {
    ("task", loss): f"write `task: preference_tuning` and `preference_tuning_config: {{loss: {loss}}}`"
    for loss in ("ipo", "orpo", "kto")
}


def _section_hint(key: str, value: Any, sections: list[type[Section]]) -> str:
    """Return how to write a section for which a single value was given, with the names of its keys."""
    if key == "logger":
        return f", as in `logger: {{provider: {value if value in _LOGGERS else 'wandb'}}}`"
    keys = [name for section in sections for name in section.model_fields]
    required = [
        name for section in sections for name, field in section.model_fields.items() if field.is_required()
    ]
    default = "" if required or value is False else f" (`{key}: {{}}` for its defaults)"
    return f"{default}; its keys are {', '.join(keys[:8])}{' and others' if len(keys) > 8 else ''}"


def written(settings: Mapping[str, Any], data: Mapping[str, Any] = {}, *, as_overrides: bool = False) -> str:
    """Return settings as a message quotes them.

    Args:
        settings: dotted keys and values.
        data: the file; a section that it has is not written again.
        as_overrides: quote them as `section.key=value`.
    """
    parts = []
    for key, value in settings.items():
        text = (
            yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=1_000_000)
            .removesuffix("\n...\n")
            .strip()
        )
        section, _, inner = key.partition(".")
        if as_overrides:
            parts.append(f"`{key}={text}`")
        elif inner and isinstance(data.get(section), dict):
            parts.append(f"`{inner}: {text}` in `{section}`")
        else:
            parts.append(f"`{section}: {{{inner}: {text}}}`" if inner else f"`{key}: {text}`")
    return " and ".join(parts)


def _choices_list(error: ErrorDetails) -> list[str]:
    return _choices(error).replace(" or ", ",").split(",") if error["type"] == "literal_error" else []


def _unknown_key(data: dict[str, Any], path: KeyPath, value: Any, origin: Origin) -> str:
    """Return the message for an unknown key; it contains only values that another tool's key has, and no secret."""
    key = str(path[-1])
    if any(names_secret(str(part)) for part in path):
        return f"`{dotted(path)}` is not a key (its value is not shown): {SECRETS_COME_FROM}"
    elsewhere = [name for name in FinetuneConfig.model_fields if key in _keys_of((name,), {})]
    advice = None
    if len(path) == 1 and elsewhere != ["lora_config"]:
        advice = _other_tools_key(key, value, data, as_overrides=origin.from_override)
    if advice:
        return advice
    siblings = _keys_of(path[:-1], data)
    if near := difflib.get_close_matches(key.lower(), siblings, n=1):
        return f"`{dotted(path)}` is not a key: did you mean `{dotted((*path[:-1], near[0]))}`?"
    if key in FinetuneConfig.model_fields and len(path) > 1:
        return (
            f"`{dotted(path)}` is not a key: `{key}` belongs at the top level, not in `{dotted(path[:-1])}`"
        )
    if elsewhere:
        return f"`{dotted(path)}` is not a key: did you mean `{elsewhere[0]}.{key}`?"
    if near := difflib.get_close_matches(key.lower(), siblings, n=1, cutoff=0.5):
        return f"`{dotted(path)}` is not a key (the closest is `{dotted((*path[:-1], near[0]))}`): remove it"
    return f"`{dotted(path)}` is not a key: remove it"


def _other_tools_key(key: str, value: Any, data: Mapping[str, Any], *, as_overrides: bool) -> str | None:
    """Return the message for another tool's key; None if no tool has it."""
    row = other_tools.find(key)
    if row is None:
        return None
    note = f": {row.note}" if row.note else ""
    if row.ours is None or value is None:
        return f"`{key}` is another tool's key without a counterpart: remove it ({row.note or 'it is empty'})"
    try:
        settings = row.settings(value)
    except other_tools.NoCounterpartError as error:
        return f"`{key}` is another tool's key: {error}"
    except (TypeError, ValueError, AttributeError):
        return f"`{key}` is another tool's key: its counterpart is `{row.ours}`{note}"
    if settings and not looks_secret(str(value)) and not isinstance(value, list | dict):
        return f"`{key}` is another tool's key: write {written(settings, data, as_overrides=as_overrides)}"
    if settings:
        return f"`{key}` is another tool's key: its counterpart is `{row.ours}`{note}"
    return f"`{key}` is another tool's key that needs nothing here: remove it"


def _sections_at(path: KeyPath) -> list[type[Section]]:
    """Return the section classes that the value at `path` may have."""
    sections: list[type[Section]] = [FinetuneConfig]
    for key in path:
        if isinstance(key, int):
            continue  # an item of a list has the sections of the list
        fields = [section.model_fields[str(key)] for section in sections if key in section.model_fields]
        sections = [below for field in fields for below in sections_of(field.annotation)]
    return sections


def _keys_of(path: KeyPath, data: dict[str, Any]) -> list[str]:
    sections = _sections_at(path)
    if path == ("logger",) and data:
        provider = data["logger"].get("provider")
        sections = [section for section in sections if provider in _choices_of(section)] or sections
    return list(dict.fromkeys(key for section in sections for key in section.model_fields))


def _choices_of(section: type[Section]) -> tuple[Any, ...]:
    """Return the `provider` values of a logger's section class."""
    return get_args(section.model_fields["provider"].annotation)


def _help(path: KeyPath) -> str:
    return next((field.description or "" for field in _fields_at(path)), "")


def _is_required(path: KeyPath) -> bool:
    return any(field.is_required() for field in _fields_at(path))


def _fields_at(path: KeyPath) -> list[FieldInfo]:
    sections = _sections_at(path[:-1])
    return [section.model_fields[str(path[-1])] for section in sections if path[-1] in section.model_fields]


def _to_write(description: str) -> str:
    first = " ".join(description.split()).partition(". ")[0]
    return f"add it ({first.rstrip('.')})"


def _lines(notes: list[tuple[Origin, str]]) -> tuple[str, ...]:
    return tuple(f"{origin.label}: {text}" for origin, text in sorted(notes, key=lambda note: note[0].order))


def _keys(data: dict[str, Any], above: KeyPath = ()) -> Iterator[str]:
    for key, value in data.items():
        yield dotted((*above, key))
        if isinstance(value, dict):
            yield from _keys(value, (*above, key))

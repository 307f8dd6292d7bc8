"""Load a FinetuneConfig from a YAML file and `key=value` overrides.

Every error is reported on its own line: file and line (or the override), the key, the value, and how to fix it.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from configs import legacy
from configs.schema import LENGTH_KEYS, ConflictError, FinetuneConfig, Section, sections_of
from configs.yaml_source import (
    MAX_BYTES,
    MAX_DEPTH,
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
)

__all__ = ["ConfigError", "LoadedConfig", "flat", "load_config", "to_yaml"]

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
    document = _read(path)
    for number, override in enumerate(overrides):
        _apply_override(document, override, _AFTER_ALL_LINES + number)
    _let_an_override_decide_the_length(document)
    migration = legacy.migrate(document)
    document.problems += _secrets(document)
    config, errors = _validate(document.data)
    if errors:
        document.problems += islice(_field_problems(document, errors), MAX_PROBLEMS)
    if document.problems or config is None:
        ordered = sorted(document.problems, key=lambda problem: problem.origin.order)
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
    return yaml.dump(
        config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000
    )


def default_keys(loaded: LoadedConfig) -> list[str]:
    """Return the keys that neither the file nor an override sets, dotted for sections, in declaration order."""
    return [key for key in flat(loaded.config.model_dump(mode="json")) if key not in loaded.given_keys]


def to_marked_yaml(loaded: LoadedConfig) -> str:
    """Return the resolved configuration as YAML, with a comment after each default."""
    defaults, above, lines = set(default_keys(loaded)), [], []
    for line in to_yaml(loaded.config).splitlines():
        depth = (len(line) - len(line.lstrip())) // _INDENT
        above = [*above[:depth], line.strip().partition(":")[0]]
        lines.append(f"{line}  # default" if ".".join(above) in defaults else line)
    return "\n".join(lines) + "\n"


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Flatten sections into dotted keys: {"lora_config": {"r": 8}} -> {"lora_config.r": 8}."""
    keys = {}
    for key, value in settings.items():
        name = f"{above}{key}"
        keys |= flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return keys


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes text which YAML would otherwise read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    reads_as_text = isinstance(plain_scalar(text), str) and text.isprintable()
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if reads_as_text else '"')


_Dumper.add_representer(str, _represent_text)


def _read(path: Path) -> Document:
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
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text: save the file as UTF-8") from error
    document = parse_yaml(text, lambda line: Origin(f"{path}:{line}", line), legacy.IGNORED)
    if document.data is None and not document.problems:
        raise ConfigError(f"{path}:1: is empty: add at least `model_id` and `train_path`")
    if not isinstance(document.data, dict):
        raise ConfigError(f"{document.origin(()).label}: is not a mapping: write lines of `key: value`")
    return document


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
        value = parse_yaml(value_text, lambda line: origin)
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
                f"`{dotted(path)}` looks like a secret (not shown here): {_TOKENS}",
            )


_TOKENS = (
    "tokens and keys come from the environment (HF_TOKEN, AWS_*), never from the YAML or the command line"
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
        yield Problem(path, origin, f"`{dotted(path)}` is missing: {_to_write(_help(path))}")
    elif "extra_forbidden" in kinds:
        yield Problem(path, origin, _unknown_key(document.data, path))
    elif of_key := [error for error in errors if error["loc"][-1] == "[key]"]:
        is_choice = of_key[0]["type"] == "literal_error"
        expected = f"one of {_choices(of_key[0])}" if is_choice else _phrase(of_key[0])
        yield Problem(path, origin, f"`{dotted(path)}` is not a key of `{dotted(path[:-1])}`: use {expected}")
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
        near = difflib.get_close_matches(value.lower(), choices, n=1)
        return f" (did you mean `{near[0]}`?)" if near else ""
    return ""


def _choices_list(error: ErrorDetails) -> list[str]:
    return _choices(error).replace(" or ", ",").split(",") if error["type"] == "literal_error" else []


def _unknown_key(data: dict[str, Any], path: KeyPath) -> str:
    """Return the message for an unknown key; it never contains the value, which may be a secret."""
    key = str(path[-1])
    if any(names_secret(str(part)) for part in path):
        return f"`{dotted(path)}` is not a key (its value is not shown): {_TOKENS}"
    siblings = _keys_of(path[:-1], data)
    if near := difflib.get_close_matches(key.lower(), siblings, n=1):
        return f"`{dotted(path)}` is not a key: did you mean `{dotted((*path[:-1], near[0]))}`?"
    elsewhere = [name for name in FinetuneConfig.model_fields if key in _keys_of((name,), {})]
    if key in FinetuneConfig.model_fields and len(path) > 1:
        return (
            f"`{dotted(path)}` is not a key: `{key}` belongs at the top level, not in `{dotted(path[:-1])}`"
        )
    if elsewhere:
        return f"`{dotted(path)}` is not a key: did you mean `{elsewhere[0]}.{key}`?"
    if near := difflib.get_close_matches(key.lower(), siblings, n=1, cutoff=0.5):
        return f"`{dotted(path)}` is not a key (the closest is `{dotted((*path[:-1], near[0]))}`): remove it"
    return f"`{dotted(path)}` is not a key: remove it"


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
    return f"add it ({' '.join(description.split()).rstrip('.')})"


def _lines(notes: list[tuple[Origin, str]]) -> tuple[str, ...]:
    return tuple(f"{origin.label}: {text}" for origin, text in sorted(notes, key=lambda note: note[0].order))


def _keys(data: dict[str, Any], above: KeyPath = ()) -> Iterator[str]:
    for key, value in data.items():
        yield dotted((*above, key))
        if isinstance(value, dict):
            yield from _keys(value, (*above, key))

"""Load a FinetuneConfig from a YAML file and `key=value` overrides.

Every error is reported on its own line: file and line (or the override), the key, the value, and how to fix it.
"""

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from configs import legacy, other_tools
from configs.explain import field_problems, path_in_data
from configs.schema import LENGTH_KEYS, FinetuneConfig
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
    shown,
    without_variables,
)
from configs.yaml_writer import commented_yaml, dump
from utils.command_line import main_line

__all__ = ["ConfigError", "LoadedConfig", "flat", "load_config", "load_text", "to_yaml", "with_written"]

MAX_PROBLEMS = 50
"""Maximum number of lines in a report; a file with more errors is probably not a configuration."""

_DATA_FILES = (".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst")

# Lines of a file come first in a report, then the overrides in order.
_AFTER_ALL_LINES = MAX_BYTES + 1


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

    written: Mapping[str, Any] = field(default_factory=dict)
    """Values that the user of a submitted job wrote for the keys whose files were packed. They identify the run."""

    def as_written(self, config: FinetuneConfig) -> FinetuneConfig:
        """Return a configuration of this run with the values that the user wrote."""
        return config.model_copy(update=dict(self.written))


def load_config(path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a YAML file, apply overrides in order, and validate the result.

    Accesses only the file itself: no bucket, no data, no other file. A ConfigError contains all errors.

    Args:
        path: the YAML file.
        overrides: `key=value`, with dotted keys (`lora_config.r=16`) and values as in the YAML; `key=null` unsets a key.
    """
    if path.suffix in _DATA_FILES:
        raise ConfigError(
            f"{path}: is a data file, and training takes a YAML. Set its train_path: {main_line('CONFIG.yaml', f'train_path={path}')}"
        )
    return load_text(read_text(path), path, overrides)


def load_text(text: str, path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Validate the text of a YAML; arguments and errors as of load_config."""
    document = _parse(text, path)
    if tool := _other_tool(document.data):
        raise ConfigError(
            f"{path}: this is a YAML of {other_tools.TOOL_NAMES[tool]}. Translate it: {main_line('convert', str(path), '--to', 'NEW.yaml')}"
        )
    for number, override in enumerate(overrides):
        _apply_override(document, override, _AFTER_ALL_LINES + number)
    _reject_repeated(document, overrides)
    _let_an_override_decide_the_length(document)
    migration = legacy.migrate(document)
    document.problems += _secrets(document)
    config, errors = _validate(document.data)
    if errors:
        document.problems += islice(field_problems(document, errors), MAX_PROBLEMS)
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


def with_written(packed: LoadedConfig, original: LoadedConfig) -> LoadedConfig:
    """Return the configuration of a job with the values of the one that it was packed from, except its storage_path."""
    keys = [key for key in FinetuneConfig.model_fields if key != "storage_path"]
    values = {key: getattr(original.config, key) for key in keys}
    changed = {key: value for key, value in values.items() if getattr(packed.config, key) != value}
    return replace(packed, written=changed)


def to_yaml(config: FinetuneConfig, *, only_given: bool = False) -> str:
    """Return the resolved configuration as YAML from which `load_config` restores it, with keys in declaration order.

    Args:
        config: The configuration.
        only_given: Omit keys that have their default value.
    """
    return dump(without_variables(config.model_dump(mode="json", exclude_unset=only_given)))


def default_keys(loaded: LoadedConfig) -> list[str]:
    """Return the keys that neither the file nor an override sets, dotted for sections, in declaration order."""
    return [key for key in flat(loaded.config.model_dump(mode="json")) if key not in loaded.given_keys]


def to_marked_yaml(loaded: LoadedConfig) -> str:
    """Return the resolved configuration as YAML, with a comment after each default."""
    comments = dict.fromkeys(default_keys(loaded), "default")
    settings = without_variables(loaded.config.model_dump(mode="json"))
    return "\n".join(commented_yaml(settings, comments)) + "\n"


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Flatten sections into dotted keys: {"lora_config": {"r": 8}} -> {"lora_config.r": 8}."""
    keys = {}
    for key, value in settings.items():
        name = f"{above}{key}"
        keys |= flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return keys


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
        advice = "write key=value or section.key=value, without spaces around ="
        if not separator and key.endswith((".yaml", ".yml")):
            advice = "one command runs one YAML"
        document.problems.append(Problem((override,), origin, f"invalid override: {advice}"))
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


def _conflicts_beside(document: Document, errors: list[ErrorDetails]) -> list[Problem]:
    """Return the conflicts between keys that other errors hide: those that the file still has without its wrong values.

    A conflict that names a wrong key is not reported, because the right value may resolve it.
    """
    wrong = {path_in_data(document.data, error) for error in errors} | {
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
        for problem in field_problems(document, conflicts)
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


def _lines(notes: list[tuple[Origin, str]]) -> tuple[str, ...]:
    return tuple(f"{origin.label}: {text}" for origin, text in sorted(notes, key=lambda note: note[0].order))


def _keys(data: dict[str, Any], above: KeyPath = ()) -> Iterator[str]:
    for key, value in data.items():
        yield dotted((*above, key))
        if isinstance(value, dict):
            yield from _keys(value, (*above, key))

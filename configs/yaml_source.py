"""Parse YAML text into plain data that records the source line of every value.

Mappings, lists, scalars, anchors and merge keys are supported; tags and duplicate keys are errors. Scalars are interpreted as
they look: `5e-6` is a number; `yes`, `on`, `12:30` and `2024-01-01` are text. `${NAME}` and `${NAME:-default}` in a value stand
for an environment variable.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from utils.errors import AnnealError

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_ANCHORS = 100
MAX_COPIED_VALUES = 1_000
"""Maximum number of values that aliases may add to a file, so that nested aliases do not exhaust memory."""

TEMPLATES = ("chat_template", "prompt_template")
"""Keys with placeholders of their own, in which no variable is replaced."""

SECRETS_COME_FROM = "secrets come from the environment (HF_TOKEN, AWS_*), not from YAML or arguments"

KeyPath = tuple[str | int, ...]
"""Path to a value: keys of mappings and indices of lists; `()` is the complete document."""


class ConfigError(AnnealError):
    """An error in the YAML or in an override; the message is complete."""


@dataclass(frozen=True)
class Origin:
    """The source location of a value."""

    label: str
    """Prefix of a message: `run.yaml:12` or `override 'seed=1'`."""

    order: int
    """Sort key of messages: lines of the file, then overrides."""

    from_override: bool = False


@dataclass(frozen=True)
class Problem:
    """One error: its key, its location, and how to fix it."""

    path: KeyPath
    origin: Origin
    text: str
    rank: int = 2
    """Importance: 0 comes first."""
    is_missing: bool = False
    """True for a required key that is not there."""

    def __str__(self) -> str:
        return f"{self.origin.label}: {self.text}"


@dataclass
class Document:
    """Parsed data, the origin of each value in it, and the syntax errors found during parsing."""

    data: Any
    origins: dict[KeyPath, Origin]
    problems: list[Problem] = field(default_factory=list)

    def origin(self, path: KeyPath) -> Origin:
        """Return the origin of `path`, or of the nearest enclosing section with a known origin."""
        while path not in self.origins:
            path = path[:-1]
        return self.origins[path]

    def complain(self, path: KeyPath, text: str) -> None:
        """Add a problem with the value at `path`."""
        self.problems.append(Problem(path, self.origin(path), text))

    def put(self, path: KeyPath, value: "Document") -> None:
        """Set `path`, whose section must exist, to the data and origins of another document."""
        section = self.data
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = value.data
        self.origins = {known: origin for known, origin in self.origins.items() if known[: len(path)] != path}
        self.origins.update({(*path, *below): origin for below, origin in value.origins.items()})
        self.problems += [
            Problem((*path, *problem.path), problem.origin, problem.text, problem.rank)
            for problem in value.problems
        ]


def parse_yaml(
    text: str,
    origin_at: Callable[[int], Origin],
    repeatable: frozenset[str] = frozenset(),
    variables: Mapping[str, str] | None = None,
) -> Document:
    """Parse one YAML document.

    Args:
        text: the document; empty text gives None.
        origin_at: returns the origin of a line (lines count from 1).
        repeatable: top-level keys that may occur more than once (the last one wins).
        variables: environment variables for `${NAME}`; None: such text stays as it is.
    """
    return _Builder(_events(text, origin_at), origin_at, repeatable, variables).document()


def without_variables(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in which parsing replaces no variable: `${NAME}` becomes `$${NAME}`, except in templates."""
    return {key: value if key in TEMPLATES else _escaped(value) for key, value in settings.items()}


def has_variable(value: Any) -> bool:
    """Return true for text that contains `${NAME}`."""
    return isinstance(value, str) and _VARIABLE.search(value) is not None


def unescaped(value: Any) -> Any:
    """Return data that was read without variables as parsing returns it: `$${NAME}` becomes `${NAME}`, except in templates."""
    if isinstance(value, dict):
        return {key: below if key in TEMPLATES else unescaped(below) for key, below in value.items()}
    if isinstance(value, list):
        return [unescaped(below) for below in value]
    if not isinstance(value, str):
        return value
    return _VARIABLE.sub(lambda match: match[0][1:] if len(match[1]) > 1 else match[0], value)


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_escaped(below) for below in value]
    return _VARIABLE.sub(r"$\g<0>", value) if isinstance(value, str) else value


def dotted(path: KeyPath) -> str:
    """Return a path as messages print it: `("lora_config", "r")` -> `lora_config.r`."""
    return _presentable(".".join(str(part) for part in path))


def shown(value: object) -> str:
    """Return a value as messages print it: one line, shortened, and masked if it looks like a secret."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return _presentable(text)


def _presentable(text: str) -> str:
    if looks_secret(text):
        return "(not shown)"
    # A surrogate or a control character in a message would break the terminal.
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= 80 else f"{text[:50]}...{text[-20:]}"


def looks_secret(text: str) -> bool:
    """Return true for text that contains a token, a key, or a URL with credentials."""
    return _SECRET_VALUE.search(text) is not None


def names_secret(key: str) -> bool:
    """Return true for a key whose value is probably secret, such as `hf_token` or `aws_secret_access_key`."""
    return _SECRET_KEY.search(key) is not None


_SECRET_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}"
    r"|\b(AKIA|ASIA)[0-9A-Z]{12,}"
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bsk-[A-Za-z0-9_-]{20,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|://[^/\s:@]*:[^/\s@]+@"
    r"|[?&](X-Amz-(Signature|Credential|Security-Token)|AWSAccessKeyId|sig|token|access_key)=",
    re.IGNORECASE,
)
_SECRET_KEY = re.compile(
    r"secret|passw(or)?d|credential|private_?key|api_?key|access_?key"
    r"|^token$|(hf|hub|huggingface|auth|access|api|session|tracking|wandb|use_auth)_?token",
    re.IGNORECASE,
)

_SECRET_VARIABLE = re.compile(r"(token|pass|pwd)$", re.IGNORECASE)
"""Variables that hold a secret, beyond the names of keys: GITLAB_TOKEN and DB_PASS, while the key pad_token is none."""

_VARIABLE = re.compile(r"(\$+)\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
# Forty digits are enough, and stay below Python's limit for converting long integers.
_DIGITS = r"[0-9](?:_?[0-9])*"
_INT = re.compile(r"[-+]?(0|[1-9](_?[0-9]){0,40})\Z")
_FLOAT = re.compile(rf"[-+]?({_DIGITS}(\.({_DIGITS})?)?|\.{_DIGITS})([eE][-+]?[0-9]+)?\Z")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z")
_SURROGATE = re.compile("[\ud800-\udfff]")


def plain_scalar(text: str) -> Any:
    """Return the value of an unquoted scalar: None, a bool, an int, a float, or the text itself."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.match(text):
        return int(text)
    # `007` and digit strings too long for _INT stay text, because the intended number is unclear.
    if _FLOAT.match(text) and any(mark in text for mark in ".eE"):
        return float(text)
    if _NOT_FINITE.match(text):
        return float(text.replace(".", "", 1))
    return text


def _events(text: str, origin_at: Callable[[int], Origin]) -> Iterator[yaml.Event]:
    """Yield the parser's events; convert its exceptions into ConfigError."""
    line = 1
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = event.end_mark.line + 1
            yield event
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{origin_at(line).label}: the line contains a control character: delete it, or save the "
            f"file as plain text"
        ) from error
    except yaml.MarkedYAMLError as error:
        # A missing colon is noticed in the next line.
        mark = error.context_mark if _NO_COLON in (error.problem or "") else error.problem_mark
        if mark is not None:
            line = mark.line + 1
        raise ConfigError(
            f"{origin_at(line).label}: not valid YAML: {_advice(error.problem or '')}"
        ) from error
    except (ValueError, OverflowError) as error:
        # PyYAML does not catch errors of chr() and int() for an escape or a directive that is out of range.
        raise ConfigError(
            f"{origin_at(line).label}: not valid YAML: an escape or directive is out of range"
        ) from error


_NO_COLON = "could not find expected ':'"


def _advice(problem: str) -> str:
    if _NO_COLON in problem:
        return f"{problem}: write `key: value`, with a space after the colon"
    if "mapping values are not allowed" in problem:
        return f"{problem}: check the indentation, and quote text that contains `: `"
    if "',' or '}'" in problem:
        return f'{problem}: quote text that contains `{{` or `}}` between braces, such as "${{NAME}}"'
    if "<block end>" in problem:
        return f"{problem}: check the indentation, the quotes and the `key: value` form of this line"
    if "'\\t'" in problem:
        return f"{problem}: replace the tab with spaces"
    if "cannot start any token" in problem:
        return f"{problem}: indent with spaces, and quote text that starts with a special character"
    if "end of stream" in problem:
        return f"{problem}: close the quote or bracket that is open at the end of the file"
    return problem


class _Builder:
    """A builder that converts parser events into data and collects syntax errors."""

    def __init__(
        self,
        events: Iterator[yaml.Event],
        origin_at: Callable[[int], Origin],
        repeatable: frozenset[str],
        variables: Mapping[str, str] | None,
    ):
        self._events = events
        self._origin_at = origin_at
        self._repeatable = repeatable
        self._variables = variables
        self._anchors: dict[str, Document] = {}
        self._anchor_count = 0
        self._copied = 0
        self._document = Document(None, {(): origin_at(1)})

    def document(self) -> Document:
        next(self._events)  # the start of the stream
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return self._document
        self._document.data = self._node(next(self._events), ())
        next(self._events)  # the end of the document
        after = next(self._events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise ConfigError(
                f"{self._here(after).label}: a second YAML document starts here: keep only one, "
                f"without `---` lines"
            )
        return self._document

    def _here(self, event: yaml.Event) -> Origin:
        return self._origin_at(event.start_mark.line + 1)

    def _node(self, event: yaml.Event, path: KeyPath) -> Any:
        if len(path) > MAX_DEPTH:
            raise ConfigError(f"{self._here(event).label}: nested more than {MAX_DEPTH} levels deep")
        self._document.origins.setdefault(path, self._here(event))
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, path)
        assert isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent))
        if event.tag is not None:
            self._document.complain(path, f"{_name(path)} has a tag (`!...`): write the plain value")
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, path)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._sequence(path)
        else:
            value = self._mapping(path)
        if event.anchor is not None:
            self._remember(event.anchor, path, value)
        return value

    def _remember(self, anchor: str, path: KeyPath, value: Any) -> None:
        self._anchor_count += 1
        if self._anchor_count > MAX_ANCHORS:
            raise ConfigError(
                f"{self._document.origin(path).label}: `&{anchor}` is more than the {MAX_ANCHORS} anchors of a file: "
                "write the values themselves"
            )
        depth, origins = len(path), self._document.origins
        below = {known[depth:]: origin for known, origin in origins.items() if known[:depth] == path}
        self._anchors[anchor] = Document(value, below)

    def _alias(self, event: yaml.AliasEvent, path: KeyPath) -> Any:
        """Return a copy of the anchor's value; errors in it have the lines of the anchor."""
        meant = self._anchors.get(event.anchor)
        if meant is None:
            self._document.complain(
                path,
                f"{_name(path)} is an alias (`*{event.anchor}`) without an anchor `&{event.anchor}` before it",
            )
            return None
        self._count_copies(len(meant.origins), event)
        if len(path) + max(map(len, meant.origins)) > MAX_DEPTH:
            raise ConfigError(f"{self._here(event).label}: nested more than {MAX_DEPTH} levels deep")
        self._document.origins.update(
            {(*path, *below): origin for below, origin in meant.origins.items() if below}
        )
        return copy.deepcopy(meant.data)

    def _count_copies(self, values: int, event: yaml.Event) -> None:
        self._copied += values
        if self._copied > MAX_COPIED_VALUES:
            raise ConfigError(
                f"{self._here(event).label}: aliases and `<<` add more than {MAX_COPIED_VALUES:,} values to the file: write fewer"
            )

    def _scalar(self, event: yaml.ScalarEvent, path: KeyPath) -> Any:
        if _SURROGATE.search(event.value):
            self._document.complain(
                path, f"{_name(path)} contains half a character (a lone surrogate): retype it"
            )
            return None
        text = event.value
        if self._variables is not None and "${" in text and path[:1] not in [(key,) for key in TEMPLATES]:
            replaced = self._replace_variables(text, path)
            if replaced is None:
                return None
            text = replaced
        return text if event.style else plain_scalar(text)

    def _replace_variables(self, text: str, path: KeyPath) -> str | None:
        """Replace the variables in a value; None after a problem with one of them."""
        problems = len(self._document.problems)

        def value_of(match: re.Match[str]) -> str:
            dollars, name, default = match.groups()
            if len(dollars) > 1:
                return match[0][1:]
            assert self._variables is not None
            value = self._variables.get(name) or default
            if value is None:
                state = "empty" if name in self._variables else "not set"
                self._document.complain(
                    path,
                    f"{_name(path)} uses ${{{name}}}, which is {state}: set it, or write ${{{name}:-DEFAULT}}",
                )
            elif names_secret(name) or _SECRET_VARIABLE.search(name) or looks_secret(value):
                self._document.complain(
                    path, f"{_name(path)} uses ${{{name}}}, which is a secret: {SECRETS_COME_FROM}"
                )
            return value or ""

        replaced = _VARIABLE.sub(value_of, text)
        return replaced if len(self._document.problems) == problems else None

    def _sequence(self, path: KeyPath) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            items.append(self._node(event, (*path, len(items))))
        return items

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            if isinstance(event, yaml.ScalarEvent) and event.value == "<<" and not event.style:
                self._merge(merged, event, path)
                continue
            key = self._key(event, path)
            origin = self._here(event)
            below = (*path, key)
            if key in mapping and not (path == () and key in self._repeatable):
                first = self._document.origins[below].label
                self._document.problems.append(
                    Problem(below, origin, f"`{dotted(below)}` is set twice, first at {first}: keep one")
                )
            if key in merged:
                self._forget(below)
                del merged[key]
            self._document.origins[below] = origin
            mapping[key] = self._node(next(self._events), below)
        return {**merged, **mapping}

    def _merge(self, merged: dict[str, Any], event: yaml.Event, path: KeyPath) -> None:
        """Add the keys of `<<: *anchor`, or of a list of aliases; keys that the mapping itself sets win."""
        here, place = self._here(event), (*path, "<<")
        self._document.origins[place] = here
        value = self._node(next(self._events), place)
        parts = value if isinstance(value, list) else [value]
        for index, part in enumerate(parts):
            source = (*place, index) if isinstance(value, list) else place
            if not isinstance(part, dict):
                if not any(problem.path[: len(place)] == place for problem in self._document.problems):
                    self._unusable(
                        event,
                        path,
                        "`<<` merges a section: write `<<: *NAME`, with `&NAME` at a section before it",
                    )
                continue
            self._count_copies(1 + len(part), event)
            for key, below in part.items():
                if key not in merged and (*path, key) not in self._document.origins:
                    merged[key] = below
                    self._move((*source, key), (*path, key))
        self._forget(place)

    def _move(self, source: KeyPath, target: KeyPath) -> None:
        origins, depth = self._document.origins, len(source)
        for known in [known for known in origins if known[:depth] == source]:
            origins[(*target, *known[depth:])] = origins[known]

    def _forget(self, path: KeyPath) -> None:
        origins = self._document.origins
        for known in [known for known in origins if known[: len(path)] == path]:
            del origins[known]

    def _key(self, event: yaml.Event, path: KeyPath) -> str:
        """Return the key as written (`1` and `on` are text), or a placeholder for an invalid one."""
        if not isinstance(event, yaml.ScalarEvent):
            self._node(event, (*path, "?"))
            self._unusable(event, path, "a key is a list, a mapping or an alias: keys must be plain text")
            return "?"
        if event.anchor is not None or event.tag is not None or _SURROGATE.search(event.value):
            self._unusable(
                event, path, "a key has an anchor, a tag or half a character: keys must be plain text"
            )
            return "?"
        if not event.value:
            self._unusable(event, path, "a key is empty: write `key: value`")
            return "?"
        return event.value

    def _unusable(self, event: yaml.Event, path: KeyPath, text: str) -> None:
        self._document.problems.append(Problem((*path, "?"), self._here(event), text))


def _name(path: KeyPath) -> str:
    return f"`{dotted(path)}`" if path else "the document"

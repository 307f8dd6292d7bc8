"""Rows as people write them -> checked conversations. Every refusal names the file, the row and the reason."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = dict[str, str]

_ROLES = ("system", "user", "assistant")
_OTHER_FORMATS = {".csv", ".tsv", ".arrow", ".gz", ".zst", ".zip", ".xlsx"}
_MAX_SHOWN = 5
_HUB_PREFIX = "hf://datasets/"


class DataError(Exception):
    """Data that cannot be trained on; the message says where (file, row), what and what to do."""


class RowError(ValueError):
    """What is wrong with one row; the reader adds the file and the row's number."""


@dataclass(frozen=True)
class Conversation:
    """A row that can be learned from: either a chat, or a text as it is."""

    row: int
    """Its line (JSONL) or its position from 1 (Parquet, hub)."""
    messages: tuple[Message, ...] = ()
    text: str | None = None


def is_hub_dataset(uri: str) -> bool:
    """Whether the URI names a dataset of the Hugging Face hub."""
    return uri.startswith(_HUB_PREFIX)


def read_conversations(
    path: Path | None, source: str, *, columns: Mapping[str, str], whole_text: bool
) -> Iterator[Conversation]:
    """Read and check every row.

    Args:
        path: The file on this node; None for a dataset of the hub.
        source: The URI as the user wrote it, for messages.
        columns: Our name -> the name in the file, for columns that are called otherwise.
        whole_text: Accept plain `text` rows (the loss is then on every token).

    Raises:
        DataError: after the last row, with the first rows that are wrong and their count; at once for a file that
            cannot be read at all.
    """
    wrong: list[str] = []
    count = 0
    for row, value in read_rows(path, source):
        count += 1
        try:
            if isinstance(value, RowError):
                raise value
            conversation = _conversation(row, value, columns, whole_text)
        except RowError as error:
            wrong.append(f"{source}:{row}: {error}")
            continue
        yield conversation
    if wrong:
        more = f"\n… and {len(wrong) - _MAX_SHOWN} more rows" if len(wrong) > _MAX_SHOWN else ""
        raise DataError(
            f"{len(wrong)} of {count} rows cannot be trained on:\n"
            + "\n".join(wrong[:_MAX_SHOWN])
            + more
            + "\nMend or remove them."
        )
    if count == 0:
        raise DataError(
            f"{source}: holds no rows. Name a JSONL or Parquet file with at least one conversation."
        )


def read_rows(path: Path | None, source: str) -> Iterator[tuple[int, Any]]:
    """Yield (row number, row): a row is a dictionary, or a RowError that says why it could not be read."""
    if path is None:
        yield from _read_hub(source)
    elif path.suffix == ".parquet" or source.endswith(".parquet"):
        yield from _read_parquet(path, source)
    elif path.suffix in _OTHER_FORMATS:
        raise DataError(
            f"{source}: {path.suffix} files are not read. Write JSONL (one JSON object a line) or Parquet, with the extension .jsonl or .parquet."
        )
    else:
        yield from _read_jsonl(path)


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            yield number, _parse_line(line)


def _parse_line(line: bytes) -> Any:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RowError(f"is not UTF-8 (byte {error.start + 1}). Save the file as UTF-8")
    except ValueError as error:
        return RowError(f"is not JSON ({error}). One JSON object a line is expected")
    except RecursionError:
        return RowError("is nested too deeply to be a conversation")
    if not isinstance(value, dict):
        return RowError(f"is {_json_type(value)}. One JSON object a line is expected")
    return value


def _read_parquet(path: Path, source: str) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1000):
                for value in batch.to_pylist():
                    number += 1
                    yield number, value
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{source}: no Parquet file, or a damaged one ({str(error).splitlines()[0]}). Write it again."
        ) from error


def parse_hub_uri(uri: str) -> tuple[str, str | None, str]:
    """`hf://datasets/ORG/NAME[/CONFIG][?split=SPLIT]` -> (ORG/NAME, CONFIG, SPLIT); the split is `train` unless named.

    Raises:
        DataError: the URI has another shape.
    """
    path, _, query = uri.removeprefix(_HUB_PREFIX).partition("?")
    parts = path.strip("/").split("/")
    split = "train"
    if query:
        key, _, split = query.partition("=")
        if key != "split" or not split:
            raise DataError(f"{uri}: after `?` only `split=...` is known, as in ?split=train[50%:].")
    if len(parts) not in (2, 3) or not all(parts):
        raise DataError(f"{uri}: write hf://datasets/ORG/NAME/CONFIG?split=train (CONFIG may be left out).")
    return f"{parts[0]}/{parts[1]}", parts[2] if len(parts) == 3 else None, split


def _read_hub(source: str) -> Iterator[tuple[int, Any]]:
    import datasets
    from datasets.exceptions import DatasetsError

    name, config, split = parse_hub_uri(source)
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{source}: cannot be read from the Hugging Face hub ({str(error).splitlines()[0]}). Check its name, config and split; "
            "a gated one needs HF_TOKEN; without a network, name a JSONL file instead."
        ) from error
    yield from enumerate(dataset, start=1)


def _conversation(
    row: int, value: dict[str, Any], columns: Mapping[str, str], whole_text: bool
) -> Conversation:
    def column(name: str) -> Any:
        return value.get(columns.get(name, name))

    if (messages := column("messages")) is not None:
        return Conversation(row, messages=_check_messages(messages))
    prompt, completion = column("prompt"), column("completion")
    if prompt is not None and completion is not None:
        question = _checked_text(prompt, f"`{columns.get('prompt', 'prompt')}`")
        answer = _checked_text(completion, f"`{columns.get('completion', 'completion')}`")
        return Conversation(
            row, messages=({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        )
    if whole_text and (text := column("text")) is not None:
        return Conversation(row, text=_checked_text(text, f"`{columns.get('text', 'text')}`"))
    expected = "`messages`, or `prompt` and `completion`" + (", or `text`" if whole_text else "")
    names = [f"{name} (null)" if value[name] is None else name for name in value]
    found = ", ".join(names[:6]) or "nothing"
    raise RowError(
        f"has no {expected} (found: {found}). If they are called otherwise, say so: columns: {{prompt: question}}"
    )


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _checked_text(text: Any, what: str) -> str:
    if not isinstance(text, str):
        raise RowError(f"{what} is {_json_type(text)}, not text")
    if not text.strip():
        raise RowError(f"{what} is empty")
    if "\x00" in text:
        raise RowError(f"{what} holds a NUL character")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RowError(f"{what} holds half of a surrogate pair, which is no character")
    return text


def _check_messages(messages: Any) -> tuple[Message, ...]:
    if not isinstance(messages, list | tuple):
        raise RowError(f"`messages` is {_json_type(messages)}, not a list of messages")
    if not messages:
        raise RowError("`messages` is an empty list")
    checked: list[Message] = []
    for position, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise RowError(f"message {position} is no object with role and content")
        role = message.get("role")
        if role not in _ROLES:
            raise RowError(f"message {position} has the role {role!r}. Known: {', '.join(_ROLES)}")
        content = _checked_text(message.get("content"), f"message {position} ({role})")
        previous = checked[-1]["role"] if checked else None
        if role == "system" and previous is not None:
            raise RowError(f"message {position}: a system message stands first or nowhere")
        if role == "assistant" and previous in (None, "system"):
            raise RowError(
                f"message {position}: an assistant message answers a user message, and there is none before it"
            )
        if role == previous:
            raise RowError(
                f"messages {position - 1} and {position} are both from the {role}: roles take turns"
            )
        checked.append({"role": role, "content": content})
    if not any(message["role"] == "assistant" for message in checked):
        raise RowError("has no assistant turn: there is nothing to learn from it")
    if checked[-1]["role"] != "assistant":
        raise RowError("ends with a user message that nobody answers")
    return tuple(checked)

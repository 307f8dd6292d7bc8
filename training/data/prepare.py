"""Conversations -> tokens and labels, prepared once a node and memory-mapped by everybody."""

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

from training.data.rows import Conversation, DataError, Message, read_conversations
from utils.files import checksum, checksum_bytes, file_lock, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100  # torch's cross-entropy skips this label

_FORMAT = 1  # raise it when prepared files change their meaning
_BATCH = 1000
_EXAMPLE_TOKENS = 400
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "tokenizer.model",
)
_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("tokens", pa.int32()),
        ("trained_tokens", pa.int32()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True)
class DataRequest:
    """What decides how a source becomes tokens."""

    source: str
    """The URI as the user wrote it."""
    path: str | None
    """The file on this node; None for a dataset of the hub."""
    columns: Mapping[str, str]
    task: Literal["instruction_tuning", "causal_lm"]
    context_length: int | None
    """Tokens a row may have; None: as many as it has, at most `max_context`."""
    max_context: int | None
    """Tokens that the model's positions reach."""
    long_rows: Literal["truncate", "drop", "error"]

    @property
    def limit(self) -> int | None:
        """Tokens a row may have, if anything limits them."""
        return self.context_length or self.max_context


@dataclass(frozen=True)
class DataSummary:
    """What was found in a source; lengths are in tokens."""

    rows: int
    tokens: int
    trained_tokens: int
    longest: int
    truncated_rows: int
    dropped_rows: int
    """Too long under `long_rows: drop`, or left without a trained token by truncation."""
    fingerprint: str
    example: list[tuple[str, bool]]
    """The first row in pieces: text, and whether the loss looks at it."""


@dataclass(frozen=True)
class PreparedData:
    """A source as tokens on this node's disk."""

    arrow_file: Path
    summary: DataSummary


def prepare_data(
    request: DataRequest, tokenizer: "PreTrainedTokenizerFast", tokenizer_dir: Path, cache_dir: Path
) -> PreparedData:
    """Tokenise a source, or find it tokenised already: one process of a node does it, the others wait and map the file.

    Raises:
        DataError: rows that cannot be trained on, or no place for their tokens.
    """
    fingerprint = _fingerprint(request, tokenizer_dir)
    directory = cache_dir / "prepared" / fingerprint.removeprefix("crc64nvme:")
    summary_file = directory / "summary.json"
    if not summary_file.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(directory.with_suffix(".lock")):
            if not summary_file.exists():
                _prepare(request, tokenizer, fingerprint, directory)
    summary = json.loads(summary_file.read_text("utf-8"))
    summary["example"] = [(text, trained) for text, trained in summary["example"]]
    return PreparedData(directory / "data.arrow", DataSummary(**summary))


def _fingerprint(request: DataRequest, tokenizer_dir: Path) -> str:
    """Of everything that decides the tokens. The source counts by its content, so that a copy elsewhere is the same data."""
    content = checksum(Path(request.path)) if request.path else request.source
    tokenizer_files = [
        checksum(tokenizer_dir / name) for name in _TOKENIZER_FILES if (tokenizer_dir / name).exists()
    ]
    settings = asdict(request) | {"source": content, "path": None, "columns": sorted(request.columns.items())}
    return checksum_bytes(json.dumps([_FORMAT, settings, tokenizer_files], sort_keys=True).encode())


def _prepare(
    request: DataRequest, tokenizer: "PreTrainedTokenizerFast", fingerprint: str, directory: Path
) -> None:
    staging = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".partial-"))
    try:
        summary = _write(request, tokenizer, fingerprint, staging / "data.arrow")
        write_atomically(staging / "summary.json", json.dumps(asdict(summary)).encode())
        staging.replace(directory)
    except OSError as error:
        raise DataError(
            f"{request.source}: its tokens cannot be written to {directory.parent} ({error}). Free some space, or set output_dir to "
            "another disk."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(
    request: DataRequest, tokenizer: "PreTrainedTokenizerFast", fingerprint: str, arrow_file: Path
) -> DataSummary:
    rows = tokens = trained_tokens = longest = truncated = dropped = 0
    example: list[tuple[str, bool]] = []
    too_long: list[str] = []
    conversations = read_conversations(
        Path(request.path) if request.path else None,
        request.source,
        columns=request.columns,
        whole_text=request.task == "causal_lm",
    )
    with pa.OSFile(str(arrow_file), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        for batch in _batched(conversations, _BATCH):
            columns: tuple[list, ...] = ([], [], [], [], [])
            for conversation, row_ids, row_labels in zip(
                batch, *tokenize(batch, tokenizer, request), strict=True
            ):
                if request.limit and len(row_ids) > request.limit:
                    if request.long_rows == "error":
                        too_long.append(f"{request.source}:{conversation.row}: {len(row_ids)} tokens")
                        continue
                    if request.long_rows == "drop":
                        dropped += 1
                        continue
                    truncated += 1
                    row_ids, row_labels = row_ids[: request.limit], row_labels[: request.limit]
                trained = sum(label != IGNORED for label in row_labels[1:])
                if trained == 0:
                    dropped += 1
                    continue
                rows += 1
                tokens += len(row_ids)
                trained_tokens += trained
                longest = max(longest, len(row_ids))
                for column, value in zip(
                    columns, (conversation.row, len(row_ids), trained, row_ids, row_labels), strict=True
                ):
                    column.append(value)
                if not example:
                    example = _mark(tokenizer, row_ids[:_EXAMPLE_TOKENS], row_labels[:_EXAMPLE_TOKENS])
            writer.write_batch(pa.record_batch(list(columns), schema=_SCHEMA))
    if too_long:
        shown = "\n".join(too_long[:5]) + (
            f"\n… and {len(too_long) - 5} more rows" if len(too_long) > 5 else ""
        )
        raise DataError(
            f"{request.source}: long_rows is error, and of its rows {len(too_long)} exceed {request.limit} tokens:\n{shown}\n"
            "Raise context_length, shorten them, or set long_rows to truncate or drop."
        )
    if rows == 0:
        advice = (
            "Raise context_length." if request.context_length else "The model takes no more: shorten them."
        )
        raise DataError(
            f"{request.source}: no row has a trained token within {request.limit} tokens ({dropped} rows dropped). {advice}"
        )
    return DataSummary(rows, tokens, trained_tokens, longest, truncated, dropped, fingerprint, example)


def tokenize(
    conversations: list[Conversation], tokenizer: "PreTrainedTokenizerFast", request: DataRequest
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids and labels of a batch: labels are the ids where the loss looks, IGNORED elsewhere.

    instruction_tuning trains the assistant's turns with their end marker, and nothing else; causal_lm every token.

    Raises:
        DataError: the chat template cannot render a row, or changes earlier turns when later ones come.
    """
    if request.task == "causal_lm":
        return _tokenize_whole(conversations, tokenizer, request)
    texts, spans = [], []
    for conversation in conversations:
        text, assistant_spans = _render_with_spans(conversation, tokenizer, request)
        texts.append(text)
        spans.append(assistant_spans)
    encoded = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False
    )
    ids: list[list[int]] = encoded["input_ids"]  # pyright: ignore[reportAssignmentType]
    labels = [
        _label_spans(row_ids, offsets, assistant_spans)
        for row_ids, offsets, assistant_spans in zip(ids, encoded["offset_mapping"], spans, strict=True)  # pyright: ignore[reportArgumentType]
    ]
    return ids, labels


def _tokenize_whole(
    conversations: list[Conversation], tokenizer: "PreTrainedTokenizerFast", request: DataRequest
) -> tuple[list[list[int]], list[list[int]]]:
    ids: list[list[int]] = []
    for conversation in conversations:
        if conversation.text is None:
            text = _render(conversation.messages, tokenizer, f"{request.source}:{conversation.row}")
            ids.append(tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]
            continue
        row_ids = list(tokenizer(conversation.text)["input_ids"])  # pyright: ignore[reportArgumentType]
        if tokenizer.eos_token_id is not None and row_ids[-1:] != [tokenizer.eos_token_id]:
            row_ids.append(tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]
        ids.append(row_ids)
    return ids, [list(row_ids) for row_ids in ids]


def _render(
    messages: Iterable[Message], tokenizer: "PreTrainedTokenizerFast", where: str, *, prompt: bool = False
) -> str:
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)  # pyright: ignore
    except TemplateSyntaxError as error:
        raise DataError(
            f"{where}: the model's chat template is broken ({error}, line {error.lineno} of it). Copy the tokenizer's files again from "
            "where the model came from."
        ) from error
    except TemplateError as error:
        raise DataError(
            f"{where}: the model's chat template refuses the row ({error}). Change the row's roles to what it takes."
        ) from error


def _render_with_spans(
    conversation: Conversation, tokenizer: "PreTrainedTokenizerFast", request: DataRequest
) -> tuple[str, list[tuple[int, int]]]:
    """The whole conversation as text, and where in it (characters) each assistant turn stands, its end marker included."""
    where = f"{request.source}:{conversation.row}"
    messages = conversation.messages
    whole = _render(messages, tokenizer, where)
    spans = []
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:position], tokenizer, where, prompt=True)
        after = (
            whole if position == len(messages) - 1 else _render(messages[: position + 1], tokenizer, where)
        )
        if not (whole.startswith(before) and whole.startswith(after)):
            raise DataError(
                f"{where}: the model's chat template renders message {position + 1} differently once others follow, so what "
                "to train on cannot be told. Keep one assistant turn a row, or use a model whose template only appends."
            )
        # The white space that a template puts behind the end marker is the next turn's beginning.
        spans.append((len(before), len(after.rstrip())))
    return whole, spans


def _label_spans(ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
    labels = [IGNORED] * len(ids)
    token = 0
    for start, end in spans:
        while token < len(ids) and offsets[token][1] <= start:
            token += 1
        while token < len(ids) and offsets[token][0] < end:
            labels[token] = ids[token]
            token += 1
    return labels


def _mark(tokenizer: "PreTrainedTokenizerFast", ids: list[int], labels: list[int]) -> list[tuple[str, bool]]:
    pieces: list[tuple[str, bool]] = []
    begin = 0
    for position in range(1, len(ids) + 1):
        trained = labels[begin] != IGNORED
        if position == len(ids) or (labels[position] != IGNORED) != trained:
            pieces.append((str(tokenizer.decode(ids[begin:position])), trained))
            begin = position
    return pieces


def _batched(conversations: Iterator[Conversation], size: int) -> Iterator[list[Conversation]]:
    while batch := list(islice(conversations, size)):
        yield batch

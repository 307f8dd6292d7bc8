"""Chunks of a source: consecutive rows, which are checked, rendered and tokenized together, in this process or in another."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, Any

from training.data.encoding import Encoder
from training.data.errors import RowError
from training.data.records import Chat, Example, Pair
from training.data.renderer import Renderer
from training.data.request import DataRequest
from training.data.rows import FORMAT_NAMES, RowSchema, read_row, recognise
from training.data.sources import parse_rows
from training.data.template_forms import has_reasoning
from training.data.token_files import RenderedRow, RowTokenizer, TokenizedRows, digest_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SHOWN_CHARACTERS = 2000


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows of one file, as they are stored."""

    file: int
    """Index in `DataRequest.files`."""
    stored: list[tuple[int, Any]]
    """(line or record number, what is stored there); see `OpenFile.stored`."""
    schema: RowSchema | None
    """Schema of the rows of their source; None if none of its rows so far has a known format."""
    only_faults: bool = False
    """True if an earlier row stops the run, so that only further faults are collected."""
    max_rows: int | None = None
    """Rows to take or, after a row that stops the run, to read; None: all."""


@dataclass(slots=True)
class ChunkResult:
    """The outcome of the rows of a chunk."""

    file: int
    read: int = 0
    taken: int = 0
    """Rows that can be trained on, before the token limit."""
    tokenized: TokenizedRows | None = None
    faults: list[tuple[int, str, str]] = field(default_factory=list)
    """(row, short name, message) of each rejected row."""
    skipped: list[tuple[int, str]] = field(default_factory=list)
    """(row, line of skipped_rows.jsonl) of each row that is not in the tokens."""
    notes: Counter[str] = field(default_factory=Counter)
    split_rows: int = 0
    split_sequences: int = 0
    """Sequences that the split rows became."""
    has_chats: bool = False
    has_reasoning: bool = False
    """True if an answer has reasoning, or an empty thought that the row writes."""


class ChunkTokenizer:
    """A tokenizer of chunks: it reads, checks, renders and tokenizes their rows."""

    def __init__(self, request: DataRequest, tokenizer: "PreTrainedTokenizerFast"):
        self._request = request
        self._ignored = frozenset(request.ignore_columns)
        self.renderer = Renderer(
            tokenizer,
            whole_text=request.task == "causal_lm",
            turns=request.turns,
            variables=dict(request.chat_template_kwargs),
            today=date.fromisoformat(request.date) if request.date else None,
        )
        self.renderer.template.reject_unknown_variables()
        encoder = Encoder(tokenizer, whole_text=request.task == "causal_lm")
        self._tokenizer = RowTokenizer(request, encoder)

    def find_schema(self, stored: list[tuple[int, Any]]) -> RowSchema | None:
        """Return how the rows of a source are read, by the first row that has a known format."""
        for _, value in parse_rows(stored):
            if not isinstance(value, RowError):
                try:
                    return self._schema_of(self._without_ignored(value)[0])
                except RowError:
                    continue
        return None

    def tokenize(self, chunk: Chunk) -> ChunkResult:
        """Check, render and tokenize the rows of a chunk."""
        result = ChunkResult(chunk.file)
        rendered = list(self._rendered(chunk, result))
        if rendered:
            result.tokenized = self._tokenizer.tokenize(rendered)
            for _, row, reason in result.tokenized.left_out:
                result.skipped.append((row, self._skipped_line(chunk, row, reason, None)))
        result.skipped.sort(key=lambda entry: entry[0])
        return result

    def _rendered(self, chunk: Chunk, result: ChunkResult) -> Iterator[RenderedRow]:
        request, renderer = self._request, self.renderer
        fails = chunk.only_faults
        for row, value in parse_rows(chunk.stored):
            if chunk.max_rows is not None and (result.read if fails else result.taken) >= chunk.max_rows:
                return
            result.read += 1
            ignored: frozenset[str] = frozenset()
            try:
                if isinstance(value, RowError):
                    raise value
                value, ignored = self._without_ignored(value)
                example = self._read(value, chunk.schema or self._schema_of(value))
                sequences = renderer.render(example)
            except RowError as error:
                result.faults.append((row, error.kind, str(error)))
                result.skipped.append((row, self._skipped_line(chunk, row, str(error), value)))
                fails |= request.bad_rows == "error"
                continue
            if fails:
                continue
            if request.share != (0.0, 1.0):
                begin, end = request.share
                if not begin <= digest_of(sequences, request.seed) / 2**64 < end:
                    continue
            if notes := (*example.notes, *renderer.notes(example, sequences)):
                result.notes.update(set(notes))
            result.notes.update(f"column `{name}` is ignored (ignore_columns)" for name in ignored)
            result.taken += 1
            result.has_chats |= isinstance(example, Chat | Pair)
            result.has_reasoning |= isinstance(example, Chat | Pair) and has_reasoning(example)
            if isinstance(example, Pair):
                only = int(bool(example.chosen)) if len(sequences) == 1 else None
                yield RenderedRow(chunk.file, row, sequences, only)
                continue
            if len(sequences) > 1:
                result.split_rows += 1
                result.split_sequences += len(sequences)
            for sequence in sequences:
                yield RenderedRow(chunk.file, row, (sequence,), getattr(example, "label", None))

    def _without_ignored(self, row: dict[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
        """Return a row without the columns that are ignored, and the names of those that it has."""
        ignored = self._ignored & row.keys()
        if not ignored:
            return row, ignored
        return {name: entry for name, entry in row.items() if name not in ignored}, ignored

    def _schema_of(self, row: dict[str, Any]) -> RowSchema:
        request = self._request
        columns = dict(request.columns)
        data_format = request.data_format
        if data_format == "auto":
            data_format = recognise(
                row, columns, request.task, request.prompt_template, unpaired=request.unpaired
            )
        return RowSchema(
            request.task, data_format, columns, request.prompt_template, request.labels, request.unpaired
        )

    def _read(self, row: dict[str, Any], schema: RowSchema) -> Example:
        try:
            return read_row(row, schema)
        except RowError as error:
            if self._request.data_format == "auto":
                other = recognise(
                    row, schema.columns, schema.task, schema.prompt_template, unpaired=schema.unpaired
                )
                if other != schema.data_format:
                    raise RowError(
                        "mixed formats",
                        f"has the format {FORMAT_NAMES[other]}, but earlier rows have {FORMAT_NAMES[schema.data_format]}. Use a separate "
                        "source for each format",
                    ) from error
            raise

    def _skipped_line(self, chunk: Chunk, row: int, reason: str, value: Any) -> str:
        """Return the line of skipped_rows.jsonl about a row."""
        file = self._request.files[chunk.file].uri
        line = {"file": file, "row": row, "reason": reason, "content": _shown(value)}
        return json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def _shown(value: Any) -> str:
    if value is None or isinstance(value, RowError):
        return ""
    try:
        return json.dumps(value, ensure_ascii=False, default=str)[:_SHOWN_CHARACTERS]
    except RecursionError:
        return "(nested too deeply to display)"

"""Summary of prepared rows: counts, lengths, duplicates and examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.schema import DataFormat
from training.data.row_index import IGNORED, RowIndex, contains
from training.data.sources import DataFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_EXAMPLES, _EXAMPLE_PIECES = 3, 8
PIECE_TOKENS = 200  # shown per piece of an example, half from its start and half from its end
_BARS = 14
_MAX_SHOWN = 5


@dataclass(frozen=True)
class SourceSummary:
    """Row counts of one source."""

    path: str
    format: DataFormat
    files: int
    rows: int
    """Rows that can be trained on."""
    taken: int
    """Rows per epoch; weights may repeat or drop rows."""


@dataclass(frozen=True)
class Lengths:
    """Percentiles and histogram of tokens per row, before truncation and dropping."""

    p50: int
    p95: int
    p99: int
    longest: int
    edges: list[int]
    """Lower bounds of the histogram's bars; the last bar is open."""
    counts: list[int]


@dataclass(frozen=True)
class DataSummary:
    """The figures of all prepared rows; lengths are in tokens."""

    rows: int
    """Rows per epoch."""
    tokens: int
    trained_tokens: int
    longest: int
    truncated_rows: int
    """Rows that were truncated."""
    lost_tokens: int
    """Tokens removed by truncation or in dropped rows."""
    dropped_rows: int
    """Rows that exceed the limit with `long_rows: drop`, or have no loss token after truncation."""
    skipped_rows: dict[str, int]
    """Rejected rows that `bad_rows: skip` excludes: fault -> number of rows."""
    first_skipped: list[str]
    duplicates: int
    """Rows with the same text as an earlier row."""
    first_duplicates: list[str]
    lengths: Lengths
    sources: list[SourceSummary]
    files: list[str]
    fingerprint: str
    """Checksum of the tokens, independent of where the rows are stored."""
    examples: list[list[tuple[str, bool]]]
    """Example rows as (text, contributes to the loss) pieces."""
    split_rows: int = 0
    """Rows that became several sequences, because the chat template renders earlier turns differently once others follow."""
    split_sequences: int = 0
    """Sequences that these rows became; `rows` counts each of them."""
    has_reasoning: bool | None = None
    """True if an answer has reasoning, or an empty thought that the row writes; None if the rows are no chats."""
    date: str | None = None
    """Date that the chat template prints in these rows (ISO 8601); None if it prints none."""
    largest_id: int | None = None
    """Largest token id of the rows; None: an earlier release prepared them."""
    notes: dict[str, int] = field(default_factory=dict)
    """Changed or unused parts of rows -> number of rows."""


def measure_lengths(rows_of_length: Mapping[int, int]) -> Lengths:
    """Compute nearest-rank percentiles, and a histogram up to p99 with a round bar width.

    Args:
        rows_of_length: Tokens of a row -> number of such rows.
    """
    lengths = np.array(sorted(rows_of_length), np.int64)
    rows = np.array([rows_of_length[length] for length in lengths.tolist()], np.int64)
    p50, p95, p99, longest = (
        int(length)
        for length in np.percentile(lengths, [50, 95, 99, 100], method="inverted_cdf", weights=rows)
    )
    smallest_width = max(p99 / _BARS, 1)
    magnitude = 10 ** int(np.log10(smallest_width))
    width = next(step * magnitude for step in (1, 2, 5, 10) if step * magnitude >= smallest_width)
    first = int(lengths.min()) // width
    edges = list(range(first * width, p99 + 1, width))
    bars = np.minimum(lengths // width - first, len(edges) - 1)
    counts = np.bincount(bars, weights=rows, minlength=len(edges)).astype(np.int64)
    return Lengths(p50, p95, p99, longest, edges, counts.tolist())


def find_duplicates(index: RowIndex, files: Sequence[DataFile]) -> tuple[int, list[str]]:
    """Return the number of rows with the same text as an earlier row, and descriptions of the first ones."""
    # One process holds the digests of all rows. One sorted copy of them takes a sixth of the memory of np.unique with positions.
    ordered = np.sort(index.digest)
    several = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    alike = np.flatnonzero(contains(several, index.digest))
    _, first, inverse = np.unique(index.digest[alike], return_index=True, return_inverse=True)
    is_first = first[inverse] == np.arange(len(alike))
    repeated, earlier_ones = alike[~is_first], alike[first[inverse]][~is_first]
    shown = [
        f"{files[index.file[row]].uri}:{index.row[row]} repeats {files[index.file[earlier]].uri}:{index.row[earlier]}"
        for row, earlier in zip(repeated[:_MAX_SHOWN], earlier_ones[:_MAX_SHOWN], strict=True)
    ]
    return len(repeated), shown


def example_rows(count: int) -> list[int]:
    """Return the numbers of the first, middle and last of `count` rows."""
    return sorted({round(part * (count - 1) / (_EXAMPLES - 1)) for part in range(_EXAMPLES)})


def show_example(row: dict[str, Any], tokenizer: "PreTrainedTokenizerFast") -> list[tuple[str, bool]]:
    """Return a row of data.arrow as text with its loss tokens marked; of a pair, both answers after the prompt."""
    if "prompt_ids" not in row:
        return _mark(tokenizer, row["input_ids"], [label != IGNORED for label in row["labels"]])
    pieces = [(_shortened(tokenizer, row["prompt_ids"]), False)]
    for name in ("chosen", "rejected"):
        if ids := row[f"{name}_ids"]:
            pieces += [(f" … {name}: … ", False), (_shortened(tokenizer, ids), True)]
    return pieces


def _mark(
    tokenizer: "PreTrainedTokenizerFast", ids: list[int], trained: list[bool]
) -> list[tuple[str, bool]]:
    pieces: list[tuple[str, bool]] = []
    begin = 0
    for position in range(1, len(ids) + 1):
        if position == len(ids) or trained[position] != trained[begin]:
            if len(pieces) == _EXAMPLE_PIECES:
                pieces.append((_left_out(len(ids) - begin), False))
                break
            pieces.append((_shortened(tokenizer, ids[begin:position]), trained[begin]))
            begin = position
    return pieces


def _shortened(tokenizer: "PreTrainedTokenizerFast", ids: list[int]) -> str:
    """Decode a piece, without its middle if it is long, so that a long question does not hide its answer."""
    if len(ids) <= PIECE_TOKENS:
        return str(tokenizer.decode(ids))
    half = PIECE_TOKENS // 2
    return f"{tokenizer.decode(ids[:half])}{_left_out(len(ids) - 2 * half)}{tokenizer.decode(ids[-half:])}"


def _left_out(tokens: int) -> str:
    return f" … {tokens:,} tokens … "

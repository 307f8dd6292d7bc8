"""What a person should know of prepared rows: counts, lengths, repetitions, examples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.schema import DataFormat
from training.data.sources import DataFile
from training.data.token_files import IGNORED, RowIndex

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

_EXAMPLES, _EXAMPLE_PIECES = 3, 8
PIECE_TOKENS = 200  # shown of each piece of an example: its beginning and its end
_BARS = 14
_MAX_SHOWN = 5


@dataclass(frozen=True)
class SourceSummary:
    """What became of one source."""

    path: str
    format: DataFormat
    files: int
    rows: int
    """Rows that can be trained on."""
    taken: int
    """Rows of it in an epoch: more where they repeat, fewer where the weight leaves some out."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of the rows as they were written, before anything is cut off or dropped."""

    p50: int
    p95: int
    p99: int
    longest: int
    edges: list[int]
    """Where the histogram's bars begin; the last one is open."""
    counts: list[int]


@dataclass(frozen=True)
class DataSummary:
    """What was found in the sources; lengths are in tokens."""

    rows: int
    """In an epoch."""
    tokens: int
    trained_tokens: int
    longest: int
    truncated_rows: int
    """Kept without their end."""
    lost_tokens: int
    """Cut off, or in rows that are dropped."""
    dropped_rows: int
    """Too long under `long_rows: drop`, or left without a trained token by truncation."""
    skipped_rows: dict[str, int]
    """Rows that cannot be learned from, left out by `bad_rows: skip`: fault -> how many."""
    first_skipped: list[str]
    duplicates: int
    """Rows that say the same as one before."""
    first_duplicates: list[str]
    lengths: Lengths
    sources: list[SourceSummary]
    files: list[str]
    fingerprint: str
    """Of the tokens: equal for the same rows wherever they lie."""
    examples: list[list[tuple[str, bool]]]
    """Rows in pieces: text, and whether the loss looks at it."""


def measure_lengths(lengths: np.ndarray) -> Lengths:
    """Percentiles by the nearest rank, and a histogram up to the 99th with a round width."""
    p50, p95, p99, longest = (
        int(length) for length in np.percentile(lengths, [50, 95, 99, 100], method="inverted_cdf")
    )
    smallest_width = max(p99 / _BARS, 1)
    magnitude = 10 ** int(np.log10(smallest_width))
    width = next(step * magnitude for step in (1, 2, 5, 10) if step * magnitude >= smallest_width)
    first = int(lengths.min()) // width
    edges = list(range(first * width, p99 + 1, width))
    counts = np.bincount(np.minimum(lengths // width - first, len(edges) - 1), minlength=len(edges))
    return Lengths(p50, p95, p99, longest, edges, counts.tolist())


def find_duplicates(index: RowIndex, files: Sequence[DataFile]) -> tuple[int, list[str]]:
    """How many rows say the same as one before, and the first of them."""
    _, first, inverse = np.unique(index.digest, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[inverse] != np.arange(len(index)))
    shown = [
        f"{files[index.file[row]].uri}:{index.row[row]} repeats {files[index.file[earlier]].uri}:{index.row[earlier]}"
        for row, earlier in ((row, first[inverse[row]]) for row in repeated[:_MAX_SHOWN])
    ]
    return len(repeated), shown


def show_examples(dataset: "Dataset", tokenizer: "PreTrainedTokenizerFast") -> list[list[tuple[str, bool]]]:
    """The first row, one from the middle and the last, with what is trained on."""
    rows = sorted({round(part * (len(dataset) - 1) / (_EXAMPLES - 1)) for part in range(_EXAMPLES)})
    return [_mark(tokenizer, *_ids_and_trained(dataset[row])) for row in rows]


def _ids_and_trained(row: dict[str, Any]) -> tuple[list[int], list[bool]]:
    if "prompt_ids" in row:
        prompt, chosen = row["prompt_ids"], row["chosen_ids"]
        return prompt + chosen, [False] * len(prompt) + [True] * len(chosen)
    return row["input_ids"], [label != IGNORED for label in row["labels"]]


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
    """Without its middle where it is long, so that a long question does not hide its answer."""
    if len(ids) <= PIECE_TOKENS:
        return str(tokenizer.decode(ids))
    half = PIECE_TOKENS // 2
    return f"{tokenizer.decode(ids[:half])}{_left_out(len(ids) - 2 * half)}{tokenizer.decode(ids[-half:])}"


def _left_out(tokens: int) -> str:
    return f" … {tokens:,} tokens … "

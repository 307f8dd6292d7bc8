"""Duplicates among prepared rows."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from training.data.row_index import INDEX_SCHEMA, RowIndex
from training.data.sources import DataFile
from training.data.summary import find_duplicates

FILES = [DataFile("a.jsonl", "1", 0), DataFile("b.jsonl", "1", 0)]


def index_of(digests: np.ndarray) -> pa.Table:
    """Return the index of rows with these digests, half of them in each file."""
    count = len(digests)
    numbers = np.arange(count)
    columns = {name: np.ones(count, np.int32) for name in INDEX_SCHEMA.names}
    columns |= {"position": numbers, "file": (numbers >= count // 2).astype(np.int32), "row": numbers + 1}
    return pa.table(columns | {"digest": digests.astype(np.uint64)}, schema=INDEX_SCHEMA)


@pytest.mark.parametrize("values", [1, 3, 40, 10**9])
@pytest.mark.parametrize("count", [1, 2, 500])
def test_duplicates_are_the_rows_whose_text_an_earlier_row_has(values: int, count: int):
    digests = np.random.default_rng(values + count).integers(0, values, count)
    expected: list[tuple[int, int]] = []
    seen: dict[int, int] = {}
    for row, digest in enumerate(digests.tolist()):
        if seen.setdefault(digest, row) != row:
            expected.append((row, seen[digest]))

    def place(row: int) -> str:
        return f"{FILES[int(row >= count // 2)].uri}:{row + 1}"

    duplicates, shown = find_duplicates(RowIndex(index_of(digests)), FILES)
    assert duplicates == len(expected)
    assert shown == [f"{place(row)} repeats {place(earlier)}" for row, earlier in expected[:5]]


def test_memory_of_finding_duplicates_is_two_copies_of_the_digests():
    """One task does it for all rows of a cluster."""
    rows = 3_000_000
    index = RowIndex(index_of(np.random.default_rng(0).integers(0, 2**62, rows)))
    tracemalloc.start()
    find_duplicates(index, FILES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * rows

"""The index of prepared rows: one line per row of an epoch."""

import numpy as np
import pyarrow as pa

IGNORED = -100  # ignore_index of PyTorch's cross-entropy

_BLOCK_ROWS = 1_000_000

DATA_FILE, INDEX_FILE = "data.arrow", "index.arrow"


def is_data_file(name: str) -> bool:
    """Return whether a file has tokens: data.arrow, or data-00000.arrow and so on of data that was prepared in shards."""
    return name.startswith("data")


INDEX_SCHEMA = pa.schema(
    [
        ("position", pa.int64()),
        ("file", pa.int32()),
        ("row", pa.int64()),
        ("tokens", pa.int32()),
        ("trained_tokens", pa.int32()),
        ("length", pa.int32()),
        ("digest", pa.uint64()),
    ]
)


class RowIndex:
    """The index of an epoch's rows as column arrays; a row's number is its position here."""

    def __init__(self, table: pa.Table):
        self.position = table["position"].to_numpy()
        """Row number in data.arrow, or in the shards' files as if they were one."""
        self.file = table["file"].to_numpy()
        self.row = table["row"].to_numpy()
        """Line or record number in the source file, from 1."""
        self.tokens = table["tokens"].to_numpy()
        """All tokens that the model processes."""
        self.trained_tokens = table["trained_tokens"].to_numpy()
        self.length = table["length"].to_numpy()
        """Tokens of the row's longest sequence; a preference pair has two sequences."""
        self.digest = table["digest"].to_numpy()

    def __len__(self) -> int:
        return len(self.position)


def contains(ordered: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """Return for each digest whether a sorted array contains it. Unlike np.isin, this copies no array of many rows."""
    found = np.zeros(len(digests), dtype=bool)
    if not len(ordered):
        return found
    for begin in range(0, len(digests), _BLOCK_ROWS):
        block = digests[begin : begin + _BLOCK_ROWS]
        places = np.minimum(np.searchsorted(ordered, block), len(ordered) - 1)
        found[begin : begin + _BLOCK_ROWS] = ordered[places] == block
    return found

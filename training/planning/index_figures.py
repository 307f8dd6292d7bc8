"""The figures of a plan for which the indexes of all rows are read: on this machine, or on a node of the cluster if the rows are many."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.schema import FinetuneConfig
from training.data.prepared import PreparedData, keep_prepared, open_stored
from training.data.report import IndexFigures, measure_indexes
from training.data.shards import ShardMap
from training.planning.plan import order_of

MOST_ROWS_HERE = 1_000_000
"""Rows whose indexes the driver downloads, of 40 bytes per row. A task on the cluster reads those of more rows."""


@dataclass(frozen=True)
class IndexReader:
    """The work on indexes, on this machine or on any node of a cluster."""

    config: FinetuneConfig
    """The YAML, with the batch size resolved."""
    padded_to: int | None
    """Length in tokens that every sequence is padded to; None for the longest of its batch."""
    bucket: str
    """URI of the prepared rows."""
    scratch: Path
    """Directory of the node, which has its cache."""

    def measure(self, sets: Sequence[PreparedData]) -> IndexFigures:
        """Return the figures of the training rows and the validation rows of all sets."""
        train, *valid = sets
        order = order_of(self.config, train.index.length, train.summary.longest, self.config.most_devices)
        return measure_indexes(train, valid, order, self.padded_to)

    def measure_stored(self, keys: Sequence[str]) -> IndexFigures:
        """Return the figures of rows in the bucket by their keys; see `measure`."""
        return self.measure([open_stored(key, self.scratch / "cache", self.bucket) for key in keys])


def index_figures(
    reader: IndexReader, sets: Sequence[PreparedData], on_cluster: ShardMap | None
) -> IndexFigures:
    """Return the figures of the prepared rows.

    Args:
        reader: The work on their indexes.
        sets: The training rows, and the validation rows of all sets.
        on_cluster: Runs work on nodes that access the bucket; None: this machine does it.
    """
    elsewhere = sum(rows.summary.rows for rows in sets if not rows.has_index)
    if on_cluster is None or elsewhere <= MOST_ROWS_HERE:
        return reader.measure(sets)
    for rows in sets:
        keep_prepared(rows, reader.bucket)
    with on_cluster() as run:
        (figures,) = run(reader.measure_stored, [[rows.key for rows in sets]])
    return figures

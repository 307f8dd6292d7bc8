"""The figures of a plan for which the indexes of all rows are read: on this machine, or on a node of the cluster if the rows are many."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.schema import FinetuneConfig
from training.data.prepared import PreparedData, keep_prepared, open_stored
from training.data.report import IndexFigures, measure_indexes
from training.planning.model import Storage
from training.planning.plan import order_of

MOST_ROWS_HERE = 1_000_000
"""Rows whose indexes the driver downloads, of 40 bytes per row. A task on the cluster reads those of more rows."""


def index_figures(
    config: FinetuneConfig, storage: Storage, sets: Sequence[PreparedData], padded_to: int | None
) -> IndexFigures:
    """Return the figures of the prepared rows.

    Args:
        config: The YAML, with the batch size resolved.
        storage: Where the run writes.
        sets: The training rows, and the validation rows of all sets.
        padded_to: Length in tokens that every sequence is padded to; None for the longest of its batch.
    """
    elsewhere = sum(rows.summary.rows for rows in sets if not rows.has_index)
    if storage.on_cluster is None or elsewhere <= MOST_ROWS_HERE:
        return _measure(config, sets, padded_to)
    for rows in sets:
        keep_prepared(rows, storage.prepared)
    worker = IndexWorker(config, storage.prepared, padded_to, storage.scratch)
    with storage.on_cluster() as run:
        (figures,) = run(worker.measure, [[rows.key for rows in sets]])
    return figures


@dataclass(frozen=True)
class IndexWorker:
    """The work on indexes, on any node of a cluster."""

    config: FinetuneConfig
    bucket: str
    """URI of the prepared rows."""
    padded_to: int | None
    scratch: Path
    """Directory of the node for its cache."""

    def measure(self, keys: Sequence[str]) -> IndexFigures:
        """Return the figures of the training rows and the validation rows with these keys."""
        sets = [open_stored(key, self.scratch / "cache", self.bucket) for key in keys]
        return _measure(self.config, sets, self.padded_to)


def _measure(config: FinetuneConfig, sets: Sequence[PreparedData], padded_to: int | None) -> IndexFigures:
    train, *valid = sets
    order = order_of(config, train.index.length, train.summary.longest, config.most_devices)
    return measure_indexes(train, valid, order, padded_to)

"""Saved checkpoints become committed ones while training goes on: staged, uploaded by every node, published by rank 0."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from runs.layout import METRICS_FILE, Claim, Manifest, checkpoint_uri, metrics_lines
from training import checkpoints
from training.claims import ClaimError, check_claim
from training.events import CheckpointCommitted
from training.place import Place
from utils.bucket import BucketError, Store


@dataclass(frozen=True)
class Saved:
    """A checkpoint on the nodes' disks, and what was known when it was saved."""

    directory: Path
    """Written by every rank, changed by nobody any more."""
    manifest: Manifest
    """Without its files."""
    metrics: str
    """The lines of metrics.jsonl up to this step."""
    committed: CheckpointCommitted
    """What is told when it exists."""


class Commits:
    """Commits one checkpoint at a time behind training's back; every rank has one and makes the same calls.

    As a context it ends with the last commit. Errors of a commit surface at the next call: a run whose checkpoints do
    not reach the bucket does not go on.
    """

    def __init__(
        self,
        store: Store,
        claim: Claim,
        place: Place,
        committed: list[Manifest],
        *,
        keep: int,
        on_commit: Callable[[CheckpointCommitted], None],
    ):
        """Every rank calls it.

        Args:
            store: The run.
            claim: Of the driver that started this worker.
            place: This worker.
            committed: What the run has already.
            keep: How many of the best to keep.
            on_commit: Called on every rank, on the thread that commits, when a checkpoint exists.
        """
        self._store = store
        self._claim = claim
        self._place = place.patient()
        self._committed = committed
        self._keep = keep
        self._on_commit = on_commit
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._running: Future[None] | None = None
        self._recording: Future[None] | None = None

    def __enter__(self) -> "Commits":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        self._thread.shutdown()  # what is being committed is worth its time, even when training has failed

    def start(self, saved: Saved) -> None:
        """Begin to commit; waits only for the one before.

        Raises:
            BucketError: the one before could not be committed.
            ClaimError: another driver has taken the run over.
        """
        self.wait()
        self._running = self._thread.submit(self._commit, saved)

    def check(self) -> None:
        """Raise, as `start`, when the running one has failed; does not wait."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being committed; raises as `start`."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    @property
    def newest_checkpoint(self) -> str | None:
        """The URI of the last one that is committed, or will have been."""
        self.wait()
        return checkpoint_uri(self._store.uri, self._committed[-1].step) if self._committed else None

    def record(self, log: Sequence[Mapping[str, Any]]) -> None:
        """Begin to write metrics.jsonl ahead of the next checkpoint, which writes it again; rank 0 calls it.

        It waits for nothing, and does nothing where the last record is still on its way. That one could not be written is for
        the next checkpoint to tell, which cannot be written either.

        Args:
            log: As of `metrics_lines`.
        """
        if self._recording is None or self._recording.done():
            self._recording = self._thread.submit(self._record, log)

    def _record(self, log: Sequence[Mapping[str, Any]]) -> None:
        with suppress(BucketError, ClaimError):
            check_claim(self._store, self._claim)
            self._store.write(METRICS_FILE, metrics_lines(log).encode())

    def _commit(self, saved: Saved) -> None:
        place, step = self._place, saved.manifest.step
        place.gather(None)  # every rank has written its files
        files = checkpoints.checkpoint_files(saved.directory) if place.local_rank == 0 else []
        files_of_ranks = place.gather(files)
        # Nodes save the same model files: the lowest rank's copy counts.
        taken = {file for files_of_rank in files_of_ranks[: place.rank] for file in files_of_rank}
        records = checkpoints.upload_files(
            self._store, step, saved.directory, [file for file in files if file not in taken]
        )
        all_records = [record for records_of_rank in place.gather(records) for record in records_of_rank]
        manifest = saved.manifest.model_copy(
            update={"files": sorted(all_records, key=lambda record: record.path)}
        )
        if place.rank == 0:
            check_claim(self._store, self._claim)
            self._store.write(METRICS_FILE, saved.metrics.encode())
            checkpoints.commit(self._store, manifest)
        place.gather(None)  # it exists
        self._on_commit(saved.committed)
        if place.local_rank == 0:
            shutil.rmtree(saved.directory)
        self._committed = [*self._committed, manifest]
        if place.rank == 0:
            self._committed = checkpoints.prune(self._store, self._committed, self._keep)

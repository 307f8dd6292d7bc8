"""The commit of a checkpoint in the background: save -> upload -> publish -> report -> prune."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from runs.layout import (
    METRICS_FILE,
    FileRecord,
    Lease,
    Manifest,
    checkpoint_uri,
    metrics_lines,
)
from training.checkpoints import store as checkpoints
from training.checkpoints.lease import LeaseError, check_lease
from training.events import CheckpointCommitted
from training.world import World
from utils.storage.bucket import BucketError, Store

if TYPE_CHECKING:
    from transformers import TrainerState


_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "ray")


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint on the nodes' disks, with the manifest and metrics of the time of the save."""

    directory: Path
    """The complete local directory, written by all ranks."""
    manifest: Manifest
    """The manifest with an empty list of files."""
    metrics: str
    """The lines of metrics.jsonl up to this step."""
    committed: CheckpointCommitted
    """The event to report once the checkpoint is committed."""


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that a run's outcome depends on."""
    return {package: version(package) for package in _PACKAGES}


@dataclass(frozen=True)
class CommitContext:
    """The run and worker that the commits of an attempt share."""

    store: Store
    """Store of the run."""
    lease: Lease
    """The lease of the driver that started this worker."""
    world: World
    """This worker."""
    keep: int
    """Number of the best checkpoints to retain."""
    describe: "Callable[[Path, TrainerState], SavedCheckpoint]"
    """See `describe_saved`."""
    report: Callable[[CheckpointCommitted], None]
    """Called on every rank, on the committing thread, when a checkpoint is committed."""


class CheckpointCommitter:
    """Commits one checkpoint at a time in the background; every rank has one and makes the same calls.

    Leaving the context waits for the last commit. Errors of a commit are raised at the next call, because a run must not
    continue if its checkpoints do not reach the bucket.
    """

    def __init__(self, context: CommitContext, committed: list[Manifest]):
        """Create the committer on every rank.

        Args:
            context: The run and this worker.
            committed: Manifests of the run's committed checkpoints.
        """
        self._context = context
        self._store = context.store
        self._world = context.world.with_long_timeout()
        self._committed = committed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._running: Future[None] | None = None
        self._recording: Future[None] | None = None
        self._written: list[Future[None]] = []

    def __enter__(self) -> "CheckpointCommitter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        self._thread.shutdown()  # a running commit finishes even after training has failed

    def save(self, directory: Path, state: "TrainerState") -> None:
        """Start to commit the checkpoint that transformers has just saved; see `start`."""
        self.start(self._context.describe(directory, state))

    def start(self, saved: SavedCheckpoint) -> None:
        """Start to commit a checkpoint; wait only for the previous commit, and raise its error if it failed."""
        self.wait()
        self._running = self._thread.submit(self._commit, saved)

    def check(self) -> None:
        """Raise the error of a failed commit, without waiting for a running one."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the running commit, and raise its error if it failed."""
        running, self._running = self._running, None
        if running is not None:
            running.result()
        written, self._written = self._written, []
        for record in written:
            record.result()

    def write(self, key: str, text: str) -> None:
        """Start to write a small record of the run; rank 0 calls it. Errors are raised as those of a commit."""
        self._written.append(self._thread.submit(self._write, key, text))

    def _write(self, key: str, text: str) -> None:
        check_lease(self._store, self._context.lease)
        self._store.write(key, text.encode())

    def latest_checkpoint(self) -> str | None:
        """Wait for the running commit, and return the URI of the latest committed checkpoint."""
        self.wait()
        return checkpoint_uri(self._store.uri, self._committed[-1].step) if self._committed else None

    def record(self, log: Sequence[Mapping[str, Any]]) -> None:
        """Start to write metrics.jsonl before the next checkpoint, which writes it again; rank 0 calls it.

        The call never waits, and does nothing while the previous write is running. Errors are ignored, because the commit of
        the next checkpoint raises them.

        Args:
            log: The trainer's log, see `metrics_lines`.
        """
        if self._recording is None or self._recording.done():
            self._recording = self._thread.submit(self._record, log)

    def _record(self, log: Sequence[Mapping[str, Any]]) -> None:
        with suppress(BucketError, LeaseError):
            check_lease(self._store, self._context.lease)
            self._store.write(METRICS_FILE, metrics_lines(log).encode())

    def _commit(self, saved: SavedCheckpoint) -> None:
        manifest = self._upload(saved)
        self._publish(manifest, saved.metrics)
        self._context.report(saved.committed)
        if self._world.local_rank == 0:
            shutil.rmtree(saved.directory)
        self._prune(manifest)

    def _upload(self, saved: SavedCheckpoint) -> Manifest:
        """Upload each node's files; return the manifest with the files of all nodes."""
        world = self._world
        world.gather(None)  # every rank has written its files
        files = checkpoints.checkpoint_files(saved.directory) if world.local_rank == 0 else []
        files_of_ranks = world.gather(files)
        # All nodes save the same model files; the lowest rank uploads them.
        taken = {file for files_of_rank in files_of_ranks[: world.rank] for file in files_of_rank}
        own = [file for file in files if file not in taken]
        records = checkpoints.upload_files(self._store, saved.manifest.step, saved.directory, own)
        uploaded: list[FileRecord] = [record for records in world.gather(records) for record in records]
        return saved.manifest.model_copy(update={"files": sorted(uploaded, key=lambda record: record.path)})

    def _publish(self, manifest: Manifest, metrics: str) -> None:
        """Write the manifest on rank 0, which commits the checkpoint."""
        if self._world.rank == 0:
            check_lease(self._store, self._context.lease)
            self._store.write(METRICS_FILE, metrics.encode())
            checkpoints.commit(self._store, manifest)
        self._world.gather(None)  # no rank continues before it is published

    def _prune(self, manifest: Manifest) -> None:
        """Delete the checkpoints that are not retained, on rank 0."""
        self._committed = [*self._committed, manifest]
        if self._world.rank == 0:
            self._committed = checkpoints.prune(self._store, self._committed, self._context.keep)

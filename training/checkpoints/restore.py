"""Restoring the checkpoint that a run resumes from, in the background while the worker loads its libraries."""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from runs import reading
from runs.layout import Lease, Manifest, checkpoint_uri
from training.checkpoints import store as checkpoints
from training.checkpoints.lease import check_lease
from training.checkpoints.store import CheckpointError
from training.events import Event, Notice
from training.world import World
from utils.storage.bucket import Store


class Restoring:
    """The download of the checkpoint to resume from, once per node; it skips damaged checkpoints.

    The download starts immediately. Every rank makes the same calls.
    """

    def __init__(self, store: Store, lease: Lease, start: str | None, directory: Path, world: World):
        """Find the checkpoint and start its download.

        Args:
            store: The run.
            lease: The lease of the driver that started this worker.
            start: URI of another run's checkpoint to resume from if this run has none of its own.
            directory: The local target directory, which does not exist yet.
            world: This worker, with a process group for long waits.
        """
        self._store = store
        self._lease = lease
        self._start = start
        self._directory = directory
        self._world = world
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="restore")
        self.committed: list[Manifest] = world.gather(reading.committed(store) if world.rank == 0 else None)[
            0
        ]
        self.manifest: Manifest | None = None
        """The manifest of the restored checkpoint, once `finish` has returned."""
        self._running = self._begin()

    def finish(self, emit: Callable[[Event], None]) -> Path | None:
        """Wait for the download and return its directory; return None if the run starts from the beginning.

        Afterwards `committed` contains the run's checkpoints up to the restored one, and all others are deleted from the run.
        """
        while (damage := self._damage()) is not None:
            if len(self.committed) < 2:  # restarting from step 0 would delete files that a user may still fix
                raise CheckpointError(damage)
            self.committed = self.committed[:-1]
            if self._world.local_rank == 0:
                shutil.rmtree(self._directory, ignore_errors=True)  # a copy on another node may be complete
            self._running = self._begin()
            emit(Notice(f"{damage} Skipped; the run resumes from {self.uri}."))
        self._thread.shutdown()
        self.manifest = self._world.gather(self._running.result() if self._running else None)[0]
        if self._world.rank == 0:
            check_lease(self._store, self._lease)
            checkpoints.remove_leftovers(self._store, self.committed)
        return self._directory if self.uri else None

    @property
    def uri(self) -> str | None:
        """The URI of the checkpoint to resume from, if any."""
        return checkpoint_uri(self._store.uri, self.committed[-1].step) if self.committed else self._start

    def _begin(self) -> "Future[Manifest] | None":
        if self.uri is None or self._world.local_rank != 0:
            return None
        return self._thread.submit(checkpoints.restore, self.uri, self._directory)

    def _damage(self) -> str | None:
        """Wait for the download; return what is wrong with the checkpoint on any node."""
        damage = None
        try:
            if self._running is not None:
                self._running.result()
        except CheckpointError as error:
            damage = str(error)
        return next((found for found in self._world.gather(damage) if found), None)

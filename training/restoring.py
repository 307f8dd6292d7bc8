"""The checkpoint to go on from comes to the node while the worker loads its libraries; a damaged one is passed over."""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from runs import reading
from runs.layout import Claim, Manifest, checkpoint_uri
from training import checkpoints
from training.checkpoints import CheckpointError
from training.claims import check_claim
from training.events import Event, Notice
from training.place import Place
from utils.bucket import Store


class Restoring:
    """Begins at once, on one worker of each node; every rank makes the same calls."""

    def __init__(self, store: Store, claim: Claim, start: str | None, directory: Path, place: Place):
        """Every rank calls it.

        Args:
            store: The run.
            claim: Of the driver that started this worker.
            start: The checkpoint of another run whose whole state this one takes, while it has none of its own.
            directory: Where to, on this node; not there yet.
            place: This worker.
        """
        self._store = store
        self._claim = claim
        self._start = start
        self._directory = directory
        self._place = place
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="restore")
        self.committed: list[Manifest] = place.gather(reading.committed(store) if place.rank == 0 else None)[
            0
        ]
        self._running = self._begin()

    def finish(self, tell: Callable[[Event], None]) -> Path | None:
        """Where the trainer state to go on from lies; None where there is none.

        `committed` is then what the run has up to that state, and nothing else is left in the run.

        Raises:
            CheckpointError: every checkpoint is damaged, or the other run's is.
            BucketError: a checkpoint cannot be read.
            ClaimError: another driver has taken the run over.
        """
        while (damage := self._damage()) is not None:
            if len(self.committed) < 2:  # to begin anew would remove what people may still mend
                raise CheckpointError(damage)
            self.committed = self.committed[:-1]
            if self._place.local_rank == 0:
                shutil.rmtree(self._directory, ignore_errors=True)  # on other nodes it was whole
            self._running = self._begin()
            tell(Notice(f"{damage} Passed over for {self.uri}."))
        self._thread.shutdown()
        if self._place.rank == 0:
            check_claim(self._store, self._claim)
            checkpoints.remove_leftovers(self._store, self.committed)
        return self._directory if self.uri else None

    @property
    def uri(self) -> str | None:
        """The checkpoint that is brought here, if any."""
        return checkpoint_uri(self._store.uri, self.committed[-1].step) if self.committed else self._start

    def _begin(self) -> "Future[Manifest] | None":
        if self.uri is None or self._place.local_rank != 0:
            return None
        return self._thread.submit(checkpoints.restore, self.uri, self._directory)

    def _damage(self) -> str | None:
        """What is wrong with the checkpoint on any of the nodes."""
        damage = None
        try:
            if self._running is not None:
                self._running.result()
        except CheckpointError as error:
            damage = str(error)
        return next((found for found in self._place.gather(damage) if found), None)

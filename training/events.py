"""What the workers tell the driver while they run; it is carried by a small actor."""

import asyncio
from dataclasses import dataclass
from typing import Any, Literal

from runs.layout import Speed
from utils.errors import AnnealError


@dataclass(frozen=True)
class Phase:
    """What rank 0 is doing now."""

    text: str
    fraction: float | None = None
    """How much of it is done, where that can be told."""


@dataclass(frozen=True)
class PlacesWanted:
    """The workers, if there were any, are gone, and Ray looks for places for others."""


@dataclass(frozen=True)
class PlacesFound:
    """All workers have theirs."""

    workers: int


@dataclass(frozen=True)
class ModelReady:
    """The model as it was really built."""

    parameters: int
    trainable_parameters: int


@dataclass(frozen=True)
class StepDone:
    """An optimizer step."""

    step: int
    max_steps: int
    epoch: float
    loss: float
    tokens_per_second: float
    mfu: float | None
    peak_memory_bytes: int
    figures: dict[str, float]
    """What the task reports beside the loss."""


@dataclass(frozen=True)
class Evaluated:
    """An evaluation."""

    step: int
    epoch: float
    eval_loss: float
    figures: dict[str, float]
    """What the task reports beside the loss."""


@dataclass(frozen=True)
class CheckpointCommitted:
    """A checkpoint that exists in the bucket from now on."""

    step: int
    uri: str
    tokens: int
    """Trained on so far, padding not counted."""
    trained_tokens: int
    """Those of them that the loss looks at."""
    speed: Speed


@dataclass(frozen=True)
class Restored:
    """The run's own checkpoint that this attempt goes on from; `speed` is of what this attempt trained, nothing."""

    checkpoint: CheckpointCommitted


@dataclass(frozen=True)
class WorkersFailed:
    """The workers are started again, for these causes: what each of those that failed said, as Ray tells it."""

    causes: tuple[str, ...]


@dataclass(frozen=True)
class Refused:
    """A worker met what starting it again cannot mend."""

    message: str


@dataclass(frozen=True)
class Notice:
    """What a person should know of, while the run goes on."""

    text: str


Event = (
    Phase
    | PlacesWanted
    | PlacesFound
    | ModelReady
    | StepDone
    | Evaluated
    | CheckpointCommitted
    | Restored
    | WorkersFailed
    | Refused
    | Notice
)


class UnrecordedError(AnnealError):
    """A run that ended without a result.json; the message says how it ended, and why the file cannot be written."""

    exit_code = 1


class WorkersFailedError(AnnealError):
    """Workers of an evaluation that failed; the message says how."""

    exit_code = 1


class DivergedError(AnnealError):
    """A loss or a gradient that is no number any more; the message says at which step, on which rows, and what is left."""


class EventMailbox:
    """A Ray actor that hands events from rank 0 to the driver. Nobody polls: questions are answered when there is news."""

    def __init__(self):
        self._events: list[Event] = []
        self._news = asyncio.Event()
        self._asked: Literal["stop", "regroup"] | None = None
        self._is_asked = asyncio.Event()
        self._at_rest = False
        self._refused = False
        self._failures: dict[int, str] = {}
        self._closed = False
        self._controller: Any = None
        self._is_controlled = asyncio.Event()

    async def put(self, event: Event) -> None:
        """Called by rank 0, which does not wait for it."""
        self._events.append(event)
        if isinstance(event, CheckpointCommitted):
            self._failures.clear()
        self._news.set()

    async def take(self) -> list[Event] | None:
        """Called by the driver: waits for events and returns them; None once there will be no more."""
        await self._news.wait()
        events, self._events = self._events, []
        if self._closed:
            return events or None
        self._news.clear()
        return events

    async def close(self) -> None:
        """Called by the driver: no worker is left."""
        self._closed = True
        self._news.set()
        self._is_controlled.set()

    async def controlled_by(self, controller: Any) -> None:
        """Called by Ray's controller, with itself, when it begins."""
        self._controller = controller
        self._is_controlled.set()

    async def controller(self) -> Any:
        """Ray's controller as soon as there is one; None where none began."""
        await self._is_controlled.wait()
        return self._controller

    async def refuse(self, message: str) -> None:
        """Called by the first worker that meets what starting it again cannot mend."""
        if not self._refused:
            self._refused = True
            await self.put(Refused(message))

    async def fails_again(self, rank: int, error: str) -> bool:
        """Called by a worker that met an error: whether it is this rank's last one, with no checkpoint committed since."""
        if "out of memory" in error:
            error = "out of memory"  # beside it stands how much was free, and which processes had the rest
        again = self._failures.get(rank) == error
        self._failures[rank] = error
        return again

    async def is_refused(self) -> bool:
        """Whether one did."""
        return self._refused

    async def ask_to_stop(self) -> None:
        """Called by the driver, who got a signal: commit a checkpoint and end."""
        self._asked = "stop"
        self._is_asked.set()

    async def ask_to_regroup(self) -> None:
        """Called by Ray's controller, which has room for more workers: commit a checkpoint and rest."""
        if self._asked is None:
            self._asked = "regroup"
            self._is_asked.set()

    async def what_is_asked(self) -> Literal["stop", "regroup"] | None:
        """Returns when something is."""
        await self._is_asked.wait()
        return self._asked

    async def rest(self) -> None:
        """Called by rank 0: the workers have committed, and wait for the end of their group."""
        self._at_rest = True

    async def is_at_rest(self) -> bool:
        """Whether they do."""
        return self._at_rest

    async def go_on(self) -> None:
        """Called by Ray's controller before it starts a group: nobody rests, and there is nothing to make room for."""
        self._at_rest = False
        if self._asked == "regroup":
            self._asked = None
            self._is_asked.clear()

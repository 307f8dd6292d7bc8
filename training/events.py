"""What the workers tell the driver while they run; it is carried by a small actor."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """What rank 0 is doing now."""

    text: str
    fraction: float | None = None
    """How much of it is done, where that can be told."""


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


@dataclass(frozen=True)
class Evaluated:
    """An evaluation."""

    step: int
    epoch: float
    eval_loss: float


@dataclass(frozen=True)
class CheckpointCommitted:
    """A checkpoint that exists in the bucket from now on."""

    step: int
    uri: str
    tokens: int
    """Trained on so far, padding not counted."""
    trained_tokens: int
    """Those of them that the loss looks at."""
    tokens_per_second: float
    """Over the steps of this attempt, all workers together."""


Event = Phase | ModelReady | StepDone | Evaluated | CheckpointCommitted


class EventMailbox:
    """A Ray actor that holds events until the driver takes them. Workers never wait for it."""

    def __init__(self):
        self._events: list[Event] = []
        self._refusal: str | None = None
        self._stop = False

    def put(self, event: Event) -> None:
        """Called by rank 0."""
        self._events.append(event)

    def take(self) -> list[Event]:
        """Called by the driver: everything since the last call."""
        events, self._events = self._events, []
        return events

    def refuse(self, message: str) -> None:
        """A worker met what starting it again cannot mend; the first one's word counts."""
        self._refusal = self._refusal or message

    def refusal(self) -> str | None:
        """What it was, if anything."""
        return self._refusal

    def ask_to_stop(self) -> None:
        """The driver got a signal: commit a checkpoint and end."""
        self._stop = True

    def asked_to_stop(self) -> bool:
        """Whether it did."""
        return self._stop

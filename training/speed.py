"""How fast a run trains: tokens, time by phase, use of the hardware, memory."""

import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_args

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from runs.layout import Phase, Speed
from training.data.batches import Order
from training.flops import RowFlops

PHASES: tuple[Phase, ...] = get_args(Phase)


class Timeline(Protocol):
    """Where moments are marked, and how far apart two of them are."""

    def mark(self) -> Any:
        """Now."""
        ...

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two marks, the first before the second."""
        ...


class HostTimeline:
    """This process's own time: right where it computes itself."""

    def mark(self) -> float:
        """A reading of the clock, in seconds."""
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        """Between two readings."""
        return end - begin


class GpuTimeline:
    """The GPU's time: it works behind this process, and a mark lies in its queue between what was handed over before and after.

    What this process does while the GPU is still at work takes no time here; what the GPU has to wait for does.
    """

    def mark(self) -> torch.cuda.Event:
        """Handed over like a kernel; nobody waits for it."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Between two marks; waits until the GPU has come to the second."""
        end.synchronize()
        return begin.elapsed_time(end) / 1000


class PhaseClock:
    """Seconds that this worker spent in each phase; one is always on, and the next begins where it ends.

    data: reading rows, laying them out, and agreeing with the other workers on how many trained tokens a step has. backward: with DDP
    and ZeRO also the exchange of gradients. upload_stall: waiting until the checkpoint before has reached the bucket.
    """

    def __init__(self, timeline: Timeline):
        self._timeline = timeline
        self.start()

    def start(self) -> None:
        """Everything until now is forgotten."""
        self._seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._ended: list[tuple[Phase, Any, Any]] = []  # with its marks, not yet looked at
        self._phase: Phase = "other"
        self._since = self._timeline.mark()

    def enter(self, phase: Phase) -> None:
        """The phase before ends, and this one begins."""
        now = self._timeline.mark()
        self._ended.append((self._phase, self._since, now))
        self._phase, self._since = phase, now

    def timed(self, phase: Phase, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time is the phase's; then the phase around it goes on."""

        def in_phase(*arguments: Any, **keywords: Any) -> Any:
            around = self._phase
            self.enter(phase)
            try:
                return function(*arguments, **keywords)
            finally:
                self.enter(around)

        return in_phase

    def seconds(self) -> dict[Phase, float]:
        """Of each phase until now."""
        self.enter(self._phase)
        for phase, begin, end in self._ended:
            self._seconds[phase] += self._timeline.seconds(begin, end)
        self._ended.clear()
        return dict(self._seconds)


@dataclass
class _Work:
    """What was trained, and how long it took."""

    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def __iadd__(self, other: "_Work") -> "_Work":
        self.rows += other.rows
        self.tokens += other.tokens
        self.trained_tokens += other.trained_tokens
        self.flops += other.flops
        self.seconds += other.seconds
        return self


class Throughput(TrainerCallback):
    """Counts what was trained, from the data's own order: no worker has to ask another.

    Must stand behind the callbacks that evaluate or save, so that its clock starts again after them.
    """

    def __init__(
        self,
        order: Order,
        tokens_of_row: Sequence[int],
        trained_tokens_of_row: Sequence[int],
        *,
        clock: PhaseClock,
        flops: RowFlops | None,
        peak_flops: float | None,
    ):
        """Counts from the beginning of training.

        Args:
            order: Which rows each step takes.
            tokens_of_row: Of each row.
            trained_tokens_of_row: Those of them that the loss looks at.
            clock: Counts the phases.
            flops: What a row is worth; None: not known.
            peak_flops: What all devices together can do in a second; None: not known.
        """
        self.order = order
        self.tokens_of_row = tokens_of_row
        self.trained_tokens_of_row = trained_tokens_of_row
        self.clock = clock
        self.flops = flops
        self.peak_flops = peak_flops
        self.trained = _Work()  # since step 0
        self._timed = _Work()  # by this process
        self._step = _Work()
        self._since = 0.0
        self._told = clock.seconds()

    def count_restored(self, last_step: int) -> None:
        """Counts what earlier attempts trained, up to their last step."""
        for step in range(1, last_step + 1):
            self.trained += self._work_of(step)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Starts the clocks."""
        self.clock.start()
        self._told = self.clock.seconds()
        self._since = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Counts an optimizer step with everything it took, reading its rows included."""
        now = time.perf_counter()
        self.clock.enter("other")
        self._step = self._work_of(state.global_step)
        self.trained += self._step
        self._step.seconds = now - self._since
        self._timed += self._step
        self._since = now

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Leaves evaluation out."""
        self.restart()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Leaves saving out."""
        self.restart()

    def restart(self) -> None:
        """The next step begins now: what was done since the last one is none of it."""
        self._since = time.perf_counter()

    def figures_of_step(self) -> dict[str, float]:
        """What metrics.jsonl says of the last step; seconds are those since this was asked before."""
        speed, seconds = self._speed(self._step), self.clock.seconds()
        figures: dict[str, float] = {
            "tokens_per_second": speed.tokens_per_second,
            "trained_tokens_per_second": speed.trained_tokens_per_second,
            "peak_memory_bytes": speed.peak_memory_bytes,
        }
        if speed.mfu is not None:
            figures["mfu"] = speed.mfu
        figures |= {f"seconds/{phase}": round(seconds[phase] - self._told[phase], 6) for phase in PHASES}
        self._told = seconds
        return figures

    def speed(self) -> Speed:
        """Over all steps of this attempt."""
        return self._speed(self._timed)

    def _speed(self, work: _Work) -> Speed:
        seconds = work.seconds or math.inf
        return Speed(
            tokens_per_second=round(work.tokens / seconds, 3),
            trained_tokens_per_second=round(work.trained_tokens / seconds, 3),
            mfu=round(work.flops / seconds / self.peak_flops, 4) if self.flops and self.peak_flops else None,
            peak_memory_bytes=_peak_memory_bytes(),
            seconds={phase: round(spent, 3) for phase, spent in self.clock.seconds().items()},
        )

    def _work_of(self, step: int) -> _Work:
        rows = self.order.rows_of_step(step)
        lengths = [(self.tokens_of_row[row], self.trained_tokens_of_row[row]) for row in rows]
        return _Work(
            rows=len(rows),
            tokens=sum(tokens for tokens, _ in lengths),
            trained_tokens=sum(trained for _, trained in lengths),
            flops=sum(self.flops.of_row(*length) for length in lengths) if self.flops else 0.0,
        )


def _peak_memory_bytes() -> int:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB

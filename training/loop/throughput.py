"""Training throughput: tokens per second, time per phase, MFU and peak memory."""

import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_args

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from runs.layout import Phase, Speed
from training.data.batches import BatchPlan
from training.planning.flops import RowFlops

PHASES: tuple[Phase, ...] = get_args(Phase)


class Timeline(Protocol):
    """A clock that records marks and measures the time between them."""

    def mark(self) -> Any:
        """Record a mark at the current time."""
        ...

    def seconds(self, begin: Any, end: Any) -> float:
        """Return the seconds between two marks."""
        ...


class HostTimeline:
    """The wall clock of this process, accurate for CPU training."""

    def mark(self) -> float:
        """Return the clock's reading in seconds."""
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        """Return the seconds between two readings."""
        return end - begin


class GpuTimeline:
    """The GPU's clock, based on CUDA events, since kernels run asynchronously.

    CPU work that overlaps with kernels takes no time on this clock; CPU work for which the GPU must wait does.
    """

    def mark(self) -> torch.cuda.Event:
        """Record a CUDA event on the current stream without synchronizing."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Return the seconds between two events; blocks until the GPU has reached the second."""
        end.synchronize()
        return begin.elapsed_time(end) / 1000


class PhaseClock:
    """A stopwatch for the phases of training; exactly one phase is active at any time.

    Phases whose names do not say everything:
        - data: reading and collating rows, and the all-reduce of the step's number of loss tokens.
        - backward: includes gradient communication with DDP and ZeRO.
        - upload_stall: waiting for the upload of the previous checkpoint.
    """

    def __init__(self, timeline: Timeline):
        self._timeline = timeline
        self.start()

    def start(self) -> None:
        """Reset all phases."""
        self._seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._ended: list[tuple[Phase, Any, Any]] = []  # (phase, begin, end) not yet added to _seconds
        self._phase: Phase = "other"
        self._since = self._timeline.mark()

    def enter(self, phase: Phase) -> None:
        """End the current phase and begin this one."""
        now = self._timeline.mark()
        self._ended.append((self._phase, self._since, now))
        self._phase, self._since = phase, now

    def timed(self, phase: Phase, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function to count its time as this phase; afterwards the surrounding phase continues."""

        def in_phase(*arguments: Any, **keywords: Any) -> Any:
            around = self._phase
            self.enter(phase)
            try:
                return function(*arguments, **keywords)
            finally:
                self.enter(around)

        return in_phase

    def seconds(self) -> dict[Phase, float]:
        """Return the seconds spent in each phase so far."""
        self.enter(self._phase)
        for phase, begin, end in self._ended:
            self._seconds[phase] += self._timeline.seconds(begin, end)
        self._ended.clear()
        return dict(self._seconds)


@dataclass
class _Work:
    """Amount of trained rows, tokens and FLOPs, and the time for them."""

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
    """A callback that counts trained rows and tokens from the batch plan, without communication between workers.

    It must come after the callbacks that evaluate or save, so that its clock restarts after them.
    """

    def __init__(
        self,
        order: BatchPlan,
        tokens_of_row: Sequence[int],
        loss_tokens_of_row: Sequence[int],
        *,
        clock: PhaseClock,
        flops: RowFlops | None,
        peak_flops: float | None,
    ):
        """Start counting at zero.

        Args:
            order: Assigns rows to steps.
            tokens_of_row: Tokens of each row.
            loss_tokens_of_row: Loss tokens of each row.
            clock: Measures the phases.
            flops: FLOPs per row; None if unknown.
            peak_flops: Peak FLOPS of all devices together; None if unknown.
        """
        self.order = order
        self.tokens_of_row = tokens_of_row
        self.loss_tokens_of_row = loss_tokens_of_row
        self.clock = clock
        self.flops = flops
        self.peak_flops = peak_flops
        self.trained = _Work()  # since step 0
        self._timed = _Work()  # by this process
        self._step = _Work()
        self._since = 0.0
        self._reported = clock.seconds()

    def count_restored(self, last_step: int) -> None:
        """Add the steps that earlier attempts trained."""
        for step in range(1, last_step + 1):
            self.trained += self._work_of(step)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clocks."""
        self.clock.start()
        self._reported = self.clock.seconds()
        self._since = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count an optimizer step, including the time for reading its rows."""
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
        """Exclude the time of the evaluation."""
        self.restart()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Exclude the time of saving."""
        self.restart()

    def restart(self) -> None:
        """Restart the step timer, so that the time since the last step is not counted."""
        self._since = time.perf_counter()

    def figures_of_step(self) -> dict[str, float]:
        """Return the throughput metrics of the last step; phase seconds cover the time since the previous call."""
        speed, seconds = self._speed(self._step), self.clock.seconds()
        figures: dict[str, float] = {
            "tokens_per_second": speed.tokens_per_second,
            "trained_tokens_per_second": speed.trained_tokens_per_second,
            "peak_memory_bytes": speed.peak_memory_bytes,
        }
        if speed.mfu is not None:
            figures["mfu"] = speed.mfu
        figures |= {f"seconds/{phase}": round(seconds[phase] - self._reported[phase], 6) for phase in PHASES}
        self._reported = seconds
        return figures

    def speed(self) -> Speed:
        """Return the throughput over all steps of this attempt."""
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
        lengths = [(self.tokens_of_row[row], self.loss_tokens_of_row[row]) for row in rows]
        return _Work(
            rows=len(rows),
            tokens=sum(tokens for tokens, _ in lengths),
            trained_tokens=sum(loss_tokens for _, loss_tokens in lengths),
            flops=sum(self.flops.of_row(*length) for length in lengths) if self.flops else 0.0,
        )


def _peak_memory_bytes() -> int:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux reports KiB

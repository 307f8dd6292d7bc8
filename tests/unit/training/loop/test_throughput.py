"""Throughput, phase times and MFU, measured with simulated clocks."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from training.data.batches import BatchPlan, BatchShape
from training.loop import throughput as throughput_module
from training.loop.throughput import PHASES, GpuTimeline, HostTimeline, PhaseClock, Throughput
from training.planning.accelerators import (
    ACCELERATORS,
    memory_of,
    named_accelerator,
    nearest_name,
    peak_flops_of,
)
from training.planning.flops import RowFlops


class SimulatedClock:
    """A clock that advances only when a test advances it."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimulatedClock:
    clock = SimulatedClock()
    monkeypatch.setattr(throughput_module.time, "perf_counter", clock)
    return clock


def test_each_second_is_attributed_to_one_phase(clock: SimulatedClock):
    phases = PhaseClock(HostTimeline())
    clock.advance(50)
    phases.start()
    phases.timed("data", lambda: clock.advance(1))()
    clock.advance(2)

    def optimizer_step() -> None:
        clock.advance(8)

    def backward() -> None:
        clock.advance(4)
        phases.timed("optimizer", optimizer_step)()
        clock.advance(16)

    def forward_and_backward() -> str:
        clock.advance(32)
        phases.timed("backward", backward)()
        return "loss"

    assert phases.timed("forward", forward_and_backward)() == "loss"
    phases.enter("saving")
    clock.advance(64)
    seconds = phases.seconds()
    assert {phase: spent for phase, spent in seconds.items() if spent} == {
        "data": 1,
        "other": 2,
        "backward": 20,
        "optimizer": 8,
        "forward": 32,
        "saving": 64,
    }
    clock.advance(1)
    assert phases.seconds()["saving"] == 65


def test_phase_ends_when_its_function_raises_an_error(clock: SimulatedClock):
    phases = PhaseClock(HostTimeline())

    def fail() -> None:
        clock.advance(3)
        raise OSError

    with pytest.raises(OSError):
        phases.timed("upload_stall", fail)()
    clock.advance(2)
    assert phases.seconds()["upload_stall"] == 3
    assert phases.seconds()["other"] == 2


class SimulatedGpu:
    """A GPU with a queue: work starts when the GPU is free, and an event completes after all work queued before it."""

    def __init__(self, host: SimulatedClock, monkeypatch: pytest.MonkeyPatch):
        self.host, self.free_at = host, host.now
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool):
                assert enable_timing

            def record(self) -> None:
                gpu.free_at = self.time = max(gpu.free_at, host.now)

            def synchronize(self) -> None:
                host.now = max(host.now, self.time)

            def elapsed_time(self, end: "Event") -> float:
                assert host.now >= end.time, "torch raises an error if the event is not complete"
                return 1000 * (end.time - self.time)

        monkeypatch.setattr(throughput_module.torch.cuda, "Event", Event)

    def queue(self, seconds: float) -> None:
        self.free_at = max(self.free_at, self.host.now) + seconds


def test_gpu_time_is_attributed_to_the_phase_that_queued_the_work(
    clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch
):
    """The simulated events behave as CUDA's documentation says; a real GPU is not needed."""
    gpu = SimulatedGpu(clock, monkeypatch)
    phases = PhaseClock(GpuTimeline())
    phases.timed("data", lambda: clock.advance(3))()  # the GPU is idle
    for _ in range(2):
        phases.timed("forward", lambda: (clock.advance(1), gpu.queue(10)))()
        phases.timed("backward", lambda: (clock.advance(1), gpu.queue(20)))()
        phases.timed("data", lambda: clock.advance(3))()  # the GPU is busy
    before = clock.now
    phases.enter("saving")
    assert clock.now == before, "entering a phase does not synchronize"
    seconds = phases.seconds()
    clock.advance(5)
    assert phases.seconds()["saving"] == 5
    # The first kernel is queued one second after the data.
    assert {phase: spent for phase, spent in seconds.items() if spent} == {
        "data": 3,
        "forward": 21,
        "backward": 40,
    }


def make_throughput(clock: SimulatedClock, **changes: Any) -> Throughput:
    """Return a Throughput with two rows per step on two devices; each row has 10 tokens, 4 of them loss tokens."""
    throughput = Throughput(
        BatchPlan(BatchShape(8, 1, 2, 1), 0),
        [10] * 8,
        [4] * 8,
        clock=PhaseClock(HostTimeline()),
        **{"flops": RowFlops(3.0, 5.0, ((None, 2.0),)), "peak_flops": 160.0} | changes,
    )
    throughput.on_train_begin(*arguments(0))
    return throughput


def arguments(step: int) -> Any:
    return None, SimpleNamespace(global_step=step), None


def test_throughput_excludes_evaluation_and_saving(clock: SimulatedClock):
    throughput = make_throughput(clock)
    clock.advance(4)
    throughput.on_step_end(*arguments(1))
    assert throughput.figures_of_step()["tokens_per_second"] == 20 / 4
    clock.advance(1000)
    throughput.on_evaluate(*arguments(1))
    clock.advance(1000)
    throughput.on_save(*arguments(1))
    clock.advance(1)
    throughput.on_step_end(*arguments(2))
    figures = throughput.figures_of_step()
    assert figures["tokens_per_second"] == 20
    assert figures["trained_tokens_per_second"] == 8
    total = throughput.speed()
    assert total.tokens_per_second == 40 / 5
    assert total.trained_tokens_per_second == 16 / 5
    assert total.peak_memory_bytes > 0


def test_mfu_is_the_flops_of_the_rows_over_the_peak_of_the_devices(clock: SimulatedClock):
    throughput = make_throughput(clock)
    clock.advance(4)
    throughput.on_step_end(*arguments(1))
    # FLOPs per row: 3 x 10 tokens + 5 x 4 loss tokens + 2 x 55 pairs.
    assert throughput.figures_of_step()["mfu"] == 2 * 160 / 4 / 160
    clock.advance(1)
    throughput.on_step_end(*arguments(2))
    assert throughput.speed().mfu == 4 * 160 / 5 / 160


@pytest.mark.parametrize("unknown", [{"flops": None}, {"peak_flops": None}])
def test_mfu_is_absent_if_flops_or_peak_are_unknown(clock: SimulatedClock, unknown: dict[str, Any]):
    throughput = make_throughput(clock, **unknown)
    clock.advance(4)
    throughput.on_step_end(*arguments(1))
    assert "mfu" not in throughput.figures_of_step()
    assert throughput.speed().mfu is None


def test_step_figures_have_the_phase_seconds_since_the_previous_step(clock: SimulatedClock):
    throughput = make_throughput(clock)
    for step, (data, stall) in enumerate([(1, 0), (2, 7)], start=1):
        throughput.clock.timed("data", clock.advance)(data)
        throughput.clock.timed("upload_stall", clock.advance)(stall)
        throughput.on_step_end(*arguments(step))
        figures = throughput.figures_of_step()
        assert (figures["seconds/data"], figures["seconds/upload_stall"]) == (data, stall)
        assert {name for name in figures if name.startswith("seconds/")} == {
            f"seconds/{phase}" for phase in PHASES
        }
    assert throughput.speed().seconds["data"] == 3


def test_restored_run_counts_earlier_rows_but_not_their_time(clock: SimulatedClock):
    throughput = make_throughput(clock)
    throughput.count_restored(2)
    assert (throughput.trained.rows, throughput.trained.tokens) == (4, 40)
    clock.advance(4)
    throughput.on_step_end(*arguments(3))
    assert throughput.speed().tokens_per_second == 20 / 4
    assert throughput.trained.tokens == 60


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H200 MIG 3g.71gb", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peak_flops_are_found_by_the_cuda_device_name(device: str, peak: float | None):
    assert peak_flops_of(device) == peak


def test_accelerators_have_rays_names():
    from ray.util.accelerators import accelerators

    ray_names = {value for name, value in vars(accelerators).items() if name.startswith("NVIDIA")}
    assert {known.name for known in ACCELERATORS} - {"A10"} <= ray_names
    assert all(math.isfinite(known.peak_flops) and known.memory > 2**34 for known in ACCELERATORS)


def test_requested_accelerator_and_its_memory_are_found():
    assert named_accelerator({"CPU": 4, "accelerator_type:A10G": 0.001}) == "A10G"
    assert named_accelerator({"CPU": 4}) is None
    assert memory_of("A100") == memory_of("A100-40G"), "the smallest variant of that name"
    assert memory_of("Intel-GAUDI") is None


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("a10g", "A10G"), ("A100-80GB", "A100-80G"), ("H10", "H100"), ("Intel-GAUDI", None), ("T4", None)],
)
def test_misspelled_accelerator_has_the_nearest_known_name(name: str, nearest: str | None):
    assert nearest_name(name) == nearest

"""Tokens, phases and use of the hardware, by clocks that the test sets."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from training.data.batches import BatchPlan, BatchShape
from training.loop import throughput as speed
from training.loop.throughput import PHASES, GpuTimeline, HostTimeline, PhaseClock, Throughput
from training.planning.accelerators import (
    ACCELERATORS,
    memory_of,
    named_accelerator,
    nearest_name,
    peak_flops_of,
)
from training.planning.flops import RowFlops


class Time:
    """Passes when it is told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Time:
    clocks = Time()
    monkeypatch.setattr(speed.time, "perf_counter", clocks)
    return clocks


def test_every_second_is_counted_once(clocks: Time):
    clock = PhaseClock(HostTimeline())
    clocks.passes(50)
    clock.start()
    clock.timed("data", lambda: clocks.passes(1))()
    clocks.passes(2)

    def optimizer_step() -> None:
        clocks.passes(8)

    def backward() -> None:
        clocks.passes(4)
        clock.timed("optimizer", optimizer_step)()
        clocks.passes(16)

    def forward_and_backward() -> str:
        clocks.passes(32)
        clock.timed("backward", backward)()
        return "loss"

    assert clock.timed("forward", forward_and_backward)() == "loss"
    clock.enter("saving")
    clocks.passes(64)
    seconds = clock.seconds()
    assert {phase: spent for phase, spent in seconds.items() if spent} == {
        "data": 1,
        "other": 2,
        "backward": 20,
        "optimizer": 8,
        "forward": 32,
        "saving": 64,
    }
    clocks.passes(1)
    assert clock.seconds()["saving"] == 65


def test_an_error_ends_its_phase(clocks: Time):
    clock = PhaseClock(HostTimeline())

    def fails() -> None:
        clocks.passes(3)
        raise OSError

    with pytest.raises(OSError):
        clock.timed("upload_stall", fails)()
    clocks.passes(2)
    assert clock.seconds()["upload_stall"] == 3
    assert clock.seconds()["other"] == 2


class Gpu:
    """Works behind the process: what is handed over begins when it is free, and a mark comes when all before it is done."""

    def __init__(self, host: Time, monkeypatch: pytest.MonkeyPatch):
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
                assert host.now >= end.time, "torch refuses where the GPU has not come so far"
                return 1000 * (end.time - self.time)

        monkeypatch.setattr(speed.torch.cuda, "Event", Event)

    def works(self, seconds: float) -> None:
        self.free_at = max(self.free_at, self.host.now) + seconds


def test_what_a_gpu_does_is_counted_where_it_was_handed_over(clocks: Time, monkeypatch: pytest.MonkeyPatch):
    """A real GPU's marks are none that can be had here; these behave as CUDA's documentation says."""
    gpu = Gpu(clocks, monkeypatch)
    clock = PhaseClock(GpuTimeline())
    clock.timed("data", lambda: clocks.passes(3))()  # it has nothing to do yet
    for _ in range(2):
        clock.timed("forward", lambda: (clocks.passes(1), gpu.works(10)))()
        clock.timed("backward", lambda: (clocks.passes(1), gpu.works(20)))()
        clock.timed("data", lambda: clocks.passes(3))()  # it is at work
    begun = clocks.now
    clock.enter("saving")
    assert clocks.now == begun, "nobody waited for it"
    seconds = clock.seconds()
    clocks.passes(5)
    assert clock.seconds()["saving"] == 5
    # The first kernel comes a second behind the data.
    assert {phase: spent for phase, spent in seconds.items() if spent} == {
        "data": 3,
        "forward": 21,
        "backward": 40,
    }


def throughput(clocks: Time, **changes: Any) -> Throughput:
    """Two rows a step on two devices; all rows have 10 tokens, of which 4 are trained."""
    counted = Throughput(
        BatchPlan(BatchShape(8, 1, 2, 1), 0),
        [10] * 8,
        [4] * 8,
        clock=PhaseClock(HostTimeline()),
        **{"flops": RowFlops(3.0, 5.0, ((None, 2.0),)), "peak_flops": 160.0} | changes,
    )
    counted.on_train_begin(*arguments(0))
    return counted


def arguments(step: int) -> Any:
    return None, SimpleNamespace(global_step=step), None


def test_evaluation_and_saving_are_left_out_of_the_speed(clocks: Time):
    counted = throughput(clocks)
    clocks.passes(4)
    counted.on_step_end(*arguments(1))
    assert counted.figures_of_step()["tokens_per_second"] == 20 / 4
    clocks.passes(1000)
    counted.on_evaluate(*arguments(1))
    clocks.passes(1000)
    counted.on_save(*arguments(1))
    clocks.passes(1)
    counted.on_step_end(*arguments(2))
    figures = counted.figures_of_step()
    assert figures["tokens_per_second"] == 20
    assert figures["trained_tokens_per_second"] == 8
    whole = counted.speed()
    assert whole.tokens_per_second == 40 / 5
    assert whole.trained_tokens_per_second == 16 / 5
    assert whole.peak_memory_bytes > 0


def test_use_of_the_hardware_is_what_the_rows_need_over_what_the_devices_could_do(clocks: Time):
    counted = throughput(clocks)
    clocks.passes(4)
    counted.on_step_end(*arguments(1))
    # A row: 3 x 10 tokens, 5 x 4 trained ones, 2 x 55 pairs.
    assert counted.figures_of_step()["mfu"] == 2 * 160 / 4 / 160
    clocks.passes(1)
    counted.on_step_end(*arguments(2))
    assert counted.speed().mfu == 4 * 160 / 5 / 160


@pytest.mark.parametrize("unknown", [{"flops": None}, {"peak_flops": None}])
def test_nothing_is_guessed(clocks: Time, unknown: dict[str, Any]):
    counted = throughput(clocks, **unknown)
    clocks.passes(4)
    counted.on_step_end(*arguments(1))
    assert "mfu" not in counted.figures_of_step()
    assert counted.speed().mfu is None


def test_a_step_has_the_seconds_since_the_line_before(clocks: Time):
    counted = throughput(clocks)
    for step, (data, stall) in enumerate([(1, 0), (2, 7)], start=1):
        counted.clock.timed("data", clocks.passes)(data)
        counted.clock.timed("upload_stall", clocks.passes)(stall)
        counted.on_step_end(*arguments(step))
        figures = counted.figures_of_step()
        assert (figures["seconds/data"], figures["seconds/upload_stall"]) == (data, stall)
        assert {name for name in figures if name.startswith("seconds/")} == {
            f"seconds/{phase}" for phase in PHASES
        }
    assert counted.speed().seconds["data"] == 3


def test_a_restored_run_counts_its_rows_and_not_its_time(clocks: Time):
    counted = throughput(clocks)
    counted.count_restored(2)
    assert (counted.trained.rows, counted.trained.tokens) == (4, 40)
    clocks.passes(4)
    counted.on_step_end(*arguments(3))
    assert counted.speed().tokens_per_second == 20 / 4
    assert counted.trained.tokens == 60


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
def test_peak_speed_by_what_cuda_calls_a_device(device: str, peak: float | None):
    assert peak_flops_of(device) == peak


def test_accelerators_are_called_as_ray_calls_them():
    from ray.util.accelerators import accelerators

    of_ray = {value for name, value in vars(accelerators).items() if name.startswith("NVIDIA")}
    assert {known.name for known in ACCELERATORS} - {"A10"} <= of_ray
    assert all(math.isfinite(known.peak_flops) and known.memory > 2**34 for known in ACCELERATORS)


def test_the_accelerator_that_workers_ask_for():
    assert named_accelerator({"CPU": 4, "accelerator_type:A10G": 0.001}) == "A10G"
    assert named_accelerator({"CPU": 4}) is None
    assert memory_of("A100") == memory_of("A100-40G"), "the least that the name may mean"
    assert memory_of("Intel-GAUDI") is None


@pytest.mark.parametrize(
    ("name", "meant"),
    [("a10g", "A10G"), ("A100-80GB", "A100-80G"), ("H10", "H100"), ("Intel-GAUDI", None), ("T4", None)],
)
def test_a_name_that_is_misspelt(name: str, meant: str | None):
    assert nearest_name(name) == meant

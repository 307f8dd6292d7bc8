"""The parts of the GPU benchmark, in order of worth: what each runs, what it measures, and its targets."""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.gpu_runs import Bench, Measured

BF16_EPSILON = 2**-8
"""Largest relative error of rounding to bf16, which has 8 significant bits."""


def number(value: float) -> str:
    """Return a figure as text: four digits, or all digits before the point."""
    if value == BF16_EPSILON:
        return "2^-8"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


class Target(NamedTuple):
    """The range that a figure should lie in."""

    least: float = 0.0
    most: float = math.inf

    def includes(self, value: float) -> bool:
        """Return whether a value lies in the range."""
        return self.least <= value <= self.most

    def __str__(self) -> str:
        if self.most == math.inf:
            return f"at least {number(self.least)}"
        return (
            f"{number(self.least)} to {number(self.most)}" if self.least else f"at most {number(self.most)}"
        )


@dataclass(frozen=True)
class Contestant:
    """One run that a part measures."""

    run: Callable[[Bench], Measured]
    seconds: float
    """Estimated seconds. It starts only if they remain; Setting has its time limit."""
    needs_gpu: bool = False
    """True if it cannot run with the shapes for two CPU cores."""


@dataclass(frozen=True)
class Figure:
    """A row of the table."""

    name: str
    needs: tuple[str, ...]
    """Contestants."""
    value: Callable[..., float | None]
    """Computes the figure from their measurements; None if they do not have it, such as MFU on CPU."""
    target: Target


@dataclass(frozen=True)
class Part:
    """Several rows of the table."""

    figures: tuple[Figure, ...]
    workload: str
    """Name of the workload that its contestants share."""
    together: str | None = None
    """Contestants of all parts with the same value run at the same time, since no time of theirs is measured; None: each alone."""

    @property
    def timed(self) -> bool:
        """Return whether times of its contestants are measured."""
        return self.together is None

    @property
    def contestants(self) -> list[str]:
        """The contestants of all figures, in order."""
        return list(dict.fromkeys(name for figure in self.figures for name in figure.needs))


def _step(bench: Bench, kernels: str, *, packed: bool = False) -> Measured:
    return bench.alone("step", train_path=str(bench.gsm8k_rows("step")), kernels=kernels, packing=packed)


def _reference(bench: Bench, *, packed: bool = False) -> Measured:
    rows = str(bench.gsm8k_rows("step"))
    return bench.alone("step", device="cpu", dtype="fp32", kernels="torch", train_path=rows, packing=packed)


def _killed(bench: Bench) -> Measured:
    return bench.killed("resume", deterministic=True)


def _packed(bench: Bench) -> dict[str, Any]:
    return {"train_path": str(bench.gsm8k_rows("rows")), "packing": True}


def _unpacked(bench: Bench, rows_per_batch: int) -> Measured:
    """Run unpacked rows; the rows of a step stay the same for any number of rows per batch."""
    workload = bench.workloads["rows"]
    rows = workload.batch_size * workload.accumulation
    return bench.main(
        "rows",
        train_path=str(bench.gsm8k_rows("rows")),
        train_batch_size_per_device=min(rows, rows_per_batch),
        gradient_accumulation_steps=max(1, rows // rows_per_batch),
    )


def _full(bench: Bench) -> Measured:
    """Run full-parameter training without checkpoints, whose 40 GB would dominate a run of main.py."""
    return bench.alone("full", lora_config=None)


def _losses(bench: Bench, kernels: str) -> Measured:
    return bench.alone("losses", kernels=kernels)


@dataclass(frozen=True)
class Method:
    """A way to train, whose losses are compared with those of the same rows on CPU in fp32."""

    reference: str
    """Key of _REFERENCES."""
    changes: Mapping[str, Any]
    """Keys of the YAML, besides those of the reference."""
    seconds: float = 65
    """Estimated seconds."""
    run: Callable[..., Measured] = Bench.main


# The learning rates are so high that each loss depends on the gradients and updates before it.
_FULL = {"lora_config": None, "learning_rate": 1e-4}
_PREFERENCES = {"task": "preference_tuning"}
_REFERENCES: Mapping[str, Mapping[str, Any]] = {
    "LoRA": {},
    "full-parameter": _FULL,
    "packed full-parameter": {**_FULL, "packing": True},
    "QLoRA": {"load_in_4bit": True},
    "DPO": _PREFERENCES,
    "KTO": {**_PREFERENCES, "preference_tuning_config": {"loss": "kto"}},
}
_METHODS: Mapping[str, Method] = {
    "full-parameter with torch": Method("full-parameter", {"kernels": "torch"}),
    "full-parameter with Liger": Method("full-parameter", {"kernels": "liger"}),
    "full-parameter in fp32": Method("full-parameter", {"kernels": "torch", "dtype": "fp32"}),
    "full-parameter with ZeRO-3, killed": Method(
        "full-parameter", {"deepspeed": "zero_3"}, seconds=130, run=Bench.killed
    ),
    "packed full-parameter with ZeRO-2": Method("packed full-parameter", {"deepspeed": "zero_2"}),
    "LoRA with ZeRO-2": Method("LoRA", {"deepspeed": "zero_2"}, seconds=95),
    "LoRA with ZeRO-3": Method("LoRA", {"deepspeed": "zero_3"}),
    "LoRA with gradient checkpointing": Method("LoRA", {"kernels": "torch", "gradient_checkpointing": True}),
    "LoRA with Unsloth's gradient checkpointing": Method(
        "LoRA", {"kernels": "unsloth", "gradient_checkpointing": "unsloth"}, seconds=95
    ),
    "LoRA with paged 8-bit AdamW": Method("LoRA", {"kernels": "torch", "optim": "paged_adamw_8bit"}),
    "QLoRA with torch": Method("QLoRA", {"kernels": "torch"}),
    "QLoRA with Liger": Method("QLoRA", {"kernels": "liger"}),
    "QLoRA with Unsloth": Method("QLoRA", {"kernels": "unsloth"}, seconds=95),
    "DPO with torch": Method("DPO", {"kernels": "torch"}),
    "DPO with ZeRO-3": Method("DPO", {"deepspeed": "zero_3"}),
    "KTO with torch": Method("KTO", {"kernels": "torch"}),
}
_USED = "LoRA on chats"


def _method(
    bench: Bench, run: Callable[..., Measured], reference: str, changes: Mapping[str, Any]
) -> Measured:
    """Train with the keys of a reference and these, on the rows of their task."""
    keys = {"learning_rate": 1e-3, **_REFERENCES[reference], **changes}
    rows = bench.pairs if keys.get("task") == "preference_tuning" else bench.gsm8k_rows
    return run(bench, "methods", train_path=str(rows("methods")), **keys)


def _on_cpu(reference: str) -> str:
    return f"{reference} on CPU in fp32"


def _methods() -> dict[str, Contestant]:
    """Return the contestants of part `methods`."""
    cpu = {"device": "cpu", "dtype": "fp32", "kernels": "torch"}
    references = {
        _on_cpu(name): Contestant(lambda bench, name=name: _method(bench, Bench.alone, name, cpu), 65)
        for name in _REFERENCES
    }
    methods = {
        name: Contestant(
            lambda bench, method=method: _method(bench, method.run, method.reference, method.changes),
            method.seconds,
            needs_gpu=method.changes.get("kernels") == "liger",
        )
        for name, method in _METHODS.items()
    }
    return references | methods | {_USED: Contestant(lambda bench: bench.used("methods"), 180)}


CONTESTANTS: Mapping[str, Contestant] = {
    "step on CPU in fp32": Contestant(_reference, 65),
    "step of torch": Contestant(lambda bench: _step(bench, "torch"), 60),
    "step of liger": Contestant(lambda bench: _step(bench, "liger"), 60, needs_gpu=True),
    "step of unsloth": Contestant(lambda bench: _step(bench, "unsloth"), 95),
    "packed step on CPU in fp32": Contestant(lambda bench: _reference(bench, packed=True), 65),
    "packed step of torch": Contestant(lambda bench: _step(bench, "torch", packed=True), 60),
    "packed step of liger": Contestant(lambda bench: _step(bench, "liger", packed=True), 60, needs_gpu=True),
    "lora": Contestant(lambda bench: bench.main("lora", estimates=True), 75),
    "lora of Unsloth's own script": Contestant(lambda bench: bench.peer("unsloth", "lora"), 55),
    "lora of TRL and PEFT": Contestant(lambda bench: bench.peer("trl", "lora"), 40),
    "deterministic": Contestant(lambda bench: bench.main("resume", deterministic=True), 110),
    "deterministic, killed": Contestant(_killed, 190),
    "packed": Contestant(lambda bench: bench.main("rows", **_packed(bench)), 45),
    "unpacked": Contestant(lambda bench: _unpacked(bench, bench.workloads["rows"].batch_size), 55),
    "unpacked, 16 rows per batch": Contestant(lambda bench: _unpacked(bench, 16), 55),
    "full": Contestant(_full, 55),
    "qlora": Contestant(lambda bench: bench.main("qlora", estimates=True, load_in_4bit=True), 65),
    "qlora of Unsloth's own script": Contestant(
        lambda bench: bench.peer("unsloth", "qlora", load_in_4bit=True), 45
    ),
    "packed under torchrun": Contestant(lambda bench: bench.alone("rows", **_packed(bench)), 35),
    "losses of torch": Contestant(lambda bench: _losses(bench, "torch"), 80),
    "losses of unsloth": Contestant(lambda bench: _losses(bench, "unsloth"), 115),
    "losses of liger": Contestant(lambda bench: _losses(bench, "liger"), 80, needs_gpu=True),
    **_methods(),
}


def _loss_difference(measured: Measured, reference: Measured) -> float:
    return abs(measured.losses[0] / reference.losses[0] - 1)


def _gradient_difference(measured: Measured, reference: Measured) -> float:
    return abs(measured.gradient_norms[0] / reference.gradient_norms[0] - 1)


def _speed_ratio(measured: Measured, reference: Measured) -> float:
    return measured.tokens_per_second / reference.tokens_per_second


def _memory_ratio(measured: Measured, reference: Measured) -> float:
    return measured.peak_memory_bytes / reference.peak_memory_bytes


def _time_ratio(measured: Measured, reference: Measured) -> float:
    return measured.step_seconds / reference.step_seconds


def _estimate_ratio(measured: Measured) -> float | None:
    """Return the ratio of the plan's estimate to the peak; None on CPU, where the peak includes the process."""
    if measured.estimated_bytes is None or measured.mfu is None:
        return None
    return measured.estimated_bytes / measured.peak_memory_bytes


def _has_equal_weights(measured: Measured, reference: Measured) -> float:
    return float(measured.weights is not None and measured.weights == reference.weights)


def _differences(measured: Measured, reference: Measured) -> list[float]:
    pairs = zip(measured.losses, reference.losses, strict=True)
    return [loss / expected - 1 for loss, expected in pairs]


def _largest_difference(measured: Measured, reference: Measured) -> float:
    return max(map(abs, _differences(measured, reference)))


def _drift(measured: Measured, reference: Measured) -> float:
    """Return the growth of the mean difference from the first to the last ten steps."""
    differences = _differences(measured, reference)
    return abs(statistics.mean(differences[-10:]) - statistics.mean(differences[:10]))


def _step_figures(step: str, reference: str) -> tuple[Figure, ...]:
    needs = step, reference
    return (
        Figure(f"loss of {step}: difference", needs, _loss_difference, Target(most=BF16_EPSILON)),
        # New adapters are random, and Unsloth draws theirs on the GPU.
        Figure(f"gradient norm of {step}: difference", needs, _gradient_difference, Target(most=0.1)),
    )


def _losses_figures(kernels: str) -> tuple[Figure, ...]:
    needs = f"losses of {kernels}", "losses of torch"
    return (
        Figure(f"{kernels}: largest difference of a loss", needs, _largest_difference, Target(most=1e-2)),
        Figure(f"{kernels}: drift of the difference", needs, _drift, Target(most=1e-2)),
    )


def _succeeded(_: Measured) -> float:
    """Return 1, since a contestant that fails has no measurements."""
    return 1.0


_METHOD_FIGURES = (
    *(
        Figure(
            f"{name}: largest difference of a loss",
            (name, _on_cpu(method.reference)),
            _largest_difference,
            Target(most=BF16_EPSILON),
        )
        for name, method in _METHODS.items()
    ),
    Figure(f"{_USED}, then chat, evaluate and export: success", (_USED,), _succeeded, Target(1)),
)
_UNSLOTH, _TRL, _QLORA_OF_UNSLOTH = (
    "lora of Unsloth's own script",
    "lora of TRL and PEFT",
    "qlora of Unsloth's own script",
)
_ESTIMATE = "estimated memory / peak", _estimate_ratio, Target(0.9, 1.1)

PARTS: Mapping[str, Part] = {
    "step": Part(
        (
            *_step_figures("step of torch", "step on CPU in fp32"),
            *_step_figures("step of liger", "step on CPU in fp32"),
            *_step_figures("step of unsloth", "step on CPU in fp32"),
            *_step_figures("packed step of torch", "packed step on CPU in fp32"),
            *_step_figures("packed step of liger", "packed step on CPU in fp32"),
        ),
        workload="step",
        together="first",
    ),
    "lora": Part(
        (
            Figure("tokens/s", ("lora",), lambda lora: lora.tokens_per_second, Target(13_500)),
            Figure("tokens/s / Unsloth's own script", ("lora", _UNSLOTH), _speed_ratio, Target(1.0)),
            Figure("tokens/s / TRL and PEFT", ("lora", _TRL), _speed_ratio, Target(1.3)),
            Figure("peak memory / Unsloth's", ("lora", _UNSLOTH), _memory_ratio, Target(most=1.05)),
            Figure(_ESTIMATE[0], ("lora",), *_ESTIMATE[1:]),
        ),
        workload="lora",
    ),
    "resume": Part(
        (
            Figure(
                "weights are those of a run that was never killed",
                ("deterministic, killed", "deterministic"),
                _has_equal_weights,
                Target(1),
            ),
        ),
        workload="resume",
        together="first",
    ),
    "packing": Part(
        (
            Figure("real tokens/s / unpacked", ("packed", "unpacked"), _speed_ratio, Target(2.5)),
            Figure(
                "real tokens/s / unpacked, 16 rows per batch",
                ("packed", "unpacked, 16 rows per batch"),
                _speed_ratio,
                Target(1.0),
            ),
        ),
        workload="rows",
    ),
    "full": Part(
        (
            Figure("MFU", ("full",), lambda full: full.mfu, Target(0.57)),
            Figure(_ESTIMATE[0], ("full",), *_ESTIMATE[1:]),
        ),
        workload="full",
    ),
    "qlora": Part(
        (
            Figure("peak memory / Unsloth's", ("qlora", _QLORA_OF_UNSLOTH), _memory_ratio, Target(most=1.05)),
            Figure(
                "tokens/s / Unsloth's own script", ("qlora", _QLORA_OF_UNSLOTH), _speed_ratio, Target(1.0)
            ),
            Figure(_ESTIMATE[0], ("qlora",), *_ESTIMATE[1:]),
        ),
        workload="qlora",
    ),
    "ray": Part(
        (
            Figure(
                "step time / the same trainer under torchrun",
                ("packed", "packed under torchrun"),
                _time_ratio,
                Target(most=1.02),
            ),
        ),
        workload="rows",
    ),
    "losses": Part(
        (*_losses_figures("unsloth"), *_losses_figures("liger")), workload="losses", together="first"
    ),
    "methods": Part(_METHOD_FIGURES, workload="methods", together="methods"),
}

"""The plan report, printed before training; `--dry-run --json` prints it as JSON."""

from dataclasses import dataclass

from runs.layout import RunResult
from training.data.report import DataReport
from training.planning.memory import MemoryReport


class PlanReport(DataReport):
    """The plan of a run, as printed before training and by `--dry-run --json`."""

    run_name: str
    run_uri: str
    storage: str
    """Result of the write check of the storage with the local credentials."""
    cluster: str | None = None
    """The cluster's resources for the workers, or those that it must scale up to; None if no cluster was queried."""
    model: str
    architecture: str
    parameters: int
    trainable_parameters: int
    mixture: str | None
    """States whether the adapter of a mixture of experts changes the experts and the router; None without an adapter or experts."""
    device: str
    kernels: str
    parallelism: str
    batch: str
    """Batch size per device and gradient accumulation."""
    packing: str | None
    """Number of packed sequences, and how full they are; None without packing."""
    resumes_from: str | None
    starts_from: str | None
    tokenizer: str | None
    """The continued adapter whose own tokenizer is used; None: the base model's is used."""
    memory: MemoryReport | None
    """The memory estimate; None for unsupported architectures."""
    completed: RunResult | None
    """The result of this run if it is already completed."""
    warnings: list[str]


@dataclass(frozen=True)
class CheckedSample:
    """A run of which a sample of the rows is checked."""

    rows: int
    """Rows that are checked: the first ones of each source that is not prepared yet."""
    run_uri: str | None
    """None if the run name depends on all rows."""

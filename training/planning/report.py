"""The plan report: what a user reads before training, and what a dry run prints as JSON."""

from runs.layout import RunResult
from training.data.report import DataReport
from training.planning.memory import MemoryReport


class PlanReport(DataReport):
    """What a person reads before a run starts, and `--dry-run --json` returns."""

    run_name: str
    run_uri: str
    storage: str
    """What was tried where the run will go, with the credentials that are here."""
    cluster: str | None = None
    """What the cluster that RAY_ADDRESS names has for the workers, or has to scale up to; None where it was not asked."""
    model: str
    architecture: str
    parameters: int
    trainable_parameters: int
    device: str
    kernels: str
    parallelism: str
    batch: str
    """What a device takes at once, and how often before a step."""
    packing: str | None
    """How many packs, and how full they are."""
    resumes_from: str | None
    starts_from: str | None
    memory: MemoryReport | None
    """Estimated; None where nobody has counted it for such layers."""
    completed: RunResult | None
    """What the same run left, if it ended before: nothing is left to do."""
    warnings: list[str]

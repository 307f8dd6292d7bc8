"""The per-device batch size: the number that `train_batch_size_per_device: auto` resolves to, and its description."""

from dataclasses import replace

from configs.loading import ConfigError
from configs.schema import FinetuneConfig
from runs.layout import run_of
from runs.reading import latest, survey
from training.data.batches import BatchShape
from training.data.summary import DataSummary
from training.planning.devices import accelerator_of
from training.planning.endpoints import ClusterTarget
from training.planning.memory import Job, estimate_memory, largest_batch
from training.planning.resume import batch_size_of, resolve
from utils.storage.bucket import open_store

# Bytes reserved for Python, torch and loaded libraries: a worker with a tiny model used at most 0.7 GB (2026-11-21).
_CPU_PROCESS = 1_000_000_000


def choose_batch_size(
    config: FinetuneConfig, run_uri: str, storage: str, job: Job | None, target: ClusterTarget
) -> tuple[int, str]:
    """Return the value of `train_batch_size_per_device: auto`, and the reason.

    A resumed run keeps its batch size on any device. Another batch size rounds differently, so the result would differ from
    that of an uninterrupted run.
    """
    earlier = [run_uri] if survey(open_store(run_uri))[0] else []
    if config.resume_from_checkpoint:
        start = resolve("resume_from_checkpoint", config.resume_from_checkpoint, storage, latest)
        earlier.append(run_of(start))
    for run in earlier:
        if rows := batch_size_of(open_store(run), config):
            return rows, "auto: unchanged since the run started"
    key = "train_batch_size_per_device: auto"
    if job is None:
        raise ConfigError(f"{key}: memory cannot be estimated for this model's architecture. Write a number.")
    name, available = accelerator_of(config, job.device, target)
    if job.device == "cpu":
        memory = config.worker_resources.get("memory")
        if memory is None:
            raise ConfigError(
                f"{key}: on CPU the memory limit of a worker is not known. Write worker_resources: {{memory: 8GiB}}, or a number of "
                "rows."
            )
        name, available = "worker_resources.memory", int(memory) - _CPU_PROCESS
    if available is None:
        raise ConfigError(
            f"{key}: the memory of {name or 'the cluster devices'} is not known. Name a known accelerator in worker_resources, such as "
            "{accelerator_type:A10G: 0.001}, or write a number."
        )
    rows = largest_batch(job, available)
    if estimate_memory(replace(job, config=config.with_batch_size(rows))).total > available:
        return rows, f"auto: the minimum, but by the estimate even this does not fit {name}"
    return rows, f"auto: the largest that is estimated to fit {name}"


def describe_batch(config: FinetuneConfig, reason: str) -> str:
    """Describe the batch per device and the gradient accumulation for the plan report."""
    sequences = "pack" if config.packing else "row"
    rows, accumulated = config.batch_size, config.gradient_accumulation_steps
    size = config.sequence_parallel_size
    holder = "device" if size == 1 else f"{size} devices"
    text = f"{rows:,} {sequences}{'s' if rows > 1 else ''} per {holder}, {accumulated:,} accumulated"
    for devices in config.device_counts[-2::-1]:
        text += f", {config.accumulation_on(devices):,} on {devices} device{'s' if devices > 1 else ''}"
    return f"{text} ({reason})" if reason else text


def describe_packing(config: FinetuneConfig, train: DataSummary, shape: BatchShape) -> str:
    """Describe how many sequences the rows are packed into, and how full the sequences are."""
    capacity = config.context_length or train.longest
    fill = train.tokens / (shape.sequences * capacity)
    rows, sequences = _counted(train.rows, "row"), _counted(shape.sequences, "sequence")
    return f"{rows} in {sequences} of {capacity:,} tokens, {fill:.1%} full"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"

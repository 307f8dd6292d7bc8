"""The device of a run: CPU or GPUs, on this machine or in a cluster."""

import os

from configs.loading import ConfigError
from configs.schema import FinetuneConfig
from training.models.kernels import Device
from training.planning.accelerators import memory_of, named_accelerator
from training.planning.endpoints import ClusterError, ClusterTarget


def choose_device(config: FinetuneConfig, target: ClusterTarget) -> Device:
    """Resolve `device` for this machine or cluster; reject a run that needs more GPUs than this machine has."""
    if config.device == "cpu":
        return "cpu"
    asks_for_gpu = named_accelerator(config.worker_resources) or config.worker_resources.get("GPU")
    if not target.is_local or asks_for_gpu:
        return "cuda"  # a cluster's GPUs are not visible here; the job compares with the cluster's resources
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found == 0:
        if config.device == "cuda":
            raise ConfigError(
                "device: cuda, but this machine has no CUDA device. Write device: cpu, or set RAY_ADDRESS to a cluster with GPUs."
            )
        return "cpu"
    if found < config.fewest_devices:
        raise ConfigError(
            f"num_devices: {config.fewest_devices}, but this machine has {found} CUDA devices. Lower num_devices, or set RAY_ADDRESS to a larger cluster."
        )
    return "cuda"


def runs_here(config: FinetuneConfig, device: Device, target: ClusterTarget) -> bool:
    """Return whether this machine has the devices of a run; a plan without them is for another machine."""
    if device == "cpu" or not target.is_local:
        return target.is_local
    import torch

    return torch.cuda.device_count() >= config.fewest_devices


def check_devices_are_here(config: FinetuneConfig, device: Device, target: ClusterTarget) -> None:
    """Check that a run without a cluster finds its GPUs on this machine."""
    if target.is_local and not runs_here(config, device, target):
        import torch

        found = torch.cuda.device_count()
        named = named_accelerator(config.worker_resources)
        raise ClusterError(
            f"the run needs {config.fewest_devices} x {named or 'CUDA device'}, but this machine has {found} CUDA devices. Set "
            "RAY_ADDRESS to a cluster that has them, lower num_devices, or write device: cpu."
        )


def describe_device(config: FinetuneConfig, device: Device, target: ClusterTarget) -> str:
    """Describe the device and the workers for the plan report."""
    counts = config.device_counts
    fewer = f"{', '.join(map(str, counts[:-1]))} or " if len(counts) > 1 else ""
    workers = f"{fewer}{config.most_devices} worker{'s' if config.most_devices > 1 else ''}"
    cores = os.cpu_count() or 1
    if device == "cpu" and config.most_devices > cores and target.is_local:
        return f"cpu, {workers} sharing {cores} cores"
    return f"{device}, {workers}"


def describe_parallelism(config: FinetuneConfig, zero_stage: int) -> str:
    """Describe how the workers share the work for the plan report."""
    data = "DDP" if config.most_devices > 1 else "one worker"
    if config.deepspeed:
        data = f"DeepSpeed ZeRO-{zero_stage}"
    size = config.sequence_parallel_size
    return f"{data}, each sequence on {size} workers" if size > 1 else data


def accelerator_of(
    config: FinetuneConfig, device: Device, target: ClusterTarget
) -> tuple[str | None, int | None]:
    """Return (accelerator name, memory in bytes): the requested accelerator, else this machine's GPU; None if unknown."""
    if device == "cpu":
        return None, None
    if accelerator := named_accelerator(config.worker_resources):
        return accelerator, memory_of(accelerator)
    if not target.is_local:
        return None, None
    import torch

    if not torch.cuda.is_available():
        return None, None
    found = torch.cuda.get_device_properties(0)
    return found.name, found.total_memory

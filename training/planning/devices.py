"""What a run computes on: CPU or GPUs, those of this machine or a cluster's."""

import os

from configs.loading import ConfigError
from configs.schema import FinetuneConfig
from training.models.kernels import Device
from training.planning.accelerators import memory_of, named_accelerator
from training.planning.endpoints import ClusterError, ClusterTarget


def choose_device(config: FinetuneConfig, target: ClusterTarget) -> Device:
    """What `device` means here.

    Raises:
        ConfigError: there are not as many GPUs as it asks for.
    """
    if config.device == "cpu":
        return "cpu"
    asks_for_gpu = named_accelerator(config.worker_resources) or config.worker_resources.get("GPU")
    if not target.is_local or asks_for_gpu:
        return "cuda"  # a cluster's GPUs cannot be seen from here; the job compares with what the cluster has
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found == 0:
        if config.device == "cuda":
            raise ConfigError(
                "device: cuda, and this machine has no CUDA device. Write device: cpu, or set RAY_ADDRESS to a cluster with GPUs."
            )
        return "cpu"
    if found < config.fewest_devices:
        raise ConfigError(
            f"num_devices: {config.fewest_devices}, and this machine has {found} CUDA devices. Lower it, or set RAY_ADDRESS to a larger cluster."
        )
    return "cuda"


def check_devices_are_here(config: FinetuneConfig, device: Device, target: ClusterTarget) -> None:
    """Make sure that a run without a cluster finds its GPUs on this machine.

    Raises:
        ClusterError: there are fewer.
    """
    if device == "cpu" or not target.is_local:
        return
    import torch

    if (found := torch.cuda.device_count()) < config.fewest_devices:
        named = named_accelerator(config.worker_resources)
        raise ClusterError(
            f"the run needs {config.fewest_devices} x {named or 'CUDA device'}, and this machine has {found} CUDA devices. Set "
            "RAY_ADDRESS to a cluster that has them, lower num_devices, or write device: cpu."
        )


def describe_device(config: FinetuneConfig, device: Device, target: ClusterTarget) -> str:
    """What a person reads of the device and the workers."""
    counts = config.device_counts
    fewer = f"{', '.join(map(str, counts[:-1]))} or " if len(counts) > 1 else ""
    workers = f"{fewer}{config.most_devices} worker{'s' if config.most_devices > 1 else ''}"
    cores = os.cpu_count() or 1
    if device == "cpu" and config.most_devices > cores and target.is_local:
        return f"cpu, {workers} sharing {cores} cores"
    return f"{device}, {workers}"


def accelerator_of(
    config: FinetuneConfig, device: Device, target: ClusterTarget
) -> tuple[str | None, int | None]:
    """(what workers ask for, wherever this is planned, else this machine's GPU; its bytes). None where that is not known."""
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

"""Memory and peak FLOPS of known GPUs, from the vendors' data sheets."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from configs.schema import ACCELERATOR


@dataclass(frozen=True)
class Accelerator:
    """A GPU model."""

    name: str
    """Ray's name in `accelerator_type:NAME`. Variants with the same name count with the smallest memory."""
    device_name: str
    """Regular expression that matches the full CUDA device name."""
    memory: int
    """Approximate bytes available to a process, after the CUDA reserve and ECC."""
    peak_flops: float
    """Dense bf16 tensor-core FLOPS with fp32 accumulation; data sheets often list twice that, "with sparsity"."""


def _gib(amount: float) -> int:
    return int(amount * 2**30)


# Peaks come from NVIDIA's data sheets, "BFLOAT16 Tensor Core", halved if listed "with sparsity". They were compared with the
# tables of torchtitan (tools/utils.py) and Composer (callbacks/speed_monitor.py) for the devices listed there:
#   A10G: NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf, 70 | 140 with sparsity. Tables with 125 list the A10's value.
#   A10: a10-datasheet.pdf, 125.  L4: l4-datasheet, 242 with sparsity.  L40S: l40s-datasheet-28413, 362.05 | 733.
#   A100: nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf, 312 for all variants.
#   H100: nvidia-tensor-core-gpu-datasheet, with sparsity SXM 1,979, PCIe 1,513, NVL 1,671.
#   H200: nvidia.com/en-us/data-center/h200, with sparsity SXM 1,979, NVL 1,671.
#   B200: blackwell-datasheet-3384703, HGX 4,500 with sparsity.
# Memory is the value of nvidia-smi, rounded down. The first match is used.
ACCELERATORS = (
    Accelerator("A10G", r"NVIDIA A10G", _gib(22), 70e12),
    Accelerator("A10", r"NVIDIA A10", _gib(22), 125e12),
    Accelerator("L4", r"NVIDIA L4", _gib(22), 121e12),
    Accelerator("L40S", r"NVIDIA L40S", _gib(44), 362e12),
    Accelerator("A100", r"(NVIDIA )?A100-(SXM4?|PCIE)-40GB", _gib(39), 312e12),
    Accelerator("A100-40G", r"(NVIDIA )?A100-(SXM4?|PCIE)-40GB", _gib(39), 312e12),
    Accelerator("A100-80G", r"(NVIDIA )?A100(-SXM4?-80GB| 80GB PCIe)", _gib(79), 312e12),
    Accelerator("H100", r"NVIDIA H100 80GB HBM3", _gib(79), 989e12),
    Accelerator("H100", r"NVIDIA H100 PCIe", _gib(79), 756e12),
    Accelerator("H100", r"NVIDIA H100 NVL", _gib(93), 835e12),
    Accelerator("H200", r"NVIDIA H200", _gib(139), 989e12),
    Accelerator("H200", r"NVIDIA H200 NVL", _gib(139), 835e12),
    Accelerator("B200", r"NVIDIA B200", _gib(178), 2250e12),
)


def named_accelerator(resources: Iterable[str]) -> str | None:
    """Return the accelerator requested by Ray resources, or None."""
    return next((name.removeprefix(ACCELERATOR) for name in resources if name.startswith(ACCELERATOR)), None)


def memory_of(name: str) -> int | None:
    """Return an accelerator's memory in bytes by its Ray name, or None if it is unknown."""
    return min((known.memory for known in ACCELERATORS if known.name == name), default=None)


def nearest_name(name: str) -> str | None:
    """Return the known name closest to an unknown one, or None if none is similar."""
    known = {accelerator.name.upper(): accelerator.name for accelerator in ACCELERATORS}
    near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.8)
    return known[near[0]] if near else None


def lacks_bf16(name: str) -> bool:
    """Return whether a GPU has no bf16 units, by its Ray name or its CUDA device name: NVIDIA's GPUs have them since Ampere (2020)."""
    return (
        re.search(r"\b(T4|V100\w*|P100|P40|P4|M60|K80|GTX|RTX 20\d\d|Quadro RTX|TITAN)\b", name) is not None
    )


def peak_flops_of(device_name: str) -> float | None:
    """Return the peak dense bf16 FLOPS by CUDA device name, or None if unknown, for example for a MIG instance."""
    return next(
        (known.peak_flops for known in ACCELERATORS if re.fullmatch(known.device_name, device_name)), None
    )

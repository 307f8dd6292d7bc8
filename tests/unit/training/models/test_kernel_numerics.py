"""The Triton kernels that training relies on, under Triton's interpreter on CPU: results and gradients are those of torch in fp32.

Each package runs in a process of its own (tests/support/interpreted.py says how). Not here: Unsloth's 4-bit products, which call
bitsandbytes' CUDA functions; its fused head, which is no Triton kernel but torch.compile's; its norm of several rows a program, which it
turns off by itself where sums are not added in CUDA's order. Liger's losses are not used: the head is TRL's fused one with its kernels, too.
"""

from pathlib import Path

import pytest

from tests.support.kernel_processes import found_by

pytestmark = pytest.mark.slow

KERNELS = {
    "liger": ("rms_norm", "rms_norm_of_gemma", "rope", "swiglu", "geglu", "whole_model"),
    "trl": ("fused_head",),
    "unsloth": (
        "rms_norm",
        "rms_norm_of_gemma",
        "rope",
        "lora_qkv",
        "lora_output",
        "lora_mlp_swiglu",
        "lora_mlp_geglu",
        "lora_mlp_geglu_exact",
        "cross_entropy",
        "cross_entropy_of_gemma",
    ),
}


class Packages:
    """What each package's process found, run once."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._found: dict[str, dict[str, dict[str, float]]] = {}

    def __getitem__(self, package: str) -> dict[str, dict[str, float]]:
        if package not in self._found:
            self._found[package] = found_by(
                "tests.support.interpreted",
                package,
                UNSLOTH_ALLOW_CPU="1",
                UNSLOTH_DISABLE_STATISTICS="1",
                UNSLOTH_COMPILE_LOCATION=str(self._directory / "unsloth"),
            )
        return self._found[package]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    return Packages(tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize(
    ("package", "kernel"), [(package, kernel) for package, names in KERNELS.items() for kernel in names]
)
def test_a_kernel_computes_what_torch_does(package: str, kernel: str, packages: Packages):
    differences = packages[package][kernel]
    assert "result 0" in differences or "logits" in differences
    assert any(name.startswith("gradient of") for name in differences)
    assert max(differences.values()) < 1e-5, differences

"""Results and gradients of the Triton kernels that training uses, under Triton's interpreter on CPU, against fp32 torch.

Each package runs in its own process; see tests/support/interpreted.py. Not covered are:

- Unsloth's 4-bit products, which call bitsandbytes' CUDA functions.
- Unsloth's fused head, which comes from torch.compile instead of Triton.
- Unsloth's norm of several rows per program, which Unsloth disables where sums are not added in CUDA's order.
- Liger's losses, which training does not use: with Liger's kernels, too, the head is TRL's fused one.
"""

from pathlib import Path

import pytest

from tests.support.kernel_processes import run_with_triton

pytestmark = pytest.mark.slow

KERNELS = {
    "liger": ("rms_norm", "gemma_rms_norm", "rope", "swiglu", "geglu", "full_model"),
    "trl": ("fused_head",),
    "unsloth": (
        "rms_norm",
        "gemma_rms_norm",
        "rope",
        "lora_qkv",
        "lora_output",
        "lora_mlp_swiglu",
        "lora_mlp_geglu",
        "lora_mlp_geglu_exact",
        "cross_entropy",
        "gemma_cross_entropy",
    ),
}


class Packages:
    """The measured differences of each package, whose process runs once."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._differences: dict[str, dict[str, dict[str, float]]] = {}

    def __getitem__(self, package: str) -> dict[str, dict[str, float]]:
        if package not in self._differences:
            self._differences[package] = run_with_triton(
                "tests.support.interpreted",
                package,
                UNSLOTH_ALLOW_CPU="1",
                UNSLOTH_DISABLE_STATISTICS="1",
                UNSLOTH_COMPILE_LOCATION=str(self._directory / "unsloth"),
            )
        return self._differences[package]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    return Packages(tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize(
    ("package", "kernel"), [(package, kernel) for package, names in KERNELS.items() for kernel in names]
)
def test_kernel_results_and_gradients_match_torch(package: str, kernel: str, packages: Packages):
    differences = packages[package][kernel]
    assert "result 0" in differences or "logits" in differences
    assert any(name.startswith("gradient of") for name in differences)
    assert max(differences.values()) < 1e-5, differences

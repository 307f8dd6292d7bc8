"""LoRA with Unsloth's and Liger's code for GPUs under our trainer, on a GPU that tests/support/pretended_gpu.py pretends.

Nothing else runs Unsloth's own forward pass, its fused LoRA matrices and loss, and the trainer that it writes over TRL's, before a GPU
is at hand. Full-parameter training is not here: Unsloth leaves that to transformers' layers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from configs.loading import load_config
from tests.support.jobs import PROJECT
from tests.support.tiny_model import make_model
from training.plan import make_plan

TRITON = Path(sys.prefix) / "interpreter"
ANSWERS = {
    "2+2?": "4",
    "3 and 4 apples, how many?": "Seven apples.",
    "Hi": "Hello there, you.",
    "One more": "No",
    "5-1?": "It is 4.",
    "Who?": "Nobody at all, sir.",
    "a b c d": "e f",
    "7*6?": "42",
}
"""So short that interpreted kernels do not take minutes, and of lengths that a batch pads."""


class Runs:
    """What each provider's process found, run once."""

    def __init__(self, directory: Path):
        self.directory = directory
        rows = [json.dumps({"prompt": prompt, "completion": text}) for prompt, text in ANSWERS.items()]
        (directory / "train.jsonl").write_text("\n".join(rows))
        (directory / "valid.jsonl").write_text("\n".join(rows[1:4]))
        settings = {
            "model_id": str(make_model(directory / "model", layers=1)),
            "train_path": str(directory / "train.jsonl"),
            "valid_path": str(directory / "valid.jsonl"),
            "storage_path": str(directory / "runs"),
            "output_dir": str(directory / "scratch"),
            "device": "cpu",
            "lora_config": {"r": 8, "lora_alpha": 16},
            "gradient_checkpointing": "unsloth",
            "context_length": 32,
            "train_batch_size_per_device": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.01,
            "max_steps": 2,
        }
        (directory / "config.yaml").write_text(yaml.safe_dump(settings))
        plan, _, _ = make_plan(
            load_config(directory / "config.yaml"), progress=lambda what, fraction=None, figures="": None
        )
        (directory / "plan.json").write_text(plan.model_dump_json())
        self._found: dict[str, dict[str, Any]] = {}

    def __getitem__(self, provider: str) -> dict[str, Any]:
        if provider not in self._found:
            assert TRITON.exists(), f"{TRITON} is missing: `make setup-dev` makes it"
            variables = {
                "PYTHONPATH": str(TRITON),
                "TRITON_INTERPRET": "1",
                "TORCHDYNAMO_DISABLE": "1",
                "HF_DEACTIVATE_ASYNC_LOAD": "1",  # what is pretended holds in one thread
            }
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "tests.support.pretended_gpu", provider),
                    *(str(self.directory / "plan.json"), str(self.directory / provider)),
                ],
                cwd=PROJECT,
                env=os.environ | (variables if provider != "torch" else {}),
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            self._found[provider] = json.loads(done.stdout.splitlines()[-1])
        return self._found[provider]

    def saved(self, provider: str) -> dict[str, tuple[list[int], str]]:
        """Shape and dtype of each matrix in the adapter of the last step."""
        file = self.directory / provider / "checkpoint-2" / "adapter_model.safetensors"
        with safe_open(file, "pt") as adapter:
            slices = {name: adapter.get_slice(name) for name in adapter.keys()}  # noqa: SIM118
            return {name: (found.get_shape(), found.get_dtype()) for name, found in slices.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("pretended"))


@pytest.mark.parametrize(
    ("provider", "kernel"), [("unsloth", "apply_lora_qkv"), ("liger", "LigerRMSNorm.forward")]
)
def test_a_pretended_gpu_trains_as_the_cpu_does(provider: str, kernel: str, runs: Runs):
    found, reference = runs[provider], runs["torch"]
    assert (found["device"], found["autocast"], found["kernel"]) == ("cuda:0", "bf16", kernel)
    assert len(found["losses"]) == len(found["eval_losses"]) == 2
    for figures in ("losses", "eval_losses"):
        assert found[figures] == pytest.approx(reference[figures], rel=2e-4)
    assert found["gradient_norms"] == pytest.approx(reference["gradient_norms"], rel=2e-2)
    assert runs.saved(provider) == runs.saved("torch")


def test_an_evaluation_keeps_no_keys_and_values(runs: Runs):
    assert not any(runs[provider]["keeps_keys"] for provider in ("unsloth", "liger", "torch"))

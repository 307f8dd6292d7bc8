"""Unsloth's and Liger's GPU code in our trainer on a simulated GPU, compared with torch on CPU.

tests/support/pretended_gpu.py simulates the GPU. Without a real GPU, no other test runs Unsloth's own forward pass, its fused LoRA
matrices and loss, its 4-bit weights or the trainer that it generates from TRL's. One process per provider trains the runs in ON_GPU,
which takes minutes in Triton's interpreter: `make test-kernels` runs them (ALL_KERNELS=1).
"""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3Config

from configs.loading import load_config
from tests.support.grids import only_in_test_kernels
from tests.support.kernel_processes import run_with_triton, run_without_triton
from tests.support.messages import assert_names
from tests.support.tiny_model import make_model
from training.planning.endpoints import ClusterTarget
from training.planning.planner import make_plan

pytestmark = [
    pytest.mark.slow,
    only_in_test_kernels,
]

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
"""Short, so that interpreted kernels do not take minutes; of different lengths, so that batches are padded."""

MODELS: dict[str, dict[str, Any]] = {"llama": {}, "qwen3": {"kind": Qwen3Config, "head_dim": 16}}
LORA = {"lora_config": {"r": 8, "lora_alpha": 16}}
RUNS: dict[str, dict[str, Any]] = {
    "lora": LORA | {"model_id": "qwen3", "gradient_checkpointing": "unsloth"},
    "qlora": LORA | {"load_in_4bit": True},
    "full": {"learning_rate": 0.001, "optim": "adamw_torch_fused"},
    "continued": {
        "initial_adapter_model_ckpt_path": "adapter",
        "gradient_checkpointing": False,
        "task": "classification",
        "classifier_config": {"label_tokens": ["yes", "no"]},
    },
    "packed": LORA | {"packing": True, "context_length": 48, "train_batch_size_per_device": 1},
    "preferences": LORA | {"task": "preference_tuning"},
}
ON_GPU = {
    # Unsloth needs this order: its process creates no adapters after `full`, and no 4-bit weights after `rejected`.
    "unsloth": ("lora", "resumed", "qlora", "continued", "rejected", "full"),
    "liger": ("packed", "preferences"),
}
KERNELS = {
    ("any", "unsloth"): "apply_lora_qkv",
    # Unsloth leaves full-parameter training to transformers' layers and torch.compile.
    ("full", "unsloth"): "LlamaRMSNorm.forward",
    ("any", "liger"): "LigerRMSNorm.forward",
}


def rows_of(task: str) -> list[dict[str, str]]:
    if task == "classification":
        return [{"text": prompt, "label": "yes" if len(prompt) % 2 else "no"} for prompt in ANSWERS]
    if task == "preference_tuning":
        return [{"prompt": prompt, "chosen": text, "rejected": "No."} for prompt, text in ANSWERS.items()]
    return [{"prompt": prompt, "completion": text} for prompt, text in ANSWERS.items()]


class Runs:
    """The results of each provider, whose process runs once."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._results: dict[str, dict[str, Any]] = {}
        self._failed: set[str] = set()
        for name, settings in MODELS.items():
            make_model(directory / name, layers=1, **settings)
        llama = AutoModelForCausalLM.from_pretrained(directory / "llama")
        lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        adapted = peft.get_peft_model(llama, lora)  # without a task_type, as other tools may write it
        for name, parameter in adapted.named_parameters():
            parameter.data *= 0.1 if "lora_B" in name else 1
        adapted.save_pretrained(str(directory / "adapter"))
        self._make_model_without_pad(directory / "without_pad")
        make_model(directory / "mixture", layers=1, kind=MixtralConfig, num_local_experts=2)
        for run, settings in RUNS.items():
            self._plan(directory / run, settings)

    def _make_model_without_pad(self, directory: Path) -> None:
        """Write a model whose padding token is the token that ends answers."""
        make_model(directory, layers=1)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            file = directory / name
            file.write_text(file.read_text().replace("<|endoftext|>", "<|other|>"))
        settings = json.loads((directory / "tokenizer_config.json").read_text())
        (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<|im_end|>"}))
        for name in ("config.json", "generation_config.json"):
            settings = json.loads((directory / name).read_text())
            settings.pop("pad_token_id", None)
            (directory / name).write_text(json.dumps(settings))

    def _plan(self, directory: Path, settings: dict[str, Any]) -> None:
        directory.mkdir(exist_ok=True)
        rows = [json.dumps(row) for row in rows_of(settings.get("task", "instruction_tuning"))]
        (directory / "train.jsonl").write_text("\n".join(rows))
        (directory / "valid.jsonl").write_text("\n".join(rows[1:3]))
        settings = {
            "model_id": "llama",
            "train_path": str(directory / "train.jsonl"),
            "valid_path": str(directory / "valid.jsonl"),
            "storage_path": str(directory / "runs"),
            "output_dir": str(directory / "scratch"),
            "device": "cpu",
            "context_length": 32,
            "train_batch_size_per_device": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.01,
            "max_steps": 2,
            "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 1},
        } | settings
        for key in settings.keys() & {"model_id", "initial_adapter_model_ckpt_path"}:
            settings[key] = str(self._directory / settings[key])
        (directory / "config.yaml").write_text(yaml.safe_dump(settings))
        plan, _, _ = make_plan(load_config(directory / "config.yaml"), target=ClusterTarget(None))
        (directory / "plan.json").write_text(plan.model_dump_json())

    def __getitem__(self, provider: str) -> dict[str, Any]:
        assert provider not in self._failed, "its process failed; see the first test that requested it"
        if provider not in self._results:
            self._failed.add(provider)
            names = RUNS if provider == "torch" else ON_GPU[provider]
            arguments = "tests.support.pretended_gpu", provider, str(self._directory), *names
            self._results[provider] = (
                run_without_triton(*arguments)
                if provider == "torch"
                else run_with_triton(
                    *arguments,
                    TORCHDYNAMO_DISABLE="1",
                    HF_DEACTIVATE_ASYNC_LOAD="1",  # the simulation covers only one thread
                )
            )
            self._failed.remove(provider)
        return self._results[provider]

    def checkpoint_of(self, run: str, provider: str) -> Path:
        """Return the checkpoint of the last step; the directory `resumed` beside it has that of the resumed run."""
        assert self[provider], "the process writes the checkpoint"
        return self._directory / run / provider / "checkpoint-2"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("pretended"))


def weights_file(checkpoint: Path) -> Path:
    (file,) = checkpoint.glob("*.safetensors")
    return file


def shapes_in(checkpoint: Path) -> dict[str, tuple[list[int], str]]:
    """Return shape and dtype of each matrix."""
    with safe_open(weights_file(checkpoint), "pt") as weights:
        slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
        return {name: (matrix.get_shape(), matrix.get_dtype()) for name, matrix in slices.items()}


@pytest.mark.parametrize(
    ("run", "provider"), [(run, provider) for provider in ON_GPU for run in ON_GPU[provider] if run in RUNS]
)
def test_metrics_and_weight_shapes_on_a_simulated_gpu_match_those_on_cpu(run: str, provider: str, runs: Runs):
    result, reference = runs[provider][run], runs["torch"][run]
    assert (result["device"], result["autocast"]) == ("cuda:0", "bf16")
    assert result["kernel"] == KERNELS.get((run, provider), KERNELS["any", provider])
    assert len(result["losses"]) == 2
    assert result["losses"] == pytest.approx(reference["losses"], rel=2e-4)
    assert len(result["evaluations"]) == len(reference["evaluations"]) == 3
    for evaluated, expected in zip(result["evaluations"], reference["evaluations"], strict=True):
        assert evaluated == pytest.approx(expected, rel=2e-4, abs=1e-3)
    assert result["gradient_norms"] == pytest.approx(reference["gradient_norms"], rel=1e-2)
    assert shapes_in(runs.checkpoint_of(run, provider)) == shapes_in(runs.checkpoint_of(run, "torch"))


def test_resumed_run_is_bitwise_identical(runs: Runs):
    result, checkpoint = runs["unsloth"], runs.checkpoint_of("lora", "unsloth")
    assert result["resumed"] == result["lora"]
    again = checkpoint.parent / "resumed" / checkpoint.name
    for file in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert (again / file).read_bytes() == (checkpoint / file).read_bytes(), file


def test_trained_embeddings_are_not_offloaded_from_a_nearly_full_gpu(runs: Runs):
    """By default, Unsloth offloads the embeddings to the host, even trained ones."""
    assert [runs["unsloth"][run]["offloads"] for run in ("lora", "full")] == [True, False]


@pytest.mark.parametrize(
    ("model", "facts"),
    [
        ("llama", ("load_in_4bit", "bitsandbytes")),
        ("without_pad", ("pad", "kernels: liger")),
        ("mixture", ("deterministic", "Unsloth")),
    ],
)
def test_model_that_unsloth_cannot_load_raises_an_error_with_the_reason(
    model: str, facts: tuple[str, ...], runs: Runs
):
    assert_names(runs["unsloth"]["rejected"][model], *facts)


def test_packed_rows_use_torchs_varlen_attention(runs: Runs):
    assert runs["liger"]["packed"]["attention"] == "torch_varlen"


def test_evaluation_uses_no_kv_cache(runs: Runs):
    results = [runs[provider][run] for provider in ON_GPU for run in ON_GPU[provider] if run in RUNS]
    assert not any(run["has_kv_cache"] for run in [*results, *runs["torch"].values()])


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_saved_config_does_not_depend_on_the_kernels(name: str, runs: Runs):
    unsloth, torch = (
        json.loads((runs.checkpoint_of("full", provider) / name).read_text())
        for provider in ("unsloth", "torch")
    )
    unsloth.pop("unsloth_version", None)
    assert unsloth == torch

"""Each kind of adapter in each use: it computes what was trained, or the plan rejects it. docs/adapters.md has the table.

`make test-all` runs one kind in each use, `make test-kernels` all of them (ALL_KERNELS=1).
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from configs.schema import LoraConfig
from tests.support.adapter_training import (
    Run,
    can_be_new,
    continued_request,
    request_of,
    slug,
    train_under_zero_3,
)
from tests.support.adapter_uses import rejection
from tests.support.adapters import FILE, KINDS, logits_of, make_models, meta_model
from tests.support.model_requests import model_request
from training.inference.merging import merge_adapter
from training.models.adapter import continued_adapter
from training.models.files import read_adapter_facts
from training.models.torch_provider import attach_adapter, load_weights

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def kinds(sample: str) -> list[str]:
    """Return the kinds of adapter to test: the sample, or all of them."""
    return list(KINDS) if os.environ.get("ALL_KERNELS") else [sample]


ZERO_3_KINDS = kinds("fused experts (all-linear)")
CONTINUED_KINDS = kinds("modules_to_save")


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"), tiny_model)


def started(kind: str, models: dict[str, Path], directory: Path, **changes: Any) -> Any:
    """Return the request of a new adapter, or of a continued one if no run can create this kind."""
    model = models[KINDS[kind][0]]
    if can_be_new(kind):
        return request_of(kind, model, **changes)
    return continued_request(kind, model, directory / "adapter", **changes)


def skip_if_rejected(kind: str, use: str, models: dict[str, Path]) -> None:
    """Skip the cell of a kind that the plan rejects for a use."""
    if reason := rejection(kind, use, models):
        pytest.skip(f"rejected: {reason.splitlines()[0]}")


def check_trained(run: Run) -> None:
    """Check that each trainable weight has changed, and no other."""
    assert run.trainable
    for name, weight in run.weights.items():
        assert torch.equal(weight, run.before[name]) != (name in run.trainable), name
        assert torch.isfinite(weight.float()).all(), name


@pytest.mark.parametrize("kind", kinds("tied, new tokens"))
def test_resumed_adapter_equals_the_uninterrupted_one(kind: str, models: dict[str, Path], tmp_path: Path):
    run = Run(started(kind, models, tmp_path), tmp_path / "run")
    check_trained(run)
    model = models[KINDS[kind][0]]
    loaded = attach_adapter(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), run.last)
    torch.testing.assert_close(logits_of(loaded), logits_of(run.model), rtol=0, atol=1e-5)

    resumed = Run(started(kind, models, tmp_path), tmp_path / "resumed", resume_from=run.checkpoint)
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in run.weights.items())
    assert len(resumed.moments) == len(run.moments)
    assert all(map(torch.equal, resumed.moments, run.moments))


@pytest.mark.parametrize("kind", kinds("bias: lora_only"))
def test_continued_adapter_resumes_and_exports_what_was_trained(
    kind: str, models: dict[str, Path], tmp_path: Path
):
    skip_if_rejected(kind, "continue", models)
    model = models[KINDS[kind][0]]
    run = Run(continued_request(kind, model, tmp_path / "adapter"), tmp_path / "run")
    check_trained(run)
    biases = [name for name in run.trainable if name.endswith(".bias") and ".lora_" not in name]
    assert bool(biases) == kind.startswith("bias:")
    assert all(run.before[name].abs().max() > 0.1 for name in biases)

    again = continued_request(kind, model, tmp_path / "again")
    resumed = Run(again, tmp_path / "resumed", resume_from=run.checkpoint)
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in run.weights.items())
    assert all(map(torch.equal, resumed.moments, run.moments))

    expected = logits_of(run.model)
    merge_adapter(load_weights(model, dtype="fp32"), model, run.last).save_pretrained(tmp_path / "merged")
    found = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("saved", [["lm_head", "wte"], ["lm_head"]], ids=str)
def test_checkpoint_of_tied_modules_of_gpt2_is_continued_tied(
    saved: list[str], models: dict[str, Path], tmp_path: Path
):
    """PEFT 0.21.2 saves modules_to_save without lm_head, and ties the embedding wte only with it."""
    lora = LoraConfig(
        target_modules=["c_attn"], modules_to_save=saved, ensure_weight_tying=True, fan_in_fan_out=True
    )
    run = Run(model_request(models["gpt2"], lora=lora), tmp_path / "run")
    facts = read_adapter_facts(str(run.checkpoint))
    parameters, wrong = continued_adapter(meta_model(models["gpt2"]), facts)
    assert wrong is None
    assert parameters.trainable.keys() == set(run.trainable)
    continued = Run(model_request(models["gpt2"], adapter_directory=run.checkpoint), tmp_path / "continued")
    assert continued.trainable == run.trainable
    loaded = attach_adapter(
        AutoModelForCausalLM.from_pretrained(models["gpt2"], dtype=torch.float32), continued.last
    )
    torch.testing.assert_close(logits_of(loaded), logits_of(continued.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", kinds("an adapter on the embedding"))
def test_reference_of_a_new_adapter_is_the_base_model(kind: str, models: dict[str, Path], tmp_path: Path):
    skip_if_rejected(kind, "preference tuning", models)
    run = Run(started(kind, models, tmp_path), tmp_path / "run", task="preference_tuning")
    check_trained(run)
    assert run.first_rewards == pytest.approx([0, 0], abs=1e-5)


@pytest.mark.parametrize("kind", kinds("tied embeddings"))
def test_reference_of_a_continued_adapter_is_its_initial_state(
    kind: str, models: dict[str, Path], tmp_path: Path
):
    skip_if_rejected(kind, "the same, continued", models)
    request = continued_request(kind, models[KINDS[kind][0]], tmp_path / "adapter")
    run = Run(request, tmp_path / "run", task="preference_tuning")
    check_trained(run)
    assert run.first_rewards == pytest.approx([0, 0], abs=1e-5)


@pytest.mark.parametrize("kind", kinds("bias: all"))
def test_adapter_on_a_4_bit_base_computes_what_was_trained(
    kind: str, models: dict[str, Path], tmp_path: Path
):
    skip_if_rejected(kind, "4 bits", models)
    run = Run(started(kind, models, tmp_path, load_in_4bit=True), tmp_path / "run")
    check_trained(run)
    base = load_weights(models[KINDS[kind][0]], dtype="fp32", load_in_4bit=True)
    torch.testing.assert_close(
        logits_of(attach_adapter(base, run.last)), logits_of(run.model), rtol=0, atol=1e-5
    )


@pytest.fixture(scope="module")
def continued_under_zero_3(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    directory = tmp_path_factory.mktemp("zero_3_continued")
    supported = [kind for kind in CONTINUED_KINDS if rejection(kind, "ZeRO-3, continued", models) is None]
    return directory, train_under_zero_3(directory, models, supported, continued=True)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", CONTINUED_KINDS)
def test_continued_adapter_under_zero_3_equals_that_of_one_worker(
    kind: str,
    models: dict[str, Path],
    tmp_path: Path,
    continued_under_zero_3: tuple[Path, dict[str, str]],
):
    skip_if_rejected(kind, "ZeRO-3, continued", models)
    directory, errors = continued_under_zero_3
    assert kind not in errors, errors[kind]
    request = continued_request(kind, models[KINDS[kind][0]], tmp_path / "adapter")
    check_equal(Run(request, tmp_path / "run", optim="sgd"), directory / slug(kind) / "last" / FILE)


@pytest.fixture(scope="module")
def under_zero_3(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    directory = tmp_path_factory.mktemp("zero_3")
    supported = [kind for kind in ZERO_3_KINDS if rejection(kind, "ZeRO-3", models) is None]
    return directory, train_under_zero_3(directory, models, supported)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ZERO_3_KINDS)
def test_adapter_under_zero_3_equals_that_of_one_worker(
    kind: str, models: dict[str, Path], tmp_path: Path, under_zero_3: tuple[Path, dict[str, str]]
):
    skip_if_rejected(kind, "ZeRO-3", models)
    directory, errors = under_zero_3
    assert kind not in errors, errors[kind]
    run = Run(started(kind, models, tmp_path), tmp_path / "run", optim="sgd")
    check_equal(run, directory / slug(kind) / "last" / FILE)


def check_equal(run: Run, file: Path) -> None:
    """Check that the trained weights of one worker equal those in the file of a run under ZeRO-3."""
    expected, found = load_file(run.last / FILE), load_file(file)
    # PEFT adds the weight of an embedding that has an adapter, which is that of the base model; not under ZeRO-3.
    trained = {name: tensor for name, tensor in expected.items() if ".base_layer.weight" not in name}
    assert found.keys() == trained.keys()
    for name, tensor in trained.items():
        torch.testing.assert_close(found[name].float(), tensor, rtol=1e-3, atol=1e-6)

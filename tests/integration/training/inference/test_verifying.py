"""Exports are compared with the model as trained: the differences are recorded, and a wrong export is not published."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from configs.schema import ExportConfig
from runs.layout import EXPORT_FILE, Export, Verification
from tests.support.adapters import FILE, change_config, change_tensors
from tests.support.tiny_model import make_model
from tests.support.trained_runs import store_adapter_run, store_full_run
from training.inference import export as exporting
from training.inference import merging, verifying
from training.inference.checkpoint_model import trained_model
from training.models.files import ModelError
from utils.storage.bucket import open_store

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> str:
    """Store a run whose adapter has large weights; return its URI."""
    storage = open_store(str(tmp_path / "runs"))
    return store_adapter_run(storage, "run", tiny_model, LORA, output_dir=str(tmp_path / "scratch"))


def export(run: str, **settings: Any) -> Export:
    with trained_model(run) as trained:
        return exporting.export(trained, ExportConfig(**settings), progress=lambda _: None)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_correct_export_differs_by_rounding_only(run: str, dtype: str):
    exported = export(run, dtype=dtype)
    verified = exported.verification
    assert verified is not None
    assert verified.mean_difference <= max(2 * verified.mean_rounding, 2e-5)
    assert verified.loss == pytest.approx(verified.loss_as_trained, abs=0.05)
    assert (
        json.loads((Path(exported.uri) / EXPORT_FILE).read_text())["verification"]["tokens"]
        == verified.tokens
    )
    assert "verified in fp32" in (Path(exported.uri) / "README.md").read_text()


@pytest.mark.parametrize(
    ("rise", "note"),
    [
        (0.009, []),
        (
            0.24,
            [
                "Rounding the weights to bf16 raises the loss by 0.24: export with --dtype fp32, or the adapter by itself with --no-merge."
            ],
        ),
    ],
)
def test_rise_of_the_loss_by_rounding_is_noted(
    run: str, rise: float, note: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It is no fault of the export, which passes."""
    compare = verifying.verify_export

    def with_rise(*arguments: Any, **keywords: Any) -> Verification:
        found = compare(*arguments, **keywords)
        assert found.loss_as_trained is not None
        return found.model_copy(update={"loss": found.loss_as_trained + rise})

    monkeypatch.setattr(verifying, "verify_export", with_rise)
    exported = export(run, dtype="bf16", to=str(tmp_path / "bf16"))
    assert [line for line in exported.notes if line.startswith("Rounding")] == note
    again = export(run, dtype="bf16", to=str(tmp_path / "bf16"), verify=True)
    assert [line for line in again.notes if line.startswith("Rounding")] == note
    assert export(run, dtype="fp32", to=str(tmp_path / "fp32")).notes == []


def test_tokens_beyond_the_embedding_are_not_asked_for(tiny_model: Path, tmp_path: Path):
    """Some tokenizers have more tokens than the embedding has rows; without rows of the run, tokens are made up."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<{number}>" for number in range(2000)])
    tokenizer.save_pretrained(model)
    storage = open_store(str(tmp_path / "runs"))
    run = store_adapter_run(storage, "run", model, LORA, output_dir=str(tmp_path / "scratch"))
    verified = export(run, dtype="fp32").verification
    assert verified is not None
    assert "random tokens" in verified.source


def test_exported_adapter_and_full_model_are_verified(run: str, tiny_model: Path, tmp_path: Path):
    adapter = export(run, merge=False).verification
    assert adapter is not None
    assert adapter.largest_difference < 1e-5
    storage = open_store(str(tmp_path / "runs"))
    full = store_full_run(storage, "full", tiny_model, output_dir=str(tmp_path / "scratch"))
    assert export(full).verification is not None


def skip_scale(patch: pytest.MonkeyPatch) -> None:
    delta = Linear.get_delta_weight
    patch.setattr(Linear, "get_delta_weight", lambda self, name: delta(self, name) / self.scaling[name])


def double_delta(patch: pytest.MonkeyPatch) -> None:
    delta = Linear.get_delta_weight
    patch.setattr(Linear, "get_delta_weight", lambda self, name: 2 * delta(self, name))


def drop_adapter_of_one_module(patch: pytest.MonkeyPatch) -> None:
    delta = Linear.get_delta_weight

    def without_down_projection(self: Any, name: str) -> Any:
        is_in_layer_1 = self.in_features == 128 and self is not without_down_projection.first  # type: ignore[attr-defined]
        without_down_projection.first = self  # type: ignore[attr-defined]
        return delta(self, name) * (0 if is_in_layer_1 else 1)

    without_down_projection.first = None  # type: ignore[attr-defined]
    patch.setattr(Linear, "get_delta_weight", without_down_projection)


@pytest.mark.parametrize("sabotage", [skip_scale, double_delta, drop_adapter_of_one_module])
def test_wrong_merge_is_not_published(run: str, monkeypatch: pytest.MonkeyPatch, sabotage: Any):
    sabotage(monkeypatch)
    with pytest.raises(
        ModelError, match=r"does not compute what was trained.* layer [01]\..*Nothing was exported\."
    ):
        export(run, dtype="bf16")
    assert not (Path(run) / "exports").exists()


WITHOUT_SCALE: dict[str, Any] = {"lora_alpha": 4, "use_rslora": False}
DOUBLED: dict[str, Any] = {"lora_alpha": 16}
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "layers.1.mlp.up_proj.lora_magnitude_vector"),
    "rsLoRA": ({"use_rslora": True}, "layers.1.mlp.up_proj.lora_B.weight"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),
    "token indices": ({"trainable_token_indices": list(range(256))}, "trainable_tokens_delta"),
    "target_parameters": (
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
        "layers.1.mlp.experts.lora_B.weight",
    ),
}
"""Kind -> (its settings, the end of the name of a tensor that only this kind has, or whose scale it changes)."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "sabotage", [WITHOUT_SCALE, DOUBLED, "dropped"], ids=["no scale", "doubled", "dropped"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_wrong_merge_of_each_kind_is_not_published(
    kind: str, sabotage: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings, tensor = KINDS[kind]
    has_experts = kind == "target_parameters"
    base = (
        make_model(tmp_path / "model", kind=MixtralConfig, num_local_experts=4) if has_experts else tiny_model
    )
    storage = open_store(str(tmp_path / "runs"))
    scratch = str(tmp_path / "scratch")
    run = store_adapter_run(storage, "run", base, {**LORA, **settings}, output_dir=scratch)
    merge = merging.merge_adapter

    def merge_wrongly(model: Any, base: Path, adapter: Path) -> Any:
        wrong = Path(shutil.copytree(adapter, tmp_path / "wrong"))
        if sabotage == "dropped":
            names = [name for name in load_file(wrong / FILE) if name.endswith(tensor)]
            assert len(names) == 1, names
            change_tensors(wrong, lambda tensors: tensors | {names[0]: torch.zeros_like(tensors[names[0]])})
        else:
            change_config(wrong, **sabotage)
        return merge(model, base, wrong)

    monkeypatch.setattr(merging, "merge_adapter", merge_wrongly)
    with pytest.raises(ModelError, match=r"does not compute what was trained"):
        export(run, dtype="fp32")
    monkeypatch.setattr(merging, "merge_adapter", merge)
    assert export(run, dtype="fp32").verification is not None


def test_rounding_includes_what_a_merge_loses_of_a_small_adapter(tiny_model: Path):
    """PEFT 0.21.2, W in bf16: where the adapter adds less than half a unit in the last place of W, round(W + BA) is W."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).float()
    lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, lora_alpha=0.01)
    adapted = get_peft_model(base, lora)
    modules = [module for module in adapted.modules() if isinstance(module, Linear)]
    deltas = [module.get_delta_weight("default") for module in modules]
    originals = [module.weight.detach().clone() for module in modules]
    lost = [
        ((original + delta).bfloat16().float() - original - delta).norm() / delta.norm()
        for original, delta in zip(originals, deltas, strict=True)
    ]
    assert max(lost) > 0.1
    verifying._round_weights(adapted, torch.bfloat16)
    for module, original, delta in zip(modules, originals, deltas, strict=True):
        expected = (original + delta).bfloat16().float() - delta
        torch.testing.assert_close(module.weight, expected, atol=1e-7, rtol=1e-6)


def test_adapter_whose_file_has_another_scaling_than_in_training_is_not_published(
    tiny_model: Path, tmp_path: Path
):
    """PEFT 0.21.2 trains with the first pattern that matches, and saves the patterns sorted."""
    lora = {
        "r": 4,
        "target_modules": ["q_proj"],
        "alpha_pattern": {"q_proj": 64, "layers.0.self_attn.q_proj": 2},
    }
    storage = open_store(str(tmp_path / "runs"))
    run = store_adapter_run(storage, "run", tiny_model, lora, output_dir=str(tmp_path / "scratch"))
    with pytest.raises(ModelError, match=r"does not compute what was trained.* layer 0\."):
        export(run, dtype="fp32")
    with pytest.raises(ModelError, match=r"does not compute what was trained.* layer 0\."):
        export(run, merge=False)


def test_dropped_tensor_of_an_exported_adapter_is_found(run: str, monkeypatch: pytest.MonkeyPatch):
    copy = exporting._copy_adapter

    def copy_without_a_tensor(trained: Any, directory: Path) -> None:
        copy(trained, directory)
        file = directory / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors.pop("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight")
        save_file(tensors, file)

    monkeypatch.setattr(exporting, "_copy_adapter", copy_without_a_tensor)
    with (
        pytest.warns(UserWarning, match="missing adapter keys"),
        pytest.raises(ModelError, match=r"layer 1\."),
    ):
        export(run, merge=False)


def test_verification_is_skipped_with_a_note_if_memory_is_short(run: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verifying, "fits_in_memory", lambda parameters: False)
    exported = export(run, dtype="fp16")
    assert exported.verification is None
    assert any("not verified" in note for note in exported.notes)
    with pytest.raises(ModelError, match=r"verify: .* memory"):
        export(run, dtype="fp32", verify=True)
    assert export(run, dtype="bf16", verify=False).notes == []

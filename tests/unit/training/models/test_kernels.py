"""Choice of the kernel provider, and the documented compatibility table."""

from itertools import groupby
from pathlib import Path
from typing import Any, get_args

import pytest

from configs.schema import FinetuneConfig
from configs.sequence_parallel import EXCLUSIONS, Excluded
from tests.support.messages import assert_names
from training.models import kernels
from training.models.files import ModelError
from training.models.kernels import (
    COMPATIBILITY,
    ON_GPU,
    SPREADS,
    TESTED,
    UNTESTED,
    Device,
    Method,
    Provider,
    choose_kernels,
)

PAGE = Path(__file__).resolve().parents[4] / "docs" / "kernels.md"


def config(**keys: Any) -> FinetuneConfig:
    return FinetuneConfig(model_id="some/model", train_path="train.jsonl", **keys)


def test_adapter_settings_that_unsloth_ignores_select_liger_or_raise_an_error(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(kernels, "is_installed", lambda package: True)
    requested = config(lora_config={"r": 4, "use_dora": True, "rank_pattern": {"q_proj": 8}})
    choice = choose_kernels(requested, "cuda", 0)
    assert choice.provider == "liger"
    assert_names(choice.reason, "auto: ", "Unsloth", "lora_config.rank_pattern", "lora_config.use_dora")
    with pytest.raises(ModelError, match=r"kernels: unsloth: .*lora_config\.use_dora"):
        choose_kernels(config(lora_config={"use_dora": True}, kernels="unsloth"), "cpu", 0)
    supported = config(lora_config={"r": 4, "lora_alpha": 8, "use_rslora": True, "use_dora": False})
    assert choose_kernels(supported, "cuda", 0).provider == "unsloth"


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"trainable_token_indices": [1, 5]},
        {"modules_to_save": ["gate_proj"]},
    ],
    ids=str,
)
def test_continued_adapter_that_unsloth_does_not_train_selects_liger(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kernels, "is_installed", lambda package: True)
    continued = config(initial_adapter_model_ckpt_path="run:a")
    choice = choose_kernels(continued, "cuda", 0, continued=settings)
    assert choice.provider == "liger"
    assert_names(choice.reason, "auto: ", "Unsloth", f"the continued adapter's {next(iter(settings))}")
    forced = config(initial_adapter_model_ckpt_path="run:a", kernels="unsloth")
    with pytest.raises(ModelError, match=r"kernels: unsloth: .*the continued adapter's"):
        choose_kernels(forced, "cpu", 0, continued=settings)


def test_continued_adapter_has_its_own_settings_in_the_choice_of_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "is_installed", lambda package: True)
    continued = config(lora_config={"use_dora": True}, initial_adapter_model_ckpt_path="run:a")
    settings = {
        "r": 4,
        "init_lora_weights": "gaussian",
        "use_dora": False,
        "rank_pattern": {"q_proj": 8},
        "modules_to_save": ["lm_head"],
        "layers_pattern": [],
    }
    assert choose_kernels(continued, "cuda", 0, continued=settings).provider == "unsloth"


@pytest.mark.parametrize("module", ["gate_proj", "model.layers.0.mlp"])
def test_modules_to_save_that_unsloth_cannot_train_select_liger(module: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "is_installed", lambda package: True)
    requested = config(lora_config={"modules_to_save": ["lm_head", module]})
    choice = choose_kernels(requested, "cuda", 0)
    assert choice.provider == "liger"
    assert_names(choice.reason, "Unsloth", f" {module} ", "lora_config.modules_to_save")
    supported = config(lora_config={"modules_to_save": ["lm_head", "model.embed_tokens", "model.norm"]})
    assert choose_kernels(supported, "cuda", 0).provider == "unsloth"


@pytest.mark.parametrize(
    ("device", "stage", "installed", "provider", "reason"),
    [
        ("cpu", 0, {"unsloth", "triton"}, "torch", "CPU"),
        ("cuda", 0, {"unsloth", "triton"}, "unsloth", "GPU"),
        ("cuda", 2, {"unsloth", "triton"}, "unsloth", "GPU"),
        ("cuda", 3, {"unsloth", "triton"}, "liger", "ZeRO-3"),
        ("cuda", 0, {"triton"}, "liger", "make setup-unsloth"),
        # Triton comes with torch for CUDA; a machine without Triton may plan a run for GPUs.
        ("cuda", 0, set(), "liger", "make setup-unsloth"),
    ],
)
def test_auto_selects_the_fastest_kernels_that_work_and_gives_the_reason(
    monkeypatch: pytest.MonkeyPatch,
    device: Device,
    stage: int,
    installed: set[str],
    provider: str,
    reason: str,
):
    monkeypatch.setattr(kernels, "is_installed", lambda package: package in installed)
    choice = choose_kernels(config(), device, stage)
    assert choice.provider == provider
    assert choice.reason.startswith("auto: ")
    assert reason in choice.reason


def test_unsloth_of_a_submitted_run_is_not_required_on_this_machine(monkeypatch: pytest.MonkeyPatch):
    """The job checks its own environment."""
    monkeypatch.setattr(kernels, "is_installed", lambda package: False)
    requested = config(kernels="unsloth")
    with pytest.raises(ModelError, match=r"^kernels: unsloth: .*setup-unsloth"):
        choose_kernels(requested, "cuda", 0)
    assert choose_kernels(requested, "cuda", 0, elsewhere=True).provider == "unsloth"


def test_auto_does_not_select_unsloth_for_workers_that_share_sequences(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "is_installed", lambda package: True)
    shared = {"num_devices": 2, "sequence_parallel_size": 2}
    choice = choose_kernels(config(**shared), "cuda", 2)
    assert choice.provider == "liger"
    assert_names(choice.reason, "Unsloth", "sequence_parallel_size")
    with pytest.raises(
        ModelError, match=r"kernels: unsloth: .*sequence_parallel_size.*auto or liger or torch"
    ):
        choose_kernels(config(**shared, kernels="unsloth"), "cuda", 0)


def test_unsloth_is_not_selected_for_sequences_whose_rope_it_would_change(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "is_installed", lambda package: True)
    longer = {"context_length": 4096, "lora_config": {}}
    choice = choose_kernels(config(**longer), "cuda", 0, exceeded_rope=2048)
    assert choice.provider == "liger"
    assert_names(choice.reason, "Unsloth", "RoPE", "2,048", "context_length")
    with pytest.raises(ModelError, match=r"kernels: unsloth: .*RoPE.*kernels: auto or liger or torch"):
        choose_kernels(config(**longer, kernels="unsloth"), "cuda", 0, exceeded_rope=2048)
    # Its CPU mode and full-parameter training use RoPE of transformers.
    assert (
        choose_kernels(config(**longer, kernels="unsloth"), "cpu", 0, exceeded_rope=2048).provider
        == "unsloth"
    )
    assert choose_kernels(config(context_length=4096), "cuda", 0, exceeded_rope=2048).provider == "unsloth"


def test_auto_does_not_select_unsloth_for_packed_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "is_installed", lambda package: True)
    choice = choose_kernels(config(packing=True), "cuda", 0)
    assert choice.provider == "liger"
    assert_names(choice.reason, "Unsloth", "packed")


def test_auto_does_not_select_unsloth_for_preference_tuning(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "is_installed", lambda package: True)
    choice = choose_kernels(config(task="preference_tuning"), "cuda", 0)
    assert choice.provider == "liger"
    assert_names(choice.reason, "Unsloth", "preference tuning")


@pytest.mark.parametrize("package", ["flash_attn", "xformers"])
def test_auto_does_not_select_nondeterministic_attention_for_deterministic_runs(
    package: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kernels, "is_installed", lambda name: name in (package, "unsloth", "triton"))
    choice = choose_kernels(config(deterministic=True), "cuda", 0)
    assert choice.provider == "liger"
    assert_names(choice.reason, "Unsloth", package, "deterministic")
    assert choose_kernels(config(), "cuda", 0).provider == "unsloth"
    monkeypatch.setattr(kernels, "is_installed", lambda name: name in ("unsloth", "triton"))
    assert choose_kernels(config(deterministic=True), "cuda", 0).provider == "unsloth"


def test_auto_does_not_select_unsloth_for_fp32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "is_installed", lambda package: True)
    choice = choose_kernels(config(dtype="fp32"), "cuda", 0)
    assert choice.provider == "liger"
    assert_names(choice.reason, "Unsloth", "dtype")
    assert choose_kernels(config(dtype="fp32", kernels="unsloth"), "cpu", 0).provider == "unsloth"


@pytest.mark.parametrize(
    ("requested", "device", "stage", "advice"),
    [
        ("unsloth", "cuda", 3, "kernels: auto or liger or torch"),
        ("liger", "cpu", 0, "kernels: auto or unsloth or torch"),
    ],
)
def test_kernels_that_cannot_train_the_run_raise_an_error_with_alternatives(
    requested: str, device: Device, stage: int, advice: str
):
    with pytest.raises(ModelError, match=f"kernels: {requested}: .*{advice}"):
        choose_kernels(config(kernels=requested), device, stage)


def test_missing_unsloth_raises_an_error_with_the_install_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "is_installed", lambda package: False)
    with pytest.raises(ModelError, match="make setup-unsloth"):
        choose_kernels(config(kernels="unsloth"), "cuda", 0)


@pytest.mark.parametrize(("requested", "device"), [("torch", "cpu"), ("torch", "cuda"), ("liger", "cuda")])
def test_explicit_kernels_are_used(requested: str, device: Device):
    assert choose_kernels(config(kernels=requested), device, 0).provider == requested


def test_docs_contain_the_compatibility_table():
    """Methods with equal cells share a row, and a dash marks an error."""
    lines = [f"| kernels | device | method | {' | '.join(SPREADS)} |", "|---" * (3 + len(SPREADS)) + "|"]
    for (provider, device), methods in COMPATIBILITY.items():
        for cells, alike in groupby(methods, key=lambda method: methods[method]):
            shown = " | ".join(cell if cell in (TESTED, ON_GPU, UNTESTED) else "–" for cell in cells)  # noqa: RUF001
            lines.append(f"| {provider} | {device} | {', '.join(alike)} | {shown} |")
    table = "\n".join(lines)
    assert f"\n\n{table}\n\n" in PAGE.read_text("utf-8")


def test_docs_contain_the_table_of_what_does_not_work_with_sequence_parallel_size():
    rows = [f"| {excluded} | {why.reason} | {why.fix} |" for excluded, why in EXCLUSIONS.items()]
    table = "\n".join(
        ["| not with `sequence_parallel_size: N` | because | instead |", "|---|---|---|", *rows]
    )
    assert f"\n\n{table}\n\n" in PAGE.read_text("utf-8")
    assert len(EXCLUSIONS) == len(get_args(Excluded))


def rejection_reason(provider: Provider, device: Device, method: Method, strategy: str) -> str | None:
    """Return a word of the expected error, or None if the kernels can train the run. Does not use the product's table."""
    if provider == "liger" and device == "cpu":
        return "GPU"  # Liger has only Triton kernels
    if strategy != "ZeRO-3":
        return None
    if provider == "unsloth":
        return "ZeRO-3"  # Unsloth holds complete weights on every device
    return "4-bit" if method == "QLoRA" else None  # DeepSpeed cannot partition packed 4-bit weights


@pytest.mark.parametrize("provider", ["unsloth", "liger", "torch"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("method", ["LoRA", "QLoRA", "full"])
@pytest.mark.parametrize("strategy", ["one worker", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"])
def test_explicit_kernels_are_used_or_raise_an_error(
    monkeypatch: pytest.MonkeyPatch, provider: Provider, device: Device, method: Method, strategy: str
):
    monkeypatch.setattr(kernels, "is_installed", lambda package: True)
    keys: dict[str, Any] = {} if method == "full" else {"lora_config": {"r": 4}}
    keys |= {"load_in_4bit": True} if method == "QLoRA" else {}
    keys["num_devices"] = 1 if strategy == "one worker" else 2
    stage = int(strategy[-1]) if strategy.startswith("ZeRO") else 0
    requested = config(**keys, kernels=provider)
    if reason := rejection_reason(provider, device, method, strategy):
        with pytest.raises(ModelError, match=f"kernels: {provider}.*{reason}"):
            choose_kernels(requested, device, stage)
    else:
        assert choose_kernels(requested, device, stage).provider == provider


def test_4_bit_weights_with_zero_3_raise_an_error_for_every_provider():
    qlora = config(load_in_4bit=True, lora_config={"r": 4}, num_devices=2)
    for device in get_args(Device):
        with pytest.raises(ModelError, match=r"ZeRO-3.*4-bit.*deepspeed: zero_2.*load_in_4bit: false"):
            choose_kernels(qlora, device, 3)

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from configs.schema import FinetuneConfig
from training.models import kernels
from training.models.files import ModelError
from training.models.kernels import (
    COMPATIBILITY,
    SPREADS,
    TESTED,
    UNTESTED,
    Device,
    Method,
    Provider,
    choose_kernels,
    compatibility_as_markdown,
)


def config(**keys: Any) -> FinetuneConfig:
    return FinetuneConfig(model_id="some/model", train_path="train.jsonl", **keys)


def test_what_unsloths_adapters_cannot_be_is_not_dropped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "_installed", lambda package: True)
    asked = config(lora_config={"r": 4, "use_dora": True, "rank_pattern": {"q_proj": 8}})
    choice = choose_kernels(asked, "cuda", 0)
    reason = "Unsloth's adapters are made here without lora_config.rank_pattern and lora_config.use_dora"
    assert (choice.provider, choice.reason) == ("liger", f"auto: {reason}")
    with pytest.raises(ModelError, match=r"without lora_config\.use_dora"):
        choose_kernels(config(lora_config={"use_dora": True}, kernels="unsloth"), "cpu", 0)
    plain = config(lora_config={"r": 4, "lora_alpha": 8, "use_rslora": True, "use_dora": False})
    assert choose_kernels(plain, "cuda", 0).provider == "unsloth"
    continued = config(lora_config={"use_dora": True}, initial_adapter_model_ckpt_path="run:a")
    assert choose_kernels(continued, "cuda", 0).provider == "unsloth", "an adapter is loaded as it is"


@pytest.mark.parametrize("module", ["gate_proj", "model.layers.0.mlp"])
def test_what_unsloth_does_not_train_whole_goes_to_others(module: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "_installed", lambda package: True)
    asked = config(lora_config={"modules_to_save": ["lm_head", module]})
    choice = choose_kernels(asked, "cuda", 0)
    assert choice.provider == "liger"
    assert f"but not {module} (lora_config.modules_to_save)" in choice.reason
    taken = config(lora_config={"modules_to_save": ["lm_head", "model.embed_tokens", "model.norm"]})
    assert choose_kernels(taken, "cuda", 0).provider == "unsloth"


@pytest.mark.parametrize(
    ("device", "stage", "installed", "provider", "reason"),
    [
        ("cpu", 0, {"unsloth", "triton"}, "torch", "on CPU there is nothing for Triton kernels to speed up"),
        ("cuda", 0, {"unsloth", "triton"}, "unsloth", "the fastest on one GPU a worker"),
        ("cuda", 2, {"unsloth", "triton"}, "unsloth", "the fastest on one GPU a worker"),
        ("cuda", 3, {"unsloth", "triton"}, "liger", "Unsloth does not split weights (ZeRO-3)"),
        ("cuda", 0, {"triton"}, "liger", "Unsloth is not installed (make setup-unsloth)"),
        # Triton comes with torch for CUDA, and a machine without a GPU may plan for those that have it.
        ("cuda", 0, set(), "liger", "Unsloth is not installed (make setup-unsloth)"),
    ],
)
def test_auto_takes_the_fastest_that_serves_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
    device: Device,
    stage: int,
    installed: set[str],
    provider: str,
    reason: str,
):
    monkeypatch.setattr(kernels, "_installed", lambda package: package in installed)
    choice = choose_kernels(config(), device, stage)
    assert choice.provider == provider
    assert choice.reason.startswith("auto: ")
    assert reason in choice.reason


def test_auto_keeps_packed_rows_apart(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "_installed", lambda package: True)
    choice = choose_kernels(config(packing=True), "cuda", 0)
    assert choice.provider == "liger"
    assert "lets packed rows see one another" in choice.reason


@pytest.mark.parametrize("package", ["flash_attn", "xformers"])
def test_attention_that_rounds_otherwise_every_time_is_not_deterministic(
    package: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kernels, "_installed", lambda name: name in (package, "unsloth", "triton"))
    choice = choose_kernels(config(deterministic=True), "cuda", 0)
    assert choice.provider == "liger"
    assert f"would be by {package}" in choice.reason
    assert choose_kernels(config(), "cuda", 0).provider == "unsloth"
    monkeypatch.setattr(kernels, "_installed", lambda name: name in ("unsloth", "triton"))
    assert choose_kernels(config(deterministic=True), "cuda", 0).provider == "unsloth"


def test_fp32_is_not_trained_in_16_bits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "_installed", lambda package: True)
    choice = choose_kernels(config(dtype="fp32"), "cuda", 0)
    assert choice.provider == "liger"
    assert "Unsloth computes in 16 bits on a GPU" in choice.reason
    assert choose_kernels(config(dtype="fp32", kernels="unsloth"), "cpu", 0).provider == "unsloth"


@pytest.mark.parametrize(
    ("asked", "device", "stage", "advice"),
    [
        ("unsloth", "cuda", 3, "Write kernels: auto or liger or torch"),
        ("liger", "cpu", 0, "Write kernels: auto or unsloth or torch"),
    ],
)
def test_what_cannot_serve_is_refused_with_what_to_write(asked: str, device: Device, stage: int, advice: str):
    with pytest.raises(ModelError, match=f"kernels: {asked}: .*{advice}"):
        choose_kernels(config(kernels=asked), device, stage)


def test_unsloth_that_is_not_installed_is_refused_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "_installed", lambda package: False)
    with pytest.raises(ModelError, match="make setup-unsloth"):
        choose_kernels(config(kernels="unsloth"), "cuda", 0)


@pytest.mark.parametrize(("asked", "device"), [("torch", "cpu"), ("torch", "cuda"), ("liger", "cuda")])
def test_what_is_asked_for_is_taken(asked: str, device: Device):
    assert choose_kernels(config(kernels=asked), device, 0) == kernels.KernelChoice(asked, "asked for")


def test_docs_show_the_table():
    page = (Path(__file__).resolve().parents[3] / "docs" / "kernels.md").read_text("utf-8")
    assert f"\n\n{compatibility_as_markdown()}\n\n" in page


@pytest.mark.parametrize("provider", get_args(Provider))
@pytest.mark.parametrize("device", get_args(Device))
@pytest.mark.parametrize("method", get_args(Method))
@pytest.mark.parametrize("spread", SPREADS)
def test_what_the_table_refuses_is_refused_and_what_it_has_is_taken(
    monkeypatch: pytest.MonkeyPatch, provider: Provider, device: Device, method: Method, spread: str
):
    monkeypatch.setattr(kernels, "_installed", lambda package: True)
    keys: dict[str, Any] = {} if method == "full" else {"lora_config": {"r": 4}}
    keys |= {"load_in_4bit": True} if method == "QLoRA" else {}
    keys["num_devices"] = 1 if spread == "one worker" else 2
    stage = int(spread[-1]) if spread.startswith("ZeRO") else 0
    asked = config(**keys, kernels=provider)
    cell = COMPATIBILITY[provider, device][method][SPREADS.index(spread)]
    if cell in (TESTED, UNTESTED):
        assert choose_kernels(asked, device, stage).provider == provider
    else:
        with pytest.raises(ModelError, match=re.escape(f"kernels: {provider}: {cell}. Write ")):
            choose_kernels(asked, device, stage)


def test_what_no_kernels_can_do_is_refused_with_what_to_change():
    qlora = config(load_in_4bit=True, lora_config={"r": 4}, num_devices=2)
    for device in get_args(Device):
        with pytest.raises(ModelError, match=r"cannot split 4-bit weights\. Write deepspeed: zero_2, or"):
            choose_kernels(qlora, device, 3)

"""Choice of the attention implementation and the mask."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from configs.schema import FinetuneConfig
from training.models import attention
from training.models.attention import Attention, AttentionTraits, choose_attention, read_traits
from training.models.kernels import Device, Provider

PLAIN = AttentionTraits(has_softcapping=False, needs_mask=False, fits_varlen=True)
CAPPED = AttentionTraits(has_softcapping=True, needs_mask=False, fits_varlen=False)
MIXTURE = AttentionTraits(has_softcapping=False, needs_mask=True, fits_varlen=True)
PACKING = {"packing": True}
FLASH = {"flash_attention_2": True}


@pytest.mark.parametrize(
    ("keys", "traits", "device", "kernels", "implementation", "mask"),
    [
        ({}, PLAIN, "cpu", "torch", "sdpa", False),
        ({}, PLAIN, "cuda", "liger", "sdpa", False),
        ({}, MIXTURE, "cuda", "liger", "sdpa", True),
        ({}, CAPPED, "cuda", "torch", "eager", False),
        ({}, PLAIN, "cuda", "unsloth", "unsloth", True),
        ({}, CAPPED, "cuda", "unsloth", "unsloth", True),
        ({}, PLAIN, "cpu", "unsloth", "sdpa", True),  # its CPU mode uses transformers' attention
        (PACKING, PLAIN, "cpu", "torch", "sdpa", False),
        (PACKING, MIXTURE, "cpu", "torch", "sdpa", False),
        (PACKING, PLAIN, "cuda", "torch", "torch_varlen", False),
        (PACKING, MIXTURE, "cuda", "torch", "torch_varlen", False),
        (PACKING | {"dtype": "fp32"}, PLAIN, "cuda", "torch", "sdpa", False),
        (PACKING, CAPPED, "cuda", "torch", "eager", False),
        (FLASH, PLAIN, "cuda", "torch", "flash_attention_2", False),
        (FLASH, CAPPED, "cuda", "liger", "flash_attention_2", False),
        (FLASH, MIXTURE, "cuda", "liger", "flash_attention_2", True),
        (FLASH | PACKING, PLAIN, "cuda", "liger", "flash_attention_2", False),
        (FLASH, PLAIN, "cuda", "unsloth", "unsloth", True),
        (FLASH, PLAIN, "cpu", "torch", "sdpa", False),
    ],
)
def test_attention_follows_model_device_and_kernels(
    keys: dict[str, Any],
    traits: AttentionTraits,
    device: Device,
    kernels: Provider,
    implementation: str,
    mask: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(attention, "is_installed", lambda package: package == "flash_attn")
    chosen = choose_attention(config(**keys), traits, device, kernels)
    assert (chosen.implementation, chosen.mask) == (implementation, mask)


@pytest.mark.parametrize(("traits", "implementation"), [(PLAIN, "sdpa"), (CAPPED, "eager")])
def test_pytorch_attention_is_used_without_flash_attn(
    traits: AttentionTraits, implementation: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attention, "is_installed", lambda package: False)
    assert choose_attention(config(**FLASH), traits, "cuda", "torch").implementation == implementation


@pytest.mark.parametrize(
    ("implementation", "expected"),
    [("flash_attention_2", True), ("torch_varlen", True), ("sdpa", False), ("eager", False)],
)
def test_only_flash_kernels_take_row_boundaries(implementation: Any, expected: bool):
    assert Attention(implementation, mask=False).takes_row_boundaries == expected


@pytest.mark.parametrize(
    ("kind", "settings", "fits_varlen"),
    [
        ("llama", {}, True),
        ("llama", {"head_dim": 256}, True),
        ("llama", {"head_dim": 512}, False),
        ("llama", {"head_dim": 12}, False),
        ("llama", {"attention_dropout": 0.1}, False),
        ("gpt2", {}, False),
    ],
)
def test_config_decides_whether_varlen_kernels_fit(
    kind: str, settings: dict[str, Any], fits_varlen: bool, tmp_path: Path
):
    AutoConfig.for_model(kind, **settings).save_pretrained(tmp_path)
    assert read_traits(tmp_path, "tiny", trust_remote_code=False).fits_varlen == fits_varlen


@pytest.mark.parametrize(
    ("kind", "has_softcapping"), [("gemma2", True), ("gemma3_text", False), ("llama", False)]
)
def test_softcapping_is_read_from_the_config(kind: str, has_softcapping: bool, tmp_path: Path):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    assert read_traits(tmp_path, "tiny", trust_remote_code=False).has_softcapping == has_softcapping


def config(**keys: Any) -> FinetuneConfig:
    return FinetuneConfig.model_validate({"model_id": "a/b", "train_path": "t.jsonl"} | keys)

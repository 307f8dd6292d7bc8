"""Choice of the attention implementation and the mask."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from configs.schema import FinetuneConfig
from tests.support.messages import assert_names
from training.models import attention
from training.models.architecture import model_shape
from training.models.attention import (
    SEQUENCE_PARALLEL,
    Attention,
    AttentionTraits,
    check_sequence_parallel,
    check_windows,
    choose_attention,
    exceeded_rope_of_unsloth,
    read_traits,
)
from training.models.files import ModelError
from training.models.kernels import Device, Provider

PLAIN = AttentionTraits(has_softcapping=False, needs_mask=False, fits_varlen=True)
CAPPED = AttentionTraits(has_softcapping=True, needs_mask=False, fits_varlen=False)
MIXTURE = AttentionTraits(has_softcapping=False, needs_mask=True, fits_varlen=True)
WITHOUT_SDPA = AttentionTraits(has_softcapping=False, needs_mask=True, fits_varlen=False, has_sdpa=False)
PACKING = {"packing": True}
FLASH = {"flash_attention_2": True}
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 4 * dimension for dimension in range(8)],
}
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LLAMA_3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


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
        ({}, WITHOUT_SDPA, "cpu", "torch", "eager", True),
        ({}, WITHOUT_SDPA, "cuda", "liger", "eager", True),
        (FLASH, WITHOUT_SDPA, "cuda", "torch", "eager", True),
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


@pytest.mark.parametrize(
    ("kind", "has_sdpa"), [("gpt_oss", False), ("bloom", False), ("llama", True), ("gpt2", True)]
)
def test_models_without_sdpa_in_transformers_are_recognized(kind: str, has_sdpa: bool, tmp_path: Path):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    assert read_traits(tmp_path, "tiny", trust_remote_code=False).has_sdpa == has_sdpa


def check(directory: Path, size: int, kind: str, **settings: Any) -> None:
    """Check whether workers can share the sequences of a model with these settings."""
    AutoConfig.for_model(kind, **settings).save_pretrained(directory)
    traits = read_traits(directory, "tiny", trust_remote_code=False)
    shape = model_shape(directory, "tiny", trust_remote_code=False)
    shared = config(num_devices=size, sequence_parallel_size=size)
    check_sequence_parallel(shared, traits, shape, "a/tiny")


HEADS = {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 96, "head_dim": 8}


@pytest.mark.parametrize("kind", sorted(SEQUENCE_PARALLEL))
def test_workers_can_share_the_sequences_of_tested_architectures(kind: str, tmp_path: Path):
    check(tmp_path, 2, kind, **HEADS)


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        # Positions are learned, and its attention takes no kernel arguments.
        ("gpt2", {}, "other architectures"),
        ("gemma2", {}, "logit softcapping"),
        ("mixtral", {}, "mixtures of experts"),
        ("mamba", {}, "other architectures"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "RoPE that depends on the length",
        ),
    ],
)
def test_models_whose_parts_of_a_sequence_compute_something_else_are_rejected(
    kind: str, settings: dict[str, Any], reason: str, tmp_path: Path
):
    with pytest.raises(ModelError) as error:
        check(tmp_path, 2, kind, **settings)
    assert_names(
        str(error.value),
        "model a/tiny",
        f"`sequence_parallel_size` does not work with {reason}",
        "llama",
        "remove",
    )


@pytest.mark.parametrize(
    ("size", "fits"), [(1, True), (2, True), (3, True), (5, False), (6, True), (12, True), (4, False)]
)
def test_workers_share_heads_equally(size: int, fits: bool, tmp_path: Path):
    """Of 12 heads and 6 key-value heads, four workers would get one and a half key-value heads."""
    if fits:
        check(tmp_path, size, "llama", **HEADS)
        return
    with pytest.raises(ModelError) as error:
        check(tmp_path, size, "llama", **HEADS)
    assert_names(
        str(error.value),
        "sequence_parallel_size",
        f"{size} workers",
        "12 heads",
        "6 key-value",
        "1 or 2 or 3 or 6 or 12",
    )


def test_sliding_windows_need_kernels_that_support_them(tmp_path: Path):
    AutoConfig.for_model("mistral", sliding_window=64).save_pretrained(tmp_path)
    shape = model_shape(tmp_path, "tiny", trust_remote_code=False)
    assert shape is not None
    shared = Attention("sdpa", mask=False, sequence_parallel_size=2)
    with pytest.raises(ModelError) as error:
        check_windows(shared, shape, 65, "a/tiny")
    assert_names(
        str(error.value), "sequence_parallel_size", "a/tiny", "64", "65", "context_length", "packing"
    )
    check_windows(shared, shape, 64, "a/tiny")
    check_windows(Attention("sdpa", mask=False), shape, 65, "a/tiny")
    check_windows(Attention("torch_varlen", mask=False, sequence_parallel_size=2), shape, 65, "a/tiny")


def config(**keys: Any) -> FinetuneConfig:
    return FinetuneConfig.model_validate({"model_id": "a/b", "train_path": "t.jsonl"} | keys)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "rope", "original"),
    [
        ("phi3", LONGROPE, 32),
        ("llama", DYNAMIC, None),
        ("llama", DYNAMIC | {"original_max_position_embeddings": 16}, None),
        ("llama", DYNAMIC, 16),
    ],
    ids=[
        "longrope",
        "dynamic",
        "dynamic with an original length",
        "dynamic with an original length of its config",
    ],
)
def test_rope_limit_is_the_length_from_which_a_row_depends_on_others(
    kind: str, rope: dict[str, Any], original: int | None, tmp_path: Path
):
    """`dynamic_rope_update` in transformers 5.17 takes the largest position of the batch."""
    lengths = {"max_position_embeddings": 64 if rope is LONGROPE else 32}
    if original is not None:
        lengths["original_max_position_embeddings"] = original
    config = AutoConfig.for_model(kind, **SMALL, **lengths, rope_parameters=rope)
    config.save_pretrained(tmp_path)
    limit = read_traits(tmp_path, "a/model", trust_remote_code=False).rope_limit
    assert limit == 32
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    rows = torch.randint(config.vocab_size, (2, limit + 16))
    alone = model(rows[:1, :16]).logits
    torch.testing.assert_close(model(rows[:, :limit]).logits[:1, :16], alone)
    assert (model(rows).logits[:1, :16] - alone).abs().max() > 1e-4


def test_models_with_fixed_frequencies_have_no_rope_limit(tmp_path: Path):
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    assert read_traits(tmp_path, "a/llama", trust_remote_code=False).rope_limit is None


@pytest.mark.parametrize(
    ("kind", "rope", "limit"),
    [
        ("llama", {}, 64),
        ("qwen3", {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, 64),
        ("llama", LONGROPE | {"original_max_position_embeddings": 32}, 32),
        ("mistral", DYNAMIC, 64),
        ("llama", LLAMA_3, None),
        ("gemma2", {"rope_type": "linear", "factor": 2.0}, 0),
        ("gemma2", {}, 64),
        ("phi3", LONGROPE, None),  # Unsloth leaves it to transformers
    ],
    ids=str,
)
def test_rope_limit_of_unsloth_is_the_length_above_which_it_changes_a_model(
    kind: str, rope: dict[str, Any], limit: int | None, tmp_path: Path
):
    settings = SMALL | {"max_position_embeddings": 64, "rope_parameters": {"rope_theta": 1e4} | rope}
    AutoConfig.for_model(kind, **settings).save_pretrained(tmp_path)
    traits = read_traits(tmp_path, "a/model", trust_remote_code=False)
    assert traits.rope_limit_of_unsloth == limit
    for keys, longest in (({"context_length": 64}, 64), ({"context_length": 65}, 65), ({}, 64)):
        exceeded = exceeded_rope_of_unsloth(config(**keys), traits, 64)
        assert exceeded == (limit if limit is not None and longest > limit else None)

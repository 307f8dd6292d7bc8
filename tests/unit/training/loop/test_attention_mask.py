"""Loss and gradients of models that train without an attention mask, compared with those with a mask."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from training.loop.trainers import collate_rows
from training.models.attention import Attention, read_traits

PAD = 0
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": PAD,
}
WITHOUT_MASK = ("llama", "gemma3_text", "gpt2", "opt", "phi", "smollm3")
WITH_MASK = ("mixtral", "qwen3_moe", "bloom", "mpt", "roberta")


def make_model(kind: str) -> Any:
    torch.manual_seed(0)
    settings = {"is_decoder": True} if kind == "roberta" else {}
    if kind in ("mixtral", "qwen3_moe"):
        settings |= {"output_router_logits": True, "num_key_value_heads": 4}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE | settings)).eval()


def needs_mask(model: Any, directory: Path) -> bool:
    model.config.save_pretrained(directory)
    return read_traits(directory, "tiny", trust_remote_code=True).needs_mask


def loss_and_gradient(model: Any, *, masked: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and the embedding gradient of three padded rows, collated by the product with or without a mask."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        {"input_ids": torch.randint(3, 120, (length,), generator=generator).tolist()} for length in (5, 9, 23)
    ]
    batch = collate_rows(PAD, 8, packed=False, attention=Attention("sdpa", mask=masked))(rows)
    assert ("attention_mask" in batch) == masked
    loss = model(**batch | {"use_cache": False}).loss
    return loss, torch.autograd.grad(loss, model.get_input_embeddings().weight)[0]


@pytest.mark.parametrize("kind", WITHOUT_MASK)
def test_models_trained_without_a_mask_compute_the_same_loss_and_gradient(kind: str, tmp_path: Path):
    model = make_model(kind)
    assert not needs_mask(model, tmp_path)
    torch.testing.assert_close(
        loss_and_gradient(model, masked=False), loss_and_gradient(model, masked=True), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("kind", WITH_MASK)
def test_models_that_use_the_mask_get_one(kind: str, tmp_path: Path):
    assert needs_mask(make_model(kind), tmp_path)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "roberta"])
def test_models_that_use_the_mask_compute_a_different_loss_without_one(kind: str):
    model = make_model(kind)
    with_mask, without_mask = (loss_and_gradient(model, masked=masked)[0] for masked in (True, False))
    assert abs(with_mask - without_mask) > 1e-5


def test_models_with_custom_code_get_a_mask(tmp_path: Path):
    model = make_model("llama")
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_other.Other"}
    assert needs_mask(model, tmp_path)
    assert not read_traits(tmp_path, "tiny", trust_remote_code=False).needs_mask

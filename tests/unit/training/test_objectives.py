"""Which models have to be told what is padding."""

from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from training.data.batches import without_mask
from training.objectives import needs_mask

PAD = 0
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": PAD,
}


def model(kind: str) -> Any:
    torch.manual_seed(0)
    decoder = {"is_decoder": True} if kind == "roberta" else {}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE | decoder)).eval()


def with_adapter(base: Any) -> Any:
    return peft.get_peft_model(
        base,
        peft.LoraConfig(
            fan_in_fan_out=base.config.model_type == "gpt2",
            target_modules=r".*(q_proj|c_attn|query_key_value|Wqkv)",
        ),
    )


@pytest.mark.parametrize(
    ("kind", "needs"),
    [
        ("llama", False),
        ("gpt2", False),
        ("mixtral", True),
        ("qwen3_moe", True),
        ("bloom", True),
        ("mpt", True),
    ],
)
def test_some_need_a_mask(kind: str, needs: bool):
    assert needs_mask(model(kind)) == needs
    assert needs_mask(with_adapter(model(kind))) == needs


def test_nobody_knows_what_other_code_does_with_it():
    other = type("Other", (type(model("llama")),), {"__module__": "modeling_other"})
    assert needs_mask(other(model("llama").config))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "opt", "phi", "smollm3"])
def test_others_compute_the_same_without(kind: str):
    of = model(kind)
    rows = [{"input_ids": torch.randint(3, 120, (length,)).tolist()} for length in (5, 9, 23)]
    collate = DataCollatorForLanguageModeling(PAD, pad_to_multiple_of=8)

    def loss_and_gradient(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        loss = of(**batch | {"use_cache": False}).loss
        return loss, torch.autograd.grad(loss, of.get_input_embeddings().weight)[0]

    torch.testing.assert_close(
        loss_and_gradient(without_mask(collate)(rows)), loss_and_gradient(collate(rows)), atol=1e-6, rtol=1e-5
    )

"""Rejection of models that are not causal although transformers would load them as causal language models."""

import json
from pathlib import Path
from typing import Any

import pytest

from training.models.architecture import check_is_causal
from training.models.files import ModelError


def write_config(directory: Path, fields: dict[str, Any]) -> None:
    (directory / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("bert", "BertForMaskedLM"),
        ("bert", "BertModel"),
        ("roberta", "RobertaForMaskedLM"),
        ("llama", "LlamaForSequenceClassification"),
        ("t5", "T5ForConditionalGeneration"),
        ("bart", "BartForConditionalGeneration"),
        ("vit", "ViTForImageClassification"),
    ],
)
def test_models_that_are_not_causal_raise_an_error_with_their_architecture(
    kind: str, architecture: str, tmp_path: Path
):
    write_config(tmp_path, {"model_type": kind, "architectures": [architecture]})
    with pytest.raises(ModelError, match=f"^model mine: .* causal .*{architecture}.*{kind}"):
        check_is_causal(tmp_path, "mine", trust_remote_code=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]},
        {"model_type": "gpt_neox"},
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
        {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"]},
        {"model_type": "bert", "architectures": ["BertLMHeadModel"], "is_decoder": True},
    ],
    ids=str,
)
def test_causal_models_are_accepted_and_their_encoder_variants_rejected(
    fields: dict[str, Any], tmp_path: Path
):
    write_config(tmp_path, fields)
    check_is_causal(tmp_path, "mine", trust_remote_code=False)
    write_config(
        tmp_path, fields | {"model_type": "bert", "is_decoder": False, "architectures": ["BertModel"]}
    )
    with pytest.raises(ModelError):
        check_is_causal(tmp_path, "mine", trust_remote_code=False)

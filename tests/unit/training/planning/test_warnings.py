"""Warnings of a plan."""

from dataclasses import replace
from pathlib import Path

import pytest

from configs.schema import FinetuneConfig
from tests.support.messages import assert_names
from training.models.files import ModelFacts, read_model_facts
from training.planning.warnings import dtype_warnings


@pytest.fixture
def large_model(tiny_model: Path) -> ModelFacts:
    facts = read_model_facts(str(tiny_model))
    return replace(facts, parameter_shapes={"model.embed_tokens.weight": (50_000, 576)})


def config(dtype: str) -> FinetuneConfig:
    return FinetuneConfig.model_validate({"model_id": "a/b", "train_path": "t.jsonl", "dtype": dtype})


def test_emulated_bf16_gives_a_warning(large_model: ModelFacts):
    """torch 2.13 on a CPU without AVX-512 took 367 ms for a bf16 matmul that takes 8.4 ms in fp32."""
    (warning,) = dtype_warnings(config("bf16"), large_model, "cpu", has_bf16=False)
    assert_names(warning, "dtype: bf16", "dtype: fp32")


def test_bf16_in_hardware_on_a_gpu_or_for_a_tiny_model_gives_no_warning(
    large_model: ModelFacts, tiny_model: Path
):
    assert not list(dtype_warnings(config("bf16"), large_model, "cpu", has_bf16=True))
    assert not list(dtype_warnings(config("bf16"), large_model, "cuda", has_bf16=False))
    assert not list(dtype_warnings(config("fp32"), large_model, "cpu", has_bf16=False))
    tiny = read_model_facts(str(tiny_model))
    assert not list(dtype_warnings(config("bf16"), tiny, "cpu", has_bf16=False))

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from tests.support.zero3_loading import loading_memory


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_only_rank_0_holds_the_experts_of_a_mixture_while_zero_3_loads_them(tmp_path: Path):
    """transformers 5.17 converts each expert's weights on every rank: all experts of the model, once per worker of a node."""
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    files = [load_file(path) for path in tmp_path.glob("*.safetensors")]
    weights = [tensor for file in files for tensor in file.values()]
    size = sum(tensor.nbytes for tensor in weights)
    first, second = loading_memory(tmp_path, tmp_path, workers=2, dtype="bf16")
    total = pytest.approx(sum(float(t.double().abs().sum()) for t in weights), rel=1e-9)
    assert first.weights == second.weights == total
    assert first.anonymous < 1.4 * size
    assert second.anonymous < size / 2

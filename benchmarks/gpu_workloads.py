"""Sizes of the models, rows and runs of the GPU benchmark: shapes of Llama for a GPU, and tiny ones for two CPU cores."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# From the config.json of Llama-3.1-8B, Llama-3.2-3B and Llama-3.2-1B; `step` is a small one whose steps take a CPU seconds in fp32.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "3b": {
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "step": {
        "vocab_size": 32768,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class Workload:
    """The model and the steps of a run."""

    shape: str
    """Name in SHAPES."""
    context_length: int
    batch_size: int
    accumulation: int
    steps: int
    warm_up: int
    """First steps, excluded because they compile kernels."""

    @property
    def rows(self) -> int:
        """The number of rows, or packed sequences, of all steps."""
        return self.batch_size * self.accumulation * self.steps


# `step`, `resume` and `losses` share one GPU at the same time, while the other models are made. By the plan's estimate, each of the five
# runs of the 1B model takes 8 to 12 GB.
GPU: Mapping[str, Workload] = {
    "step": Workload("step", 512, 2, 1, steps=1, warm_up=0),
    "lora": Workload("8b", 4096, 2, 2, steps=8, warm_up=2),
    "resume": Workload("1b", 1024, 4, 1, steps=6, warm_up=2),
    "rows": Workload("1b", 4096, 4, 4, steps=6, warm_up=2),
    "full": Workload("3b", 4096, 2, 4, steps=6, warm_up=2),
    "qlora": Workload("3b", 4096, 2, 2, steps=6, warm_up=2),
    "losses": Workload("1b", 1024, 4, 1, steps=50, warm_up=2),
    "methods": Workload("step", 512, 2, 1, steps=4, warm_up=1),
}
TINY: Mapping[str, Workload] = {
    "step": Workload("tiny", 128, 2, 1, steps=1, warm_up=0),
    "lora": Workload("tiny", 256, 2, 2, steps=4, warm_up=1),
    "resume": Workload("tiny", 128, 2, 2, steps=4, warm_up=1),
    "rows": Workload("tiny", 256, 2, 2, steps=4, warm_up=1),
    "full": Workload("tiny", 64, 2, 2, steps=4, warm_up=1),
    "qlora": Workload("tiny", 256, 2, 2, steps=4, warm_up=1),
    "losses": Workload("tiny", 64, 2, 1, steps=20, warm_up=1),
    "methods": Workload("tiny", 128, 2, 1, steps=4, warm_up=1),
}

"""Requests to build a small model on CPU, as a worker makes them from its plan."""

from pathlib import Path
from typing import Any

from training.models.attention import Attention
from training.models.request import ModelRequest


def model_request(directory: Path, **changes: Any) -> ModelRequest:
    """Return the request for full-parameter training in fp32, with some fields changed."""
    settings: dict[str, Any] = {
        "directory": directory,
        "adapter_directory": None,
        "lora": None,
        "device": "cpu",
        "weights_dtype": "fp32",
        "zero_stage": 0,
        "load_in_4bit": False,
        "attention": Attention("sdpa", mask=False),
        "gradient_checkpointing": False,
        "context_length": 64,
        "seed": 0,
        "trust_remote_code": False,
        "deterministic": False,
    }
    return ModelRequest(**settings | changes)

"""Load the experts of a mixture under ZeRO-3: rank 0 reads them, and DeepSpeed scatters their partitions to all ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from transformers.integrations import deepspeed


@contextmanager
def experts_of_rank_0() -> Iterator[None]:
    """Let `from_pretrained` under ZeRO-3 convert the weights of files on rank 0 only.

    Files name each expert of a mixture, and the model holds all experts of a layer in one parameter. transformers 5.17 converts
    them on every rank, so each would hold all experts of the model in host memory, and then takes only those of rank 0.
    """
    if torch.distributed.get_rank() == 0:
        yield
        return
    convert = deepspeed._apply_weight_conversions_to_state_dict

    def described(model: Any, weights: dict[str, torch.Tensor], mapping: Any) -> dict[str, Any]:
        """Return the weights, which are mapped from their files; converted ones have a shape and no data."""
        shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in weights.items()}
        mapped = {id(shape): weights[name] for name, shape in shapes.items()}
        converted = convert(model, dict(shapes), mapping)
        return {name: mapped.get(id(tensor), tensor) for name, tensor in converted.items()}

    with patch.object(deepspeed, "_apply_weight_conversions_to_state_dict", described):
        yield

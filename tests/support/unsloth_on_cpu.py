"""Logits of a model as Unsloth's CPU mode loads it: `python -m tests.support.unsloth_on_cpu DIRECTORY LENGTH...`.

Each LENGTH is a sequence of that many tokens. The module prints one line of JSON with the last logits of each.
"""

import json  # noqa: I001
import sys
from pathlib import Path
from typing import Any

import unsloth  # noqa: F401  # before the modules that it patches
import torch

from tests.support.model_requests import model_request
from training.models import unsloth_provider


def main(directory: Path, lengths: list[int]) -> dict[str, Any]:
    """Return the last logits of each sequence, computed in this order."""
    model: Any = unsloth_provider.build(model_request(directory)).eval()
    with torch.no_grad():
        logits = [model(torch.arange(1, length + 1)[None]).logits[0, -1].tolist() for length in lengths]
    return {"logits": logits}


if __name__ == "__main__":
    path, *lengths = sys.argv[1:]
    print(json.dumps(main(Path(path), [int(length) for length in lengths])))

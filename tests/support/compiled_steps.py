"""The steps of a plan, eager or under torch.compile: `python -m tests.support.compiled_steps eager|compiled PLAN DIRECTORY`.

Prints one line of JSON: the results of tests/support/pretended_gpu.py on CPU, and the number of compiled graphs.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import HashStore
from torch._dynamo.utils import counters

import training.models
from tests.support.pretended_gpu import train
from training.models.request import ModelRequest

_build_model = training.models.build_model


def _build_compiled(provider: Any, request: ModelRequest) -> Any:
    model = _build_model(provider, request)
    model.compile()
    return model


if __name__ == "__main__":
    mode, plan, directory = sys.argv[1:]
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    if mode == "compiled":
        training.models.build_model = _build_compiled
    results = train("torch", Path(plan), Path(directory))
    print(json.dumps(results | {"graphs": counters["stats"]["unique_graphs"]}))

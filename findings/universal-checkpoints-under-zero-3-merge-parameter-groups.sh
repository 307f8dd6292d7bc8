#!/usr/bin/env bash
# DeepSpeed's universal checkpoint is the documented way to resume on another number of GPUs. Under ZeRO-3, loading one gives every
# parameter group the settings of the first group.
#
# `load_hp_checkpoint_state_from_checkpoint_dir_stage3` in deepspeed/runtime/zero/stage3.py copies `param_groups[0]` of the checkpoint
# into all groups ("Generally, the hyperparameters of each parameter should be the same"). They are not: transformers' Trainer, as most
# training code, has weight decay on matrices, and none on biases and norms. After the universal checkpoint, biases and norms decay
# as well, without a warning; a group with its own learning rate loses that, too. The ordinary checkpoint keeps the groups, and so
# do universal checkpoints under ZeRO-1 and ZeRO-2.
#
# Seen with deepspeed==0.19.8 and torch==2.13.0, on CPU with one process.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 setuptools wheel
"$directory/venv/bin/pip" install -q --disable-pip-version-check --no-build-isolation deepspeed==0.19.8
DS_ACCELERATOR=cpu "$directory/venv/bin/python" - "$directory" <<'PYTHON'
import argparse
import os
import sys
from pathlib import Path

os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}

import deepspeed
import deepspeed.ops
import torch
from deepspeed.checkpoint.ds_to_universal import main as convert

directory = Path(sys.argv[1])
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def engine(*, universal: bool):
    """Return an engine with weight decay on matrices, and none on biases and norms, as Trainer does."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "checkpoint": {"load_universal": universal},
    }
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups), config=config)[0]


def decay(trained) -> list[float]:
    return [group["weight_decay"] for group in trained.optimizer.optimizer.param_groups]


saved = engine(universal=False)
saved.backward(saved(torch.ones(1, 4)).square().mean())
saved.step()
saved.save_checkpoint(str(directory / "saved"), tag="step")
convert(
    argparse.Namespace(
        input_folder=str(directory / "saved/step"),
        output_folder=str(directory / "saved/universal"),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
)

same = engine(universal=False)
same.load_checkpoint(str(directory / "saved"), tag="step")
converted = engine(universal=True)
converted.load_checkpoint(str(directory / "saved"), tag="universal")
print("weight decay of the groups, trained:", decay(saved))
print("after loading the checkpoint:", decay(same))
print("after loading the universal checkpoint:", decay(converted))
if decay(same) != [0.3, 0.0] or decay(converted) != [0.3, 0.3]:
    sys.exit("this has changed")
PYTHON

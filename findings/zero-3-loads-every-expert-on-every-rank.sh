#!/usr/bin/env bash
# Under DeepSpeed ZeRO-3, from_pretrained of a mixture of experts holds the complete model in the host memory of each rank.
#
# ZeRO-3 loading is expected to read weights once: transformers copies each layer on rank 0 and DeepSpeed deals the parts out, and
# for a dense model the other ranks read nothing, because the file is mapped. A mixture's files name each expert, and transformers 5
# holds all experts of a layer in one parameter. It converts the complete state dict before the first layer is dealt out, on every
# rank, although only rank 0's tensors are used. A node with 8 GPUs and Mixtral 8x7B needs 8 x 93 GB of host memory to load.
#
# Seen with transformers==5.17.0, deepspeed==0.19.8, accelerate==1.15.0 and torch==2.13.0, 2 processes on CPU with gloo.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$directory/venv/bin/pip" install -q --disable-pip-version-check transformers==5.17.0 accelerate==1.15.0 setuptools==80.9.0
"$directory/venv/bin/pip" install -q --disable-pip-version-check --no-build-isolation deepspeed==0.19.8
cat >"$directory/make.py" <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

shape = {"vocab_size": 256, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
models = {
    "dense": LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=8192)),
    "mixture": MixtralForCausalLM(MixtralConfig(**shape, intermediate_size=1024, num_local_experts=8)),
}
for name, model in models.items():
    model.to(torch.bfloat16).save_pretrained(f"{sys.argv[1]}/{name}")
PYTHON
cat >"$directory/load.py" <<'PYTHON'
import sys
import threading
from pathlib import Path

import deepspeed
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig


def private_memory() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


deepspeed.init_distributed("gloo")
settings = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1}
kept = HfDeepSpeedConfig(settings)
before, samples, loaded = private_memory(), [0], threading.Event()


def sample() -> None:
    while not loaded.wait(0.005):
        samples.append(private_memory())


thread = threading.Thread(target=sample)
thread.start()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
loaded.set()
thread.join()
if torch.distributed.get_rank() == 1:
    size = Path(sys.argv[1], "model.safetensors").stat().st_size
    print(f"RESULT {(max(samples) - before) / size:.2f}", flush=True)
torch.distributed.barrier()
PYTHON
"$directory/venv/bin/python" "$directory/make.py" "$directory" 2>/dev/null
peak() { # peak MODEL: private memory of rank 1 while it loads its half of the model, in sizes of the model
  # Freed memory returns to the system at once, so that the peak counts what is in use.
  TORCH_EXTENSIONS_DIR="$directory/extensions" MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536 DS_ACCELERATOR=cpu \
    timeout 600 "$directory/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 "$directory/load.py" "$directory/$1" 2>/dev/null | awk '/^RESULT/ {print $2}'
}
dense=$(peak dense)
mixture=$(peak mixture)
echo "rank 1 of 2 loads its half under ZeRO-3: dense model $dense x its size in private memory, mixture of experts $mixture x"
awk "BEGIN {exit !($dense < 0.8 && $mixture > 1.3)}" || { echo "this has changed" >&2; exit 1; }

#!/usr/bin/env bash
# While PEFT loads an adapter with low_cpu_mem_usage=True, modules that other threads build have no weights.
#
# Loading in a background thread is expected to touch that model alone. PEFT builds the adapter's layers on the meta device, and for
# this it replaces torch.nn.Module.register_parameter, in the complete process. A server that loads an adapter in one thread and
# a model in another gets parameters on the meta device (an error at the first use, or random weights after to_empty), or transformers'
# from_pretrained ends with "Parameter.__new__() got an unexpected keyword argument '_is_hf_initialized'". torch.device("meta") as
# a context manager, which does the same, is local to its thread.
#
# Seen with peft==0.21.2, transformers==5.17.0 and torch==2.13.0.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$directory/venv/bin/pip" install -q --disable-pip-version-check transformers==5.17.0 peft==0.21.2
"$directory/venv/bin/python" - "$directory/adapter" 2>/dev/null <<'PYTHON'
import sys
import threading

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=12, num_attention_heads=2)
get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules="all-linear")).save_pretrained(sys.argv[1])


def empty_modules(low_cpu_mem_usage: bool) -> tuple[int, int]:
    """Load an adapter ten times; return how many modules another thread built meanwhile, and how many without weights."""
    built, is_done = [], threading.Event()

    def build() -> None:
        while not is_done.is_set():
            built.append(torch.nn.Linear(2, 2).weight.is_meta)

    other = threading.Thread(target=build)
    other.start()
    for _ in range(10):
        PeftModel.from_pretrained(LlamaForCausalLM(config), sys.argv[1], low_cpu_mem_usage=low_cpu_mem_usage)
    is_done.set()
    other.join()
    return len(built), sum(built)


plain, low = empty_modules(False), empty_modules(True)
print(f"modules built by another thread, of these without weights: {plain[0]}, {plain[1]}; with low_cpu_mem_usage {low[0]}, {low[1]}")
if plain[1] or not low[1]:
    sys.exit("this has changed")
PYTHON

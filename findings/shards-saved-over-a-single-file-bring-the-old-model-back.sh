#!/usr/bin/env bash
# A model that is saved in shards into a directory with an older model.safetensors is not the one that is loaded from there.
#
# `save_pretrained` removes files of an earlier save: shards of another number of files are gone afterwards. So one expects that a directory
# holds the model that was saved last. But a single model.safetensors stays beside new shards and their index, and transformers and
# accelerate prefer it: both load the older weights without a warning. Servers that read the index load the new ones, so a model can
# score as before its training in an evaluation, and answer as trained in production. It takes a model saved as one file, as transformers 5
# saves up to 50 GB, and in shards later: by transformers 4, whose shards have 5 GB, or with a max_shard_size. The other way round, the new
# model is loaded, but an index stays that lists shards that are gone. Delete *.safetensors and the index before saving.
#
# Seen with transformers==5.17.0, accelerate==1.15.0, torch==2.13.0 and safetensors==0.8.0.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$directory/venv/bin/pip" install -q --disable-pip-version-check transformers==5.17.0 accelerate==1.15.0 safetensors==0.8.0
HF_HUB_OFFLINE=1 "$directory/venv/bin/python" - "$directory" 2>/dev/null <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from accelerate import load_checkpoint_in_model
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

directory = Path(sys.argv[1])
config = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=256,
    tie_word_embeddings=False,
)
SHARDS, OTHER_SHARDS = {"max_shard_size": "100KB"}, {"max_shard_size": "200KB"}


def model(value):
    """Return a model of which every parameter has this value."""
    built = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.fill_(value)
    return built


def saved_twice(name, first, second):
    """Save an old model (zeros) and a new one (ones) into a directory; return what each reader finds there."""
    model(0.0).save_pretrained(directory / name, **first)
    model(1.0).save_pretrained(directory / name, **second)
    by_accelerate = model(0.5)
    load_checkpoint_in_model(by_accelerate, str(directory / name))
    found = {
        "transformers": values(LlamaForCausalLM.from_pretrained(directory / name)),
        "accelerate": values(by_accelerate),
    }
    index = directory / name / "model.safetensors.index.json"
    if index.exists():
        listed = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        found["by the index"] = (
            values_of_files([directory / name / file for file in listed])
            if all((directory / name / file).exists() for file in listed)
            else "missing files"
        )
    return found


def values(built):
    return {0.0: "old", 1.0: "new"}[torch.cat([parameter.flatten() for parameter in built.parameters()]).unique().item()]


def values_of_files(files):
    found = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            found |= {value for key in opened.keys() for value in opened.get_tensor(key).unique().tolist()}
    return {0.0: "old", 1.0: "new"}[found.pop()] if len(found) == 1 else f"mixed: {found}"


seen = {
    "one file, then one file": saved_twice("one-one", {}, {}),
    "shards, then other shards": saved_twice("shards-shards", SHARDS, OTHER_SHARDS),
    "one file, then shards": saved_twice("one-shards", {}, SHARDS),
    "shards, then one file": saved_twice("shards-one", SHARDS, {}),
}
for case, found in seen.items():
    print(f"{case}: {found}")
if seen != {
    "one file, then one file": {"transformers": "new", "accelerate": "new"},
    "shards, then other shards": {"transformers": "new", "accelerate": "new", "by the index": "new"},
    "one file, then shards": {"transformers": "old", "accelerate": "old", "by the index": "new"},
    "shards, then one file": {"transformers": "new", "accelerate": "new", "by the index": "missing files"},
}:
    sys.exit("this has changed")
PYTHON

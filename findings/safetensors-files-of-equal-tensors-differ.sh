#!/usr/bin/env bash
# safetensors.torch.save_model writes other bytes for the same model each time, so checksums of checkpoints do not compare.
#
# A format without code, timestamps or pickles is expected to be reproducible, and tensors are: they are sorted. But the header's
# metadata is written in the order of a hash map with a random seed. With one entry ({"format": "pt"}, which save_pretrained
# writes) there is only one order. save_model adds an entry for each tied tensor, and training scripts add their step and base model:
# from two entries on, caches by content, `git lfs`, deduplicating storage and "is this the same adapter?" see another file.
#
# Seen with safetensors==0.8.0 and torch==2.13.0.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.3.5 safetensors==0.8.0 packaging==25.0
"$directory/venv/bin/python" - "$directory" <<'PYTHON'
import hashlib
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_model

FILE = Path(sys.argv[1]) / "model.safetensors"


class Tied(torch.nn.Module):
    def __init__(self, ties: int):
        super().__init__()
        self.embedding = torch.nn.Embedding(8, 4)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(4, 8, bias=False) for _ in range(ties))
        for head in self.heads:
            head.weight = self.embedding.weight


def files_of(model: torch.nn.Module) -> int:
    """Return how many different files 40 saves of the model make."""
    sums = set()
    for _ in range(40):
        save_model(model, str(FILE))
        sums.add(hashlib.sha256(FILE.read_bytes()).hexdigest())
    assert load_file(FILE).keys()
    return len(sums)


torch.manual_seed(0)
plain, tied = files_of(torch.nn.Linear(4, 4)), files_of(Tied(3))
print(f"40 saves of a model without tied weights: {plain} file; with three tied heads: {tied} different files")
if plain != 1 or tied < 2:
    sys.exit("this has changed")
PYTHON

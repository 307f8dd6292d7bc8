#!/usr/bin/env bash
# PEFT's linear average of three checkpoints of one adapter is three times the adapter.
#
# Weights of 1/3 each, with combination_type="linear", are expected to give the mean, with an error: the documentation calls it a rough
# approximation. But each adapter's A and B are multiplied by the root of its weight and added up separately, and the product of the
# two sums contains B of each adapter times A of each other. For unrelated adapters, these products are noise. Checkpoints of one run
# have nearly the same A and B, so they all point the same way: n checkpoints give n times their mean, to three digits. The
# averaged model is an overdriven one instead of a smoother one. "dare_linear" and "magnitude_prune" do the same. "ties" takes the mean
# of A and of B, with the same roots, and gives a third. "svd", the default, and "cat" give the mean.
#
# Seen with peft==0.21.2, transformers==5.17.0 and torch==2.13.0, on CPU: linear 3.00, ties 0.30, svd 1.00, cat 1.00.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$directory/venv/bin/pip" install -q --disable-pip-version-check peft==0.21.2 transformers==5.17.0
"$directory/venv/bin/python" - <<'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model

SIZE, STEPS = 64, 300
CHECKPOINTS = (200, 250, 300)
NAMES = [f"checkpoint-{step}" for step in CHECKPOINTS]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.projection = torch.nn.Linear(SIZE, SIZE, bias=False)

    def forward(self, x):
        return self.projection(x)


torch.manual_seed(0)
torch.set_num_threads(1)
lora = LoraConfig(r=8, lora_alpha=16, target_modules=["projection"])
model = get_peft_model(Model(), lora)
layer = model.base_model.model.projection
goal = torch.randn(SIZE, SIZE) / SIZE**0.5
optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=3e-3)
saved = {}
for step in range(1, STEPS + 1):
    x = torch.randn(64, SIZE)
    loss = (model(x) - x @ goal).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in CHECKPOINTS:
        saved[f"checkpoint-{step}"] = [layer.lora_A["default"].weight.clone(), layer.lora_B["default"].weight.clone()]
for name, (a, b) in saved.items():
    model.add_adapter(name, lora)
    layer.lora_A[name].weight.data.copy_(a)
    layer.lora_B[name].weight.data.copy_(b)

mean = sum(layer.get_delta_weight(name).detach() for name in NAMES) / len(NAMES)
factors = {}
for kind, options in {"linear": {}, "ties": {"density": 0.5}, "svd": {}, "cat": {}}.items():
    model.add_weighted_adapter(NAMES, [1 / 3] * 3, kind, combination_type=kind, **options)
    average = layer.get_delta_weight(kind).detach()
    factors[kind] = float((average * mean).sum() / (mean * mean).sum())
    print(f"{kind}: {factors[kind]:.2f} times the mean of the three checkpoints")
as_seen = {"linear": 3.0, "ties": 0.3, "svd": 1.0, "cat": 1.0}
if any(abs(factors[kind] - factor) > 0.03 for kind, factor in as_seen.items()):
    sys.exit("this has changed")
PYTHON

#!/usr/bin/env bash
# Merging a small LoRA adapter into bf16 weights does not add noise to it: it takes a part of the adapter away.
#
# Rounding is expected to be noise: the merged weight is W + BA, give or take half a unit in the last place. But W is exactly on
# bf16's grid, and the merged weight is rounded to the same grid. Where BA is less than half a unit of W, the result is W again, and
# only few entries move by a whole unit. Along the adapter's own direction, most of it is gone, in every module in the same
# way: the projection of (merged - W) onto BA, divided by BA's own, is 1 for noise. A larger adapter on the same weights keeps nearly all.
# So measuring the rounding of the base model in bf16 does not tell what a merge loses; merging in fp32 does not help either, if
# the result is stored in bf16.
#
# Seen with torch==2.13.0 (CPU), peft==0.21.2 and transformers==5.17.0, with an adapter as small as that of a short fine-tuning run.
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

SIZE, RANK = 576, 8


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.projection = torch.nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16)

    def forward(self, x):
        return self.projection(x)


def kept(ratio: float) -> float:
    """Return the part of an adapter that a merge keeps along its direction; its norm is `ratio` times the weight's."""
    torch.manual_seed(0)
    model = Model()
    torch.nn.init.normal_(model.projection.weight, std=0.1)
    weight = model.projection.weight.detach().float()
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["projection"], init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    layer = adapted.base_model.model.projection
    matrix = layer.lora_B["default"].weight
    with torch.no_grad():
        delta = layer.get_delta_weight("default").float()
        matrix.mul_(ratio * weight.norm() / delta.norm())
        delta = layer.get_delta_weight("default").float()
    change = adapted.merge_and_unload().projection.weight.detach().float() - weight
    return float((change * delta).sum() / (delta * delta).sum())


small, large = kept(0.0005), kept(0.05)
print(f"an adapter of 0.05% of the weight's norm: {small:.2f} of it is merged")
print(f"an adapter of 5% of the weight's norm: {large:.2f} of it is merged")
if not (0.2 < small < 0.5 and 0.99 < large < 1.01):
    sys.exit("this has changed")
PYTHON

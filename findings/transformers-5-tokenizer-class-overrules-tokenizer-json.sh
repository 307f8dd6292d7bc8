#!/usr/bin/env bash
# With transformers 5, the same tokenizer files tokenize otherwise in a directory than under their name on the Hub: all spaces are gone.
#
# tokenizer.json describes a tokenizer completely, and one expects AutoTokenizer to follow it, as transformers 4 and the
# tokenizers library do. transformers 5 does so for some classes only. For a class with a constructor of its own (LlamaTokenizer,
# Qwen2Tokenizer, GPT2Tokenizer, ...), it reads vocabulary and merges from the file, and builds the rest as the class does.
# Models exist whose tokenizer_class is not that of their vocabulary: DeepSeek's distillations into Llama 3 name LlamaTokenizerFast beside
# a byte-level vocabulary. transformers 5 knows them by a list of Hub names. A copy in a directory (a download, a bucket, a fine-tuned
# model) is not in the list: spaces and line ends are dropped without a warning, in training and in answers. Saving such a
# tokenizer writes the loss into tokenizer.json, where all engines read it.
#
# Seen with transformers==5.17.0 and tokenizers==0.23.3; transformers==4.57.6 follows the file in both places.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check transformers==5.17.0 tokenizers==0.23.3
HF_HUB_OFFLINE=1 HF_HUB_CACHE="$directory/hub" "$directory/venv/bin/python" - "$directory" <<'PYTHON'
import json
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

NAME = "deepseek-ai/deepseek-r1-distill-llama-8b"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = "The order of 1234567 costs 12 dollars.\n\nIt has 3 items."
directory = Path(sys.argv[1])

# A vocabulary and a tokenizer.json as those of Llama 3, in the directory that a download from the Hub has.
tokenizer = Tokenizer(models.BPE(ignore_merges=True))
split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
tokenizer.decoder = decoders.ByteLevel()
rows = [f"The order of {number} costs {number % 97} dollars.\n\nIt has {number % 7} items." for number in range(3000)]
trainer = trainers.BpeTrainer(
    vocab_size=800,
    special_tokens=["<s>", "</s>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
)
tokenizer.train_from_iterator(rows, trainer)
repository = directory / "hub" / f"models--{NAME.replace('/', '--')}"
files = repository / "snapshots" / ("0" * 40)
files.mkdir(parents=True)
(repository / "refs").mkdir()
(repository / "refs/main").write_text("0" * 40)
tokenizer.save(str(files / "tokenizer.json"))
(files / "config.json").write_text(json.dumps({"model_type": "llama"}))
config = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
(files / "tokenizer_config.json").write_text(json.dumps(config))


def roundtrip(source: str) -> str:
    loaded = AutoTokenizer.from_pretrained(source)
    ids = loaded(TEXT, add_special_tokens=False)["input_ids"]
    text = loaded.decode(ids)
    print(f"{type(loaded).__name__}: {len(ids)} tokens, {text.count(' ')} of {TEXT.count(' ')} spaces")
    return text


print("by the name on the Hub:")
by_name = roundtrip(NAME)
print("by the directory of the same files:")
by_directory = roundtrip(str(files))
AutoTokenizer.from_pretrained(str(files)).save_pretrained(directory / "saved")
saved = Tokenizer.from_file(str(directory / "saved/tokenizer.json"))
after = saved.decode(saved.encode(TEXT, add_special_tokens=False).ids)
print(f"tokenizers, after save_pretrained: {after.count(' ')} of {TEXT.count(' ')} spaces")
if by_name != TEXT or " " in by_directory or " " in after:
    sys.exit("this has changed")
PYTHON

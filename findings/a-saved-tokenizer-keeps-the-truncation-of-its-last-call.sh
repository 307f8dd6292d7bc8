#!/usr/bin/env bash
# A tokenizer that is saved after preparing a data set cuts every prompt of a server to the length of a training row.
#
# `truncation=True, max_length=64` is expected to be an option of one call. transformers sets it in the tokenizer of the tokenizers
# library, where it stays until a call that asks for something else, and save_pretrained() writes it into tokenizer.json. transformers
# does not notice, since each of its calls sets the option again. Programs that read tokenizer.json with the tokenizers library itself,
# as servers in Rust do, follow the file unless they reset it: they keep the beginning of a prompt and drop its end, which holds
# the question. padding="max_length" is saved as well, and fills each short prompt up. Whether the file is right depends on the
# last call before saving: one call without truncation, or preparing the rows in other processes (map with num_proc), and it is.
#
# Here, a prompt of 300 words is 64 tokens, and one of 3 words is 64 tokens, too.
#
# Seen with transformers==5.17.0 and tokenizers==0.23.3.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check transformers==5.17.0 tokenizers==0.23.3
"$directory/venv/bin/python" - "$directory" 2>/dev/null <<'PYTHON'
import sys

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

LONG, SHORT = "word " * 299 + "question", "a short question"
words = {word: number for number, word in enumerate(["<pad>", "<unk>", "word", "question", "a", "short"])}
backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


def saved(name: str) -> tuple[int, int, int]:
    """Return the lengths of the long prompt in transformers, and of both prompts in the tokenizers library."""
    path = f"{sys.argv[1]}/{name}"
    tokenizer.save_pretrained(path)
    file = Tokenizer.from_file(f"{path}/tokenizer.json")
    return len(AutoTokenizer.from_pretrained(path)(LONG).input_ids), len(file.encode(LONG)), len(file.encode(SHORT))


lengths = {"before": saved("before")}
rows = tokenizer([LONG, SHORT], truncation=True, max_length=64, padding="max_length")
lengths["after preparing rows"] = saved("after")
tokenizer(SHORT)
lengths["after one more call"] = saved("later")
for when, (transformers, long, short) in lengths.items():
    print(f"saved {when}: 300 words are {transformers} tokens in transformers, {long} in tokenizers; 3 words are {short} there")
if list(lengths.values()) != [(300, 300, 3), (300, 64, 64), (300, 300, 3)]:
    sys.exit("this has changed")
PYTHON

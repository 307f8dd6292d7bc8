#!/usr/bin/env bash
# In transformers 5, len(tokenizer.apply_chat_template(messages)) is 2 for every conversation.
#
# In transformers 4 it returned the token ids, and scripts filter rows by it: rows.filter(lambda row: len(...) <= 2048). Version 5
# returns a dictionary of input_ids and attention_mask instead, whose length is the number of its keys. No error is raised: every row
# passes the filter, a length histogram is one bar, a budget of tokens is never reached, and rows that should have been left out are
# truncated in training. `return_dict=False` gives the ids in both versions.
#
# Seen with transformers==5.17.0 beside transformers==4.57.1.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
cat >"$directory/measure.py" <<'PYTHON'
import sys

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

backend = Tokenizer(models.WordLevel({"[UNK]": 0, "word": 1}, unk_token="[UNK]"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
chats = [[{"role": "user", "content": "word " * words}] for words in (10, 1000, 5000)]
lengths = [len(tokenizer.apply_chat_template(chat)) for chat in chats]
ids = [len(tokenizer.apply_chat_template(chat, return_dict=False)) for chat in chats]
print(f"transformers {transformers.__version__}: {lengths}; with return_dict=False: {ids}")
if lengths != ([2, 2, 2] if sys.argv[1] == "5" else [10, 1000, 5000]) or ids != [10, 1000, 5000]:
    sys.exit("this has changed")
PYTHON
for pins in "5 transformers==5.17.0" "4 transformers==4.57.1"; do
  read -r name package <<<"$pins"
  python3 -m venv "$directory/$name"
  "$directory/$name/bin/pip" install -q --disable-pip-version-check "$package" jinja2==3.1.6
  "$directory/$name/bin/python" "$directory/measure.py" "$name" 2>/dev/null
done

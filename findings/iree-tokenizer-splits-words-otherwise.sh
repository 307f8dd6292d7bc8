#!/usr/bin/env bash
# A fast tokenizer that loads the same tokenizer.json gives common English words other token ids.
#
# iree-tokenizer reads a model's tokenizer.json and is several times as fast as the tokenizers library, so it is expected to give the
# same ids: byte-level BPE applies the merges of the file in their order, and nothing is left to choose. For some words it ends with
# other tokens, each of which is in the vocabulary and which spell the same word. A model that was trained with the ids of one library
# and is asked with those of the other sees words that it was never trained on, and nothing reports it: both decode to the same text.
#
# Here, a tokenizer is trained on Python's own documentation, and each word of that text is encoded by both libraries.
#
# Seen with iree-tokenizer==0.3.0 and tokenizers==0.23.3.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check iree-tokenizer==0.3.0 tokenizers==0.23.3
"$directory/venv/bin/python" <<'PYTHON'
import re
import sys
from pydoc_data.topics import topics

from iree.tokenizer import Tokenizer as IreeTokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

texts = list(topics.values())
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
alphabet = pre_tokenizers.ByteLevel.alphabet()
tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=4000, initial_alphabet=alphabet, show_progress=False))
iree = IreeTokenizer.from_str(tokenizer.to_str())

words = sorted({word for text in texts for word in re.findall("[a-z]+", text)})
ids = {word: (tokenizer.encode(word).ids, list(iree.encode(word))) for word in words}
different = [word for word in words if ids[word][0] != ids[word][1]]
print(f"{len(different)} of {len(words)} words have other ids")
for word in different[:8]:
    parts = [[tokenizer.id_to_token(number) for number in numbers] for numbers in ids[word]]
    print(f"{word}: tokenizers {parts[0]}, iree-tokenizer {parts[1]}")
if not different or any("".join(map(tokenizer.id_to_token, ids[word][1])) != word for word in different):
    sys.exit("this has changed")
PYTHON

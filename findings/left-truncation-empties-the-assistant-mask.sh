#!/usr/bin/env bash
# With truncation_side="left", apply_chat_template() returns an assistant mask of zeros for a conversation that is too long.
#
# A left-truncated conversation loses its beginning and keeps its last answers, and one expects the mask of these. For each answer,
# transformers asks for the token of its first character; for an answer that begins in the part that was cut away, there is
# none. It takes that for the end of the text ("maybe due to truncation") and stops, so all answers after it stay unmarked,
# the last one included. Such a row trains on nothing: its loss is 0 or NaN, or in a batch it just is not there. Exactly the
# longest conversations are lost. Truncation on the right is correct, and truncating ids and mask together is, too.
#
# Seen with transformers==5.17.0 and the template that trl==1.15.0 ships for training Qwen 3.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check transformers==5.17.0 tokenizers==0.23.3 jinja2==3.1.6
"$directory/venv/bin/pip" install -q --disable-pip-version-check --no-deps --target "$directory/trl" trl==1.15.0
"$directory/venv/bin/python" - "$directory/trl/trl/chat_templates/qwen3_training.jinja" <<'PYTHON'
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

bytes_alone = Tokenizer(models.BPE({byte: index for index, byte in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bytes_alone.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_alone, chat_template=Path(sys.argv[1]).read_text())
conversation = []
for turn in range(8):
    conversation.append({"role": "user", "content": f"How much is order {turn}?"})
    conversation.append({"role": "assistant", "content": f"Order {turn} costs {turn + 20} dollars."})


def masked(**settings):
    result = tokenizer.apply_chat_template(conversation, return_assistant_tokens_mask=True, return_dict=True, **settings)
    return result["assistant_masks"]


complete = masked()
first = complete.index(1)
rows = {"left": {}, "right": {}}
for removed in (first - 5, first + 5, first + 100, first + 200):
    for side in rows:
        tokenizer.truncation_side = side
        found = sum(masked(truncation=True, max_length=len(complete) - removed))
        expected = sum(complete[removed:] if side == "left" else complete[:-removed])
        rows[side][removed] = (found, expected)
        print(f"{removed:3} of {len(complete)} tokens cut on the {side}: {found:3} of {expected} tokens of answers are marked")
found = [pair[0] for pair in rows["left"].values()]
if any(a != b for a, b in rows["right"].values()) or found[0] == 0 or any(found[1:]):
    sys.exit("this has changed")
PYTHON

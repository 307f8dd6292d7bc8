#!/usr/bin/env bash
# Dataset.to_json writes other numbers than the data set holds, as soon as one row of a batch has none.
#
# A column of integers with a null is int64 in Arrow, and Dataset[0] returns 3. to_json goes through pandas, which has no null for
# integers: 3 becomes 3.0, and an id above 2**53 another id, in every row of the batch. This reaches fields inside lists of
# messages and tool calls, where a null means only that another row's tool has no such argument. A model that is fine-tuned on the
# file learns to call with 3.0. Dataset.to_parquet, and json.dumps of each row, write what is there.
#
# Seen with datasets==4.8.5 and pandas==2.3.3.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check datasets==4.8.5 pandas==2.3.3
HF_HUB_OFFLINE=1 "$directory/venv/bin/python" - "$directory" 2>/dev/null <<'PYTHON'
import json
import sys

from datasets import Dataset

rows = [
    {"calls": [{"name": "sell", "arguments": {"shares": 3, "order": 9007199254740993}}]},
    {"calls": [{"name": "cancel", "arguments": {"shares": None, "order": None}}]},
]
data = Dataset.from_list(rows)
data.to_json(f"{sys.argv[1]}/both.jsonl")
data.select([0]).to_json(f"{sys.argv[1]}/first.jsonl")


def arguments(file: str) -> str:
    with open(f"{sys.argv[1]}/{file}") as lines:
        return json.dumps(json.loads(lines.readline())["calls"][0]["arguments"])


print("in the data set:            ", json.dumps(data[0]["calls"][0]["arguments"]))
print("written alone:              ", arguments("first.jsonl"))
print("written with a row of nulls:", arguments("both.jsonl"))
held = {"shares": 3, "order": 9007199254740993}
changed = '{"shares": 3.0, "order": 9007199254740992.0}'
if data[0]["calls"][0]["arguments"] != held or arguments("both.jsonl") != changed or json.loads(arguments("first.jsonl")) != held:
    sys.exit("this has changed")
PYTHON

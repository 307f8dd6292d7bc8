#!/usr/bin/env bash
# Dataset.map() drops a new column, with all its values, if the first row does not have it.
#
# A function that returns {"tools": ...} for rows with tools, and {} for others, is expected to give a column with None where nothing was
# returned, as load_dataset("json") does for a missing key, or an error. It depends: the columns are those
# of the first row. If it has the key and a later row does not, map() raises KeyError. If it lacks the key, the key is left
# out of all later rows: no error, no warning, and as many rows as before. So whether a data set keeps its tools, weights
# or reasoning depends on which row shuffling puts first, and code that passed once loses a column the next time. The same
# holds for Dataset.from_generator (for from_list, it is documented). Inside a column, keys of later rows are kept.
#
# Seen with datasets==4.8.5 and pyarrow==26.0.1.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check datasets==4.8.5 pyarrow==26.0.1
HF_DATASETS_CACHE="$directory/cache" HF_DATASETS_DISABLE_PROGRESS_BARS=1 HF_HUB_OFFLINE=1 "$directory/venv/bin/python" - "$directory" <<'PYTHON'
import json
import sys
from pathlib import Path

from datasets import Dataset, load_dataset


def prepare(row: dict) -> dict:
    return {"tools": ["search"]} if row["uses_tools"] else {}


def with_tools(make) -> int | str:
    try:
        return sum(bool(row.get("tools")) for row in make())
    except Exception as error:  # KeyError of map(), wrapped by from_generator()
        return type(error.__cause__ or error).__name__


counts = {}
for name, first in (("a row without tools", False), ("a row with tools", True)):
    rows = [{"uses_tools": first}] + [{"uses_tools": number % 2 == 0} for number in range(2000)]
    prepared = [row | prepare(row) for row in rows]
    file = Path(sys.argv[1]) / f"{first}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in prepared))
    counts[name] = {
        "in Python": with_tools(lambda: prepared),
        "map": with_tools(lambda: Dataset.from_list(rows).map(prepare)),
        "from_generator": with_tools(lambda: Dataset.from_generator(lambda rows: iter(rows), gen_kwargs={"rows": prepared})),
        "load_dataset": with_tools(lambda: load_dataset("json", data_files=str(file), split="train")),
    }
    print(f"rows with tools if {name} comes first: {counts[name]}")
without, expected = counts["a row without tools"], counts["a row with tools"]
if list(without.values()) != [1000, 0, 0, 1000] or list(expected.values()) != [1001, "KeyError", "KeyError", 1001]:
    sys.exit("this has changed")
PYTHON

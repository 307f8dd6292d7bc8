#!/usr/bin/env bash
# load_dataset("csv") returns no answer for rows whose answer is None, NA, null or nan.
#
# A column of text is expected to hold the text of the file. pandas reads these words as missing values, quoted or not, and the
# column keeps its type, so nothing warns: a class named None, the country code NA (Namibia) and "What does SQL return?" -> null lose
# their label. Trainers then fail far away, drop the row, or train the text "None" of str(None) for all of them alike.
# load_dataset("csv", ..., keep_default_na=False) keeps the text.
#
# Seen with datasets==4.8.5 and pandas==2.3.3.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check datasets==4.8.5 pandas==2.3.3
cat >"$directory/rows.csv" <<'CSV'
prompt,completion
Which of the tags apply?,"None"
The country code of Namibia?,"NA"
What does an empty cell return?,"null"
Is it about money?,"yes"
CSV
HF_HUB_OFFLINE=1 "$directory/venv/bin/python" - "$directory" 2>/dev/null <<'PYTHON'
import sys

from datasets import load_dataset


def answers(**settings) -> list[str | None]:
    source = {"data_files": f"{sys.argv[1]}/rows.csv", "cache_dir": f"{sys.argv[1]}/cache"}
    return list(load_dataset("csv", split="train", **source, **settings)["completion"])


print("as it is:              ", answers())
print("keep_default_na=False: ", answers(keep_default_na=False))
if answers() != [None, None, None, "yes"] or answers(keep_default_na=False) != ["None", "NA", "null", "yes"]:
    sys.exit("this has changed")
PYTHON

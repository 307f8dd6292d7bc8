#!/usr/bin/env bash
# Dataset.map() returns rows of your old preprocessing after you edited it, if the function is in a module of its own.
#
# The cache of map() is keyed by a fingerprint of the function, and one expects an edited function to run again. It does
# in the script that calls map() and in notebooks. But functions of an imported module are pickled by reference, as `prepare.tokenize`: the
# fingerprint is that of the name, not of the code, and the same holds for each function that yours calls. So moving
# preprocessing out of the training script into a module makes its edits invisible: the next run trains on the rows that the
# old code made. Nothing is logged; the number of rows is the same. The same holds for an upgrade of a package that has the function.
#
# Seen with datasets==4.8.5 and dill==0.4.1.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check datasets==4.8.5 dill==0.4.1
cd "$directory"
echo '{"text": "two words"}' >rows.jsonl
cat >train.py <<'PYTHON'
import datasets
import prepare

rows = datasets.load_dataset("json", data_files="rows.jsonl", split="train", cache_dir="cache")
results = {
    "imported": rows.map(prepare.tokenize),
    "calls an imported one": rows.map(lambda row: prepare.tokenize(row)),
    "in the script": rows.map(lambda row: {"tokens": OWN}),
}
print({name: mapped[0]["tokens"] for name, mapped in results.items()})
PYTHON

run() { # the body of the functions
  echo "def tokenize(row): return {'tokens': $1}" >prepare.py
  sed "s/OWN/$1/" train.py >run.py
  PYTHONDONTWRITEBYTECODE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 HF_HUB_OFFLINE=1 venv/bin/python run.py
}
before=$(run "row['text'].split()")
after=$(run "list(row['text'])[:3]")
echo "before the edit: $before"
echo "after the edit:  $after"
words="['two', 'words']" letters="['t', 'w', 'o']"
[ "$before" = "{'imported': $words, 'calls an imported one': $words, 'in the script': $words}" ]
[ "$after" = "{'imported': $words, 'calls an imported one': $words, 'in the script': $letters}" ]

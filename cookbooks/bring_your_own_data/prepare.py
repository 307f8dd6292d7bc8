"""Upload unconverted rows to the embedded bucket: a CSV with custom column names, ShareGPT chats, and invalid rows.

    python cookbooks/bring_your_own_data/prepare.py

It uses the quickstart's model: run `make quickstart` first.
"""

import csv
import gzip
import io
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cookbooks.quickstart.word_problems import TRAIN_KINDS, VALID_KINDS, Problem, draw
from utils.storage.bucket import open_store
from utils.storage.embedded_bucket import embedded_bucket

HOME = "s3://anneal/bring_your_own_data"
TABLE_ROWS, CHAT_ROWS, VALID_ROWS = 96, 48, 24


def write_table(kinds: list[Callable[[random.Random], Problem]], count: int, seed: int) -> str:
    """Return a CSV with `count` questions and replies, under custom column names."""
    return _csv(list(draw(kinds, count, random.Random(seed))))


def write_mistakes(table: str) -> str:
    """Return the CSV with two invalid rows and one duplicate row added."""
    rows = list(csv.reader(io.StringIO(table)))[1:]
    return _csv([*rows, ("Who bought the apples?", ""), ("", "Nobody did."), rows[0]])


def write_chats(kinds: list[Callable[[random.Random], Problem]], count: int, seed: int) -> str:
    """Return `count` JSONL chats in ShareGPT format."""
    return "".join(
        json.dumps(
            {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
        )
        + "\n"
        for question, answer in draw(kinds, count, random.Random(seed))
    )


def _csv(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("Question", "Reply"))
    writer.writerows(rows)
    return text.getvalue()


def main() -> None:
    """Upload the files."""
    files = {
        "questions.csv": write_mistakes(write_table(TRAIN_KINDS, TABLE_ROWS, 1)).encode(),
        "chats/2026-10.jsonl.gz": gzip.compress(write_chats(TRAIN_KINDS, CHAT_ROWS, 3).encode(), mtime=0),
        "valid.csv": write_table(VALID_KINDS, VALID_ROWS, 2).encode(),
    }
    with embedded_bucket():
        store = open_store(HOME)
        for name, content in files.items():
            store.write(name, content)
    print(f"bring_your_own_data: stored the rows in {HOME}", file=sys.stderr)


if __name__ == "__main__":
    main()

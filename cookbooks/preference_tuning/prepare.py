"""Upload generated preference pairs to the embedded bucket: word problems with a worked answer and a bare result.

    python cookbooks/preference_tuning/prepare.py

It uses the quickstart's model: run `make quickstart` first.
"""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cookbooks.quickstart.prepare import put_rows
from cookbooks.quickstart.word_problems import TRAIN_KINDS, VALID_KINDS, Problem, draw

HOME = "s3://anneal/preference_tuning"
TRAIN_ROWS, VALID_ROWS = 128, 32


def write_pairs(kinds: list[Callable[[random.Random], Problem]], count: int, seed: int) -> str:
    """Return `count` JSONL pairs, cycling through the kinds. The chosen answer shows its steps, the rejected one does not."""
    generator = random.Random(seed)
    rows = []
    for question, worked in draw(kinds, count, generator):
        result = worked.rpartition("#### ")[2]
        bare = generator.choice([f"It is {result}.", f"The answer is {result}.", f"{result}"])
        pair = {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": worked}],
            "rejected": [{"role": "assistant", "content": bare}],
        }
        rows.append(json.dumps(pair) + "\n")
    return "".join(rows)


def main() -> None:
    """Upload the pairs."""
    put_rows(
        HOME,
        train=write_pairs(TRAIN_KINDS, TRAIN_ROWS, 1),
        valid=write_pairs(VALID_KINDS, VALID_ROWS, 2),
    )
    print(f"preference_tuning: stored the pairs in {HOME}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Upload generated plain text to the embedded bucket: word problems with their answers, without roles.

    python cookbooks/causal_lm/prepare.py

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

HOME = "s3://anneal/causal_lm"
TRAIN_ROWS, VALID_ROWS = 512, 64


def write_texts(kinds: list[Callable[[random.Random], Problem]], count: int, seed: int) -> str:
    """Return `count` JSONL rows of text, cycling through the kinds."""
    problems = draw(kinds, count, random.Random(seed))
    return "".join(json.dumps({"text": "\n".join(problem)}) + "\n" for problem in problems)


def main() -> None:
    """Upload the texts."""
    put_rows(
        HOME,
        train=write_texts(TRAIN_KINDS, TRAIN_ROWS, 1),
        valid=write_texts(VALID_KINDS, VALID_ROWS, 2),
    )
    print(f"causal_lm: stored the texts in {HOME}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Fill the embedded bucket with made-up rows to classify: what a word problem is about.

    python cookbooks/classification/prepare.py

The model is the quickstart's: `make quickstart` brings it.
"""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cookbooks.quickstart import word_problems
from cookbooks.quickstart.prepare import put_rows
from cookbooks.quickstart.word_problems import Problem, draw

HOME = "s3://anneal/classification"
TRAIN_ROWS, VALID_ROWS = 240, 60
TOPICS = {
    "money": [word_problems.buying, word_problems.change, word_problems.saving],
    "things": [
        word_problems.giving_away,
        word_problems.collecting,
        word_problems.sharing,
        word_problems.shelves,
    ],
    "distance": [word_problems.walking],
}


def write_topics(count: int, seed: int) -> str:
    """`count` rows of JSONL chat whose answer is the topic, the topics taking turns."""
    rows = []
    for question, topic in draw([_asking(topic) for topic in TOPICS], count, random.Random(seed)):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": topic}]
        rows.append(json.dumps({"messages": messages}) + "\n")
    return "".join(rows)


def _asking(topic: str) -> Callable[[random.Random], Problem]:
    """Questions about a topic, answered with its name."""
    return lambda generator: (generator.choice(TOPICS[topic])(generator)[0], topic)


def main() -> None:
    """Put the rows into the bucket."""
    rows = write_topics(TRAIN_ROWS + VALID_ROWS, 1).splitlines(keepends=True)
    put_rows(HOME, train="".join(rows[:TRAIN_ROWS]), valid="".join(rows[TRAIN_ROWS:]))
    print(f"classification: the rows lie in {HOME}", file=sys.stderr)


if __name__ == "__main__":
    main()

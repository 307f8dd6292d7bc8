"""Upload generated rows for classification to the embedded bucket: the topic of a word problem.

    python cookbooks/classification/prepare.py

It uses the quickstart's model: run `make quickstart` first.
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
    """Return `count` JSONL rows of chat messages with the topic as answer, cycling through the topics."""
    rows = []
    for question, topic in draw([_asking(topic) for topic in TOPICS], count, random.Random(seed)):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": topic}]
        rows.append(json.dumps({"messages": messages}) + "\n")
    return "".join(rows)


def _asking(topic: str) -> Callable[[random.Random], Problem]:
    """Return a generator of questions about a topic, with the topic's name as answer."""
    return lambda generator: (generator.choice(TOPICS[topic])(generator)[0], topic)


def main() -> None:
    """Upload the rows."""
    rows = write_topics(TRAIN_ROWS + VALID_ROWS, 1).splitlines(keepends=True)
    put_rows(HOME, train="".join(rows[:TRAIN_ROWS]), valid="".join(rows[TRAIN_ROWS:]))
    print(f"classification: stored the rows in {HOME}", file=sys.stderr)


if __name__ == "__main__":
    main()

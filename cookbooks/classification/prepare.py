"""Fill the embedded bucket with made-up rows to classify: what a word problem is about.

    python cookbooks/classification/prepare.py

The model is the quickstart's: `make quickstart` brings it.
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cookbooks.quickstart import word_problems
from cookbooks.quickstart.prepare import put_rows

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
    generator = random.Random(seed)
    rows = []
    for index in range(count):
        topic = list(TOPICS)[index % len(TOPICS)]
        question, _ = generator.choice(TOPICS[topic])(generator)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": topic}]
        rows.append(json.dumps({"messages": messages}))
    return "\n".join(rows) + "\n"


def main() -> None:
    """Put the rows into the bucket."""
    put_rows(HOME, train=write_topics(TRAIN_ROWS, 1), valid=write_topics(VALID_ROWS, 2))
    print(f"classification: the rows lie in {HOME}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Upload generated long rows to the embedded bucket: notes about many people, and a question about one of them.

    python cookbooks/long_context/prepare.py

It uses the quickstart's model: run `make quickstart` first.
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cookbooks.quickstart.prepare import put_rows

HOME = "s3://anneal/long_context"
TRAIN_ROWS, VALID_ROWS, NOTES = 48, 8, 60

_FIRST = ["Ada", "Ben", "Chloe", "Dmitri", "Elif", "Femi", "Grace", "Hugo", "Ines", "Jonas"]
_LAST = ["Abara", "Berg", "Costa", "Dubois", "Eriksen", "Fuchs", "Garcia", "Horvat", "Ito", "Jansen"]
_THINGS = [
    "a red bicycle",
    "two cats",
    "a telescope",
    "an old piano",
    "a rowing boat",
    "a beehive",
    "a kiln",
    "a map",
]
_PLACES = ["by the harbour", "in the old town", "near the station", "on the hill", "behind the market"]


def write_notes(count: int, seed: int, *, notes: int = NOTES) -> str:
    """Return `count` JSONL rows of chat messages. One of the `notes` notes in a row answers its question."""
    generator = random.Random(seed)
    people = [f"{first} {last}" for first in _FIRST for last in _LAST]
    rows = []
    for _ in range(count):
        known = {
            person: (generator.choice(_THINGS), generator.choice(_PLACES), generator.randint(18, 90))
            for person in generator.sample(people, notes)
        }
        lines = [
            f"{person} is {age}, lives {place} and owns {thing}."
            for person, (thing, place, age) in known.items()
        ]
        asked = generator.choice(list(known))
        thing, place, _ = known[asked]
        question = "\n".join([*lines, f"Where does {asked} live, and what does {asked} own?"])
        answer = f"{asked} lives {place} and owns {thing}."
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": messages}) + "\n")
    return "".join(rows)


def main() -> None:
    """Upload the rows."""
    put_rows(HOME, train=write_notes(TRAIN_ROWS, 1), valid=write_notes(VALID_ROWS, 2))
    print(f"long_context: stored the rows in {HOME}", file=sys.stderr)


if __name__ == "__main__":
    main()

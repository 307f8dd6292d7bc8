"""Files with random damage are prepared or rejected with a location, never with a traceback."""

import os
import random
import re
from pathlib import Path
from typing import get_args

import pytest
from transformers import AutoTokenizer

from tests.support.bad_files import write_bad_file
from tests.support.prepared import prepare, request, rows_of
from training.data.errors import DataError
from training.data.records import Task
from training.data.row_index import IGNORED

FILES = int(os.environ.get("FUZZ_FILES", "500"))
SHARDS = 10


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_damaged_file_is_prepared_or_rejected_with_its_location(tiny_model: Path, tmp_path: Path, shard: int):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tasks: tuple[Task, ...] = get_args(Task)
    outcomes = {"prepared": 0, "rejected": 0}
    for number in range(shard, FILES, SHARDS):
        path = write_bad_file(tmp_path, number)
        rng = random.Random(number)
        data = request(
            path,
            task=rng.choice(tasks),
            bad_rows=rng.choice(["error", "skip"]),
            long_rows=rng.choice(["truncate", "drop", "error"]),
            labels=("4", "naïve"),
            context_length=64,
        )
        try:
            prepared = prepare(data, tokenizer, tiny_model, tmp_path / "cache")
        except DataError as error:
            outcomes["rejected"] += 1
            assert str(path) in str(error), f"file {number}: no location in {error}"
            if "rows cannot be trained on" in str(error):
                assert re.search(rf"{re.escape(str(path))}:\d+: \S", str(error)), (
                    f"file {number}: no row in {error}"
                )
        else:
            outcomes["prepared"] += 1
            for row in rows_of(prepared):
                assert 0 < row["length"] <= 64, f"file {number}"
                labels = row["labels"][1:] if "labels" in row else row["chosen_ids"] and row["rejected_ids"]
                assert any(label != IGNORED for label in labels), f"file {number}: a row without loss tokens"
        path.unlink()
    assert all(outcomes.values()), outcomes

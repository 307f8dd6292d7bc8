"""Measure the speed and the memory of tokenization.

`make bench-data` prepares 40 MB of chats and compares with datasets.map with two processes. Both read the same JSONL,
render it with the same chat template and encode it with the same tokenizer. Anneal also validates every row, finds the
loss tokens and detects duplicate rows. Both do the same with chats of 200,000 different words, since Anneal tokenizes a word
once. It then prepares a million short rows. Rounds are interleaved, each in its own processes, and the token ids of all rows
are compared. `make bench-data-memory` prepares one file of 5 GB.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import psutil

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from benchmarks.report import rounds_parser, spread, write_report
from cookbooks.quickstart import prepare as quickstart
from training.models.files import is_tokenizer_file
from utils.storage.bucket import sync_to_node
from utils.storage.embedded_bucket import embedded_bucket

_SAMPLING_SECONDS = 0.25
_SAMPLE = (
    "How many apples does she have left after giving seven of them to her brother? Größe über naïve café — 数据训练 "
    "The model reads a row, answers the question, and is trained on what it should have said. 🍎 x = 3 * (4 + 5)\n"
)


_VOCABULARY = 200_000
_SYLLABLES = [
    f"{first}{vowel}{last}"
    for first in "bcdfghlmnprstvw"
    for vowel in "aeiou"
    for last in ("", "n", "r", "s", "t")
]


def main() -> None:
    parser = rounds_parser(__doc__)
    parser.add_argument("--megabytes", type=float, default=40, help="size of the chats")
    parser.add_argument("--short-rows", type=int, default=1_000_000)
    parser.add_argument("--gigabytes", type=float, help="only prepare one file of this size")
    parser.add_argument("--one", nargs=4, metavar=("HOW", "ROWS", "MODEL", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        method, rows, model, out = options.one
        METHODS[method](Path(rows), Path(model), Path(out))
        return
    quickstart.main()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        with embedded_bucket():
            model = sync_to_node(f"{quickstart.HOME}/smollm2-135m", directory, is_tokenizer_file)
        if options.gigabytes:
            measure_memory(directory, model, options.gigabytes)
        else:
            measure_speed(directory, model, options)


def measure_speed(directory: Path, model: Path, options: argparse.Namespace) -> None:
    """Measure rounds of both sets of chats with both methods, and of short rows with Anneal."""
    size = int(options.megabytes * 1e6)
    files = {
        "few_words": write_chats(directory / "few_words.jsonl", size),
        "many_words": write_chats(directory / "many_words.jsonl", size, *many_words()),
        "short": write_short_rows(directory / "short.jsonl", options.short_rows),
    }
    contestants = [("ours", "few_words"), ("map", "few_words"), ("ours", "many_words"), ("map", "many_words")]
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(options.rounds):
        contests = [*contestants, ("short", "short")][:: 1 if number % 2 else -1]
        rounds.append(
            {
                f"{method}_{rows}": measure(
                    method, files[rows], model, directory / f"{method}-{rows}-{number}"
                )
                for method, rows in contests
            }
        )
        print(rounds[-1], flush=True)
    last = options.rounds - 1

    def ratio(rows: str, seconds: str) -> dict[str, float]:
        return spread(
            [round_[f"map_{rows}"][seconds] / round_[f"ours_{rows}"]["seconds"] for round_ in rounds]
        )

    write_report(
        "data",
        {
            "map_to_ours": ratio("few_words", "seconds"),
            "map_alone_to_ours": ratio("few_words", "map_alone_seconds"),
            "map_to_ours_many_words": ratio("many_words", "seconds"),
            "ours_seconds": spread([round_["ours_few_words"]["seconds"] for round_ in rounds]),
            "short_rows_seconds": spread([round_["short_short"]["seconds"] for round_ in rounds]),
        },
        rounds,
        {
            "megabytes": options.megabytes,
            "short_rows": options.short_rows,
            "rows_with_other_ids": sum(
                count_different_rows(directory / f"ours-{rows}-{last}", directory / f"map-{rows}-{last}")
                for rows in ("few_words", "many_words")
            ),
            **{
                f"{name}_peak_mb": max(round_[name]["peak_mb"] for round_ in rounds)
                for name in sorted(rounds[0])
            },
        },
    )


def measure_memory(directory: Path, model: Path, gigabytes: float) -> None:
    """Measure the preparation of one large file with Anneal."""
    chunk = write_chats(directory / "piece.jsonl", int(min(40e6, gigabytes * 1e9 / 10)))
    rows = directory / "large.jsonl"
    with rows.open("wb") as file:
        number = 0
        while file.tell() < gigabytes * 1e9:
            number += 1  # makes all rows different
            file.write(chunk.read_bytes().replace(b'"content": "', b'"content": "%d ' % number))
    chunk.unlink()
    measured = measure("short", rows, model, directory / "large")
    write_report("data_memory", {}, [measured], {"gigabytes": rows.stat().st_size / 1e9, **measured})


def many_words() -> tuple[list[str], list[float]]:
    """Return words and how often each occurs, cumulated: as in natural text, in inverse proportion to its rank."""
    rng = random.Random(2)
    words = ["".join(rng.choices(_SYLLABLES, k=rng.choice((1, 1, 2, 2, 3, 4)))) for _ in range(_VOCABULARY)]
    written = [rng.choices((word, f"{word},", f"{word}.", word.title()), (16, 2, 1, 1))[0] for word in words]
    return written, list(accumulate(1 / (rank + 3) for rank in range(_VOCABULARY)))


def write_chats(
    path: Path, size: int, words: Sequence[str] = _SAMPLE.split(" "), weights: Sequence[float] | None = None
) -> Path:
    """Write chats of one to three turns with words from a sample, until the file has `size` bytes.

    Args:
        path: The file.
        size: Its size in bytes.
        words: The words.
        weights: How often each word occurs, cumulated; None: equally often.
    """
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            messages = []
            for _ in range(rng.randint(1, 3)):
                for role, longest in (("user", 60), ("assistant", 120)):
                    text = " ".join(rng.choices(words, cum_weights=weights, k=rng.randint(5, longest)))
                    messages.append({"role": role, "content": text})
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return path


def write_short_rows(path: Path, count: int) -> Path:
    """Write rows with one question and one answer."""
    rng, words = random.Random(1), _SAMPLE.split(" ")
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            question = f"{number}: {' '.join(rng.choices(words, k=8))}"
            answer = " ".join(rng.choices(words, k=8))
            file.write(json.dumps({"prompt": question, "completion": answer}, ensure_ascii=False) + "\n")
    return path


def measure(method: str, rows: Path, model: Path, out: Path) -> dict[str, float]:
    """Return the report of a separate process, and the peak memory (PSS) of it and all its children."""
    environment = os.environ | {"HF_HOME": str(out / "home"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, __file__, "--one", method, str(rows), str(model), str(out)]
    with (Path(f"{out}.stdout")).open("w+") as output:
        process = subprocess.Popen(command, env=environment, stdout=output)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _memory_of(process.pid))
            time.sleep(_SAMPLING_SECONDS)
        if process.returncode:
            raise SystemExit(f"{method} failed with exit code {process.returncode}")
        output.seek(0)
        return json.loads(output.readlines()[-1]) | {"peak_mb": round(peak / 1e6)}


def _memory_of(pid: int) -> int:
    total = 0
    try:
        for process in (main := psutil.Process(pid), *main.children(recursive=True)):
            total += process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0  # a process exited during the measurement
    return total


def prepare_and_save(rows: Path, model: Path, out: Path) -> None:
    prepare_rows(rows, model, out).dataset().select_columns(["input_ids"]).save_to_disk(str(out / "ids"))


def prepare_rows(rows: Path, model: Path, out: Path) -> Any:
    from tests.support.prepared import request
    from training.data.prepare import prepare_data
    from training.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model, trust_remote_code=False, chat_template=None)
    start = time.monotonic()
    prepared = prepare_data(request(rows), tokenizer, model, out)
    print(json.dumps({"seconds": time.monotonic() - start, "rows": prepared.summary.rows}))
    return prepared


def map_rows(rows: Path, model: Path, out: Path) -> None:
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    start = time.monotonic()
    dataset = load_dataset("json", data_files=str(rows), split="train")
    loaded = time.monotonic()

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
        return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}

    encoded = dataset.map(encode, batched=True, num_proc=2, remove_columns=dataset.column_names)  # pyright: ignore
    end = time.monotonic()
    print(json.dumps({"seconds": end - start, "map_alone_seconds": end - loaded, "rows": len(encoded)}))  # pyright: ignore
    encoded.save_to_disk(str(out / "ids"))


METHODS = {"ours": prepare_and_save, "map": map_rows, "short": prepare_rows}


def count_different_rows(prepared: Path, mapped: Path) -> int:
    """Return the number of rows whose ids differ."""
    from datasets import load_from_disk

    loaded = [load_from_disk(str(path / "ids")) for path in (prepared, mapped)]
    if len(loaded[0]) != len(loaded[1]):
        return abs(len(loaded[0]) - len(loaded[1]))
    return sum(a["input_ids"] != b["input_ids"] for a, b in zip(*loaded, strict=True))  # pyright: ignore


if __name__ == "__main__":
    main()

"""How fast rows become tokens: `make bench-data` prepares 40 MB of chats, and lets datasets.map do it with two processes.

Both read the same JSONL, lay it out by the same chat template and encode it with the same tokenizer; ours also checks every
row, finds what is trained on and looks for repeated rows. Rounds are interleaved, each in processes of their own, and
every row's ids are compared. Then a million short rows are checked once.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from benchmarks.report import spread, write_report
from cookbooks.quickstart import prepare as quickstart
from training.models.files import is_tokenizer_file
from utils.bucket import sync_to_node
from utils.embedded_bucket import embedded_bucket

MEGABYTES = 40
SHORT_ROWS = 1_000_000
_SAMPLE = (
    "How many apples does she have left after giving seven of them to her brother? Größe über naïve café — 数据训练 "
    "The model reads a row, answers the question, and is trained on what it should have said. 🍎 x = 3 * (4 + 5)\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", nargs=4, metavar=("HOW", "ROWS", "MODEL", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        how, rows, model, out = options.one
        HOWS[how](Path(rows), Path(model), Path(out))
        return
    quickstart.main()
    measured: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        with embedded_bucket():
            model = sync_to_node(f"{quickstart.HOME}/smollm2-135m", directory, is_tokenizer_file)
        rows = write_chats(directory / "chats.jsonl", MEGABYTES * 1_000_000)
        for number in range(options.rounds):
            order = list(HOWS)[:: 1 if number % 2 else -1]
            round_ = {how: measure(how, rows, model, directory / f"{how}-{number}") for how in order}
            measured.append(round_)
            print(round_, flush=True)
        differing = compare(directory / f"ours-{options.rounds - 1}", directory / f"map-{options.rounds - 1}")
        assert differing == 0, f"{differing} rows have other ids"
        short = write_short_rows(directory / "short.jsonl", SHORT_ROWS)
        million = measure("ours", short, model, directory / "short")
        print(f"{SHORT_ROWS:,} short rows: {million}", flush=True)
    write_report(
        "data",
        {
            "map_to_ours_seconds": spread(
                [round_["map"]["seconds"] / round_["ours"]["seconds"] for round_ in measured]
            ),
            "ours_seconds": spread([round_["ours"]["seconds"] for round_ in measured]),
            "million_short_rows_seconds": spread([million["seconds"]]),
            "million_short_rows_peak_mb": spread([million["peak_mb"]]),
        },
        [*measured, {"short": million}],
    )


def write_chats(path: Path, size: int) -> Path:
    """Chats of one to three turns whose words are drawn from a sample, until the file has `size` bytes."""
    chance, words = random.Random(0), _SAMPLE.split(" ")
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            messages = []
            for _ in range(chance.randint(1, 3)):
                messages.append(
                    {"role": "user", "content": " ".join(chance.choices(words, k=chance.randint(5, 60)))}
                )
                messages.append(
                    {
                        "role": "assistant",
                        "content": " ".join(chance.choices(words, k=chance.randint(5, 120))),
                    }
                )
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return path


def write_short_rows(path: Path, count: int) -> Path:
    """One question and one answer a row."""
    chance, words = random.Random(1), _SAMPLE.split(" ")
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            question = f"{number}: {' '.join(chance.choices(words, k=8))}"
            answer = " ".join(chance.choices(words, k=8))
            file.write(json.dumps({"prompt": question, "completion": answer}, ensure_ascii=False) + "\n")
    return path


def measure(how: str, rows: Path, model: Path, out: Path) -> dict[str, float]:
    """Seconds from open file to tokens on disk, and the peak memory of the process that leads."""
    environment = os.environ | {"HF_HOME": str(out / "home"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, __file__, "--one", how, str(rows), str(model), str(out)]
    finished = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(finished.stdout.splitlines()[-1])


def tell(began: float) -> None:
    """The figures as the process's last line."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": round(time.monotonic() - began, 3), "peak_mb": round(peak)}))


def ours(rows: Path, model: Path, out: Path) -> None:
    from tests.support.prepared import request
    from training.data.prepare import prepare_data
    from training.plan import load_tokenizer

    tokenizer = load_tokenizer(model, trust_remote_code=False, chat_template=None)
    began = time.monotonic()
    prepared = prepare_data(request(rows), tokenizer, model, out)
    tell(began)
    prepared.dataset().select_columns(["input_ids"]).save_to_disk(str(out / "ids"))


def by_map(rows: Path, model: Path, out: Path) -> None:
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    began = time.monotonic()
    dataset = load_dataset("json", data_files=str(rows), split="train")

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
        return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}

    encoded = dataset.map(encode, batched=True, num_proc=2, remove_columns=dataset.column_names)  # pyright: ignore
    tell(began)
    encoded.save_to_disk(str(out / "ids"))


HOWS = {"ours": ours, "map": by_map}


def compare(ours: Path, by_map: Path) -> int:
    """Rows whose ids differ."""
    from datasets import load_from_disk

    both = [load_from_disk(str(path / "ids")) for path in (ours, by_map)]
    if len(both[0]) != len(both[1]):
        return abs(len(both[0]) - len(both[1]))
    return sum(a["input_ids"] != b["input_ids"] for a, b in zip(*both, strict=True))  # pyright: ignore


if __name__ == "__main__":
    main()

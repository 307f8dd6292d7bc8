"""Measure the memory of a node's workers: `make bench-memory BASE=DIRECTORY` prints the ratio to an earlier version.

- `lora`: four workers on CPU train a model of 1.3 GB with DDP and LoRA. The figure is the peak of the sum of their PSS, which counts a
  page that n processes share as 1/n in each. Each round runs both checkouts, in alternating order; the ratio is taken within a round.
- `zero_3`: four workers load the model for full-parameter training with ZeRO-3. The figure is the sum of what the PSS of each had at
  its peak beyond the PSS after loading, divided by the model's size. It needs no earlier version.
"""

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from benchmarks.report import rounds_parser, spread, write_report
from tests.support.tiny_model import make_tokenizer, write_data
from tests.support.zero3_loading import loading_memory

WORKERS, STEPS = 4, 2
SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
_SECONDS_BETWEEN_SAMPLES = 0.2


def main() -> None:
    parser = rounds_parser(__doc__)
    parser.add_argument("--base", type=Path, help="directory of the other checkout, for lora")
    parser.add_argument("--part", choices=("lora", "zero_3"), action="append", help="default: both")
    options = parser.parse_args()
    parts = options.part or ["lora", "zero_3"]
    if "lora" in parts and options.base is None:
        parser.error("--base is missing")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        directory = Path(temporary)
        make_files(directory)
        if "lora" in parts:
            compare({"now": PROJECT, "before": options.base.resolve()}, directory, options.rounds)
        if "zero_3" in parts:
            measure_loading(directory, options.rounds)


def compare(checkouts: dict[str, Path], directory: Path, rounds: int) -> None:
    """Run LoRA with both checkouts, and write the report."""
    measured: list[dict[str, Any]] = []
    for number in range(rounds):
        order = list(checkouts) if number % 2 else list(reversed(checkouts))
        measured.append(
            {"order": order} | {name: run(checkouts[name], directory, f"{name}-{number}") for name in order}
        )
        print(json.dumps(measured[-1]), flush=True)
    assert len({str(round_[name]["losses"]) for round_ in measured for name in checkouts}) == 1
    ratios = [round_["now"]["peak_bytes"] / round_["before"]["peak_bytes"] for round_ in measured]
    write_report("node_memory", {"pss_of_workers_ratio": spread(ratios)}, measured)


def measure_loading(directory: Path, rounds: int) -> None:
    """Load the model with ZeRO-3, and write the report."""
    size = sum(path.stat().st_size for path in (directory / "model").glob("*.safetensors"))
    measured: list[dict[str, Any]] = []
    for _ in range(rounds):
        ranks = loading_memory(directory / "model", directory, workers=WORKERS, dtype="fp32")
        measured.append({"model_bytes": size, "ranks": [asdict(rank) for rank in ranks]})
        print(json.dumps(measured[-1]), flush=True)
    ratios = [sum(rank["proportional"] for rank in each["ranks"]) / size for each in measured]
    write_report("node_memory_zero_3", {"loading_to_model_size": spread(ratios)}, measured)


def make_files(directory: Path, max_shard_size: str = "50GB") -> None:
    """Write a model of 1.3 GB with random weights, in files of at most a size, and rows."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(directory / "model")
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **SHAPE))
    model.save_pretrained(directory / "model", max_shard_size=max_shard_size)
    size = sum(parameter.nbytes for parameter in model.parameters())
    print(f"model: {size / 1e9:.2f} GB in {next(model.parameters()).dtype}")
    assert 1.2e9 < size < 1.4e9
    write_data(directory, train_rows=WORKERS * STEPS)


def run(checkout: Path, directory: Path, name: str) -> dict[str, Any]:
    """Run main.py of a checkout; return the peak of its workers' PSS in bytes, and the losses."""
    settings = {
        "model_id": str(directory / "model"),
        "train_path": str(directory / "train.jsonl"),
        "storage_path": str(directory / "runs"),
        "output_dir": str(directory / "scratch"),
        "run_name": name,
        "device": "cpu",
        "dtype": "fp32",
        "num_devices": WORKERS,
        "train_batch_size_per_device": 1,
        "max_steps": STEPS,
        "gradient_checkpointing": False,
        "lora_config": {"r": 8},
    }
    config = directory / f"{name}.yaml"
    config.write_text(yaml.safe_dump(settings))
    with subprocess.Popen(
        [sys.executable, str(checkout / "main.py"), str(config), "--json"],
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        peak = _Peak(lambda: _pss_of_workers(process.pid))
        output, _ = process.communicate()
        peak.stop()
    assert process.returncode == 0, output
    lines = (directory / "runs" / name / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert len(losses) == STEPS
    return {"peak_bytes": peak.value, "losses": losses}


class _Peak:
    """The highest value of a figure that a thread samples until `stop`."""

    def __init__(self, sample: Callable[[], int]):
        self.value = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=[sample])
        self._thread.start()

    def _run(self, sample: Callable[[], int]) -> None:
        while not self._stopped.wait(_SECONDS_BETWEEN_SAMPLES):
            self.value = max(self.value, sample())

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


def _pss_of_workers(driver: int) -> int:
    total = 0
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(driver).children(recursive=True):
            with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                    total += next(
                        int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:")
                    )
    return total


if __name__ == "__main__":
    main()

"""Measure the memory of a node's LoRA workers: `make bench-memory BASE=DIRECTORY` prints the ratio to an earlier version.

Four workers on CPU train a model of 1.3 GB with DDP. The figure is the peak of the sum of their PSS, which counts a page that n
processes share as 1/n in each. Each round runs both checkouts, in alternating order; the ratio is taken within a round.
"""

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from benchmarks.report import rounds_parser, spread, write_report
from tests.support.tiny_model import make_tokenizer, write_data

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
    parser.add_argument("--base", type=Path, required=True, help="directory of the other checkout")
    arguments = parser.parse_args()
    checkouts = {"now": PROJECT, "before": arguments.base.resolve()}
    measured: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        directory = Path(temporary)
        make_files(directory)
        for number in range(arguments.rounds):
            order = list(checkouts) if number % 2 else list(reversed(checkouts))
            measured.append(
                {"order": order}
                | {name: run(checkouts[name], directory, f"{name}-{number}") for name in order}
            )
            print(json.dumps(measured[-1]), flush=True)
    assert len({str(round_[name]["losses"]) for round_ in measured for name in checkouts}) == 1
    ratios = [round_["now"]["peak_bytes"] / round_["before"]["peak_bytes"] for round_ in measured]
    write_report("node_memory", {"pss_of_workers_ratio": spread(ratios)}, measured)


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

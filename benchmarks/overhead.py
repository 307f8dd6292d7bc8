"""Measure tokens/s against plain TRL under torchrun, with the same model, rows and settings, on 2 processes: `make bench-overhead`.

Each round runs both one after the other, in alternating order; the ratio is taken within a round.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from benchmarks.report import rounds_parser, spread, write_report
from cookbooks.quickstart import prepare
from cookbooks.quickstart.word_problems import TRAIN_KINDS, write_problems
from utils.storage.bucket import sync_to_node
from utils.storage.embedded_bucket import embedded_bucket

STEPS, BATCH_SIZE, WORKERS = 12, 4, 2
LEARNING_RATE = 5e-4


def main() -> None:
    rounds = rounds_parser(__doc__).parse_args().rounds
    prepare.main()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        with embedded_bucket():
            model = sync_to_node(f"{prepare.HOME}/smollm2-135m", directory / "model")
        rows = directory / "train.jsonl"
        rows.write_text(write_problems(TRAIN_KINDS, STEPS * BATCH_SIZE * WORKERS, 1))
        contestants = {"anneal": run_anneal, "torchrun_trl": run_torchrun}
        measured: list[dict[str, Any]] = []
        for number in range(rounds):
            order = list(contestants)[:: (-1) ** number]
            measured.append(
                {"order": order} | {name: contestants[name](directory, model, rows) for name in order}
            )
            print(json.dumps(measured[-1]), flush=True)
    ratios = [r["anneal"]["tokens_per_second"] / r["torchrun_trl"]["tokens_per_second"] for r in measured]
    write_report("overhead", {"tokens_per_second_ratio": spread(ratios)}, measured)


def write_config(
    directory: Path, model: Path, rows: Path, workers: int, steps: int, dtype: str
) -> tuple[Path, str]:
    """Write the YAML of a LoRA run without evaluation, as the peers have none; return (YAML, run name)."""
    name = f"run-{time.time_ns()}"
    config = directory / f"{name}.yaml"
    settings = {
        "model_id": str(model),
        "train_path": str(rows),
        "storage_path": str(directory / "runs"),
        "output_dir": str(directory / name),
        "run_name": name,
        "device": "cpu",
        "num_devices": workers,
        "train_batch_size_per_device": BATCH_SIZE,
        "dtype": dtype,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "linear",
        "gradient_checkpointing": False,
        "lora_config": {"r": 8, "lora_alpha": 16},
        "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": steps},
    }
    config.write_text(yaml.safe_dump(settings))
    return config, name


def run_anneal(directory: Path, model: Path, rows: Path) -> dict[str, float]:
    """Run main.py as a user would, including all checks."""
    config, _ = write_config(directory, model, rows, WORKERS, STEPS, "bf16")
    command = [sys.executable, "main.py", str(config), "--json"]
    done = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["status"] == "completed", result
    return {"tokens": result["tokens"], "tokens_per_second": result["tokens_per_second"]}


def run_torchrun(directory: Path, model: Path, rows: Path) -> dict[str, float]:
    """Run plain TRL on two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORKERS}"]
    return run_peer(launcher, [], directory, model, rows, STEPS, "bf16")


def run_peer(
    launcher: list[str], options: list[str], directory: Path, model: Path, rows: Path, steps: int, dtype: str
) -> dict[str, float]:
    """Run benchmarks/plain_trl.py with a launcher and options."""
    name = f"peer-{time.time_ns()}"
    report, settings_file = directory / f"{name}.report.json", directory / f"{name}.json"
    settings = {
        "began": time.time(),
        "model": str(model),
        "train_path": str(rows),
        "output_dir": str(directory / name),
        "batch_size": BATCH_SIZE,
        "dtype": dtype,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "report": str(report),
    }
    settings_file.write_text(json.dumps(settings))
    # A new cache, because Anneal also tokenizes in each round.
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_DATASETS_CACHE": str(directory / name / "cache"),
    }
    script = str(PROJECT / "benchmarks" / "plain_trl.py")
    subprocess.run(
        [*launcher, script, str(settings_file), *options], env=environment, check=True, capture_output=True
    )
    measured = json.loads(report.read_text())
    if steps > 1:
        measured["tokens_per_second"] = measured["tokens"] / measured["training_seconds"]
    return measured


if __name__ == "__main__":
    main()

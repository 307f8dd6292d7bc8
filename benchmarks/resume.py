"""Measure the time to the first new step of a resumed run against a fresh run: `make bench-resume`.

Each round starts a new run in a bucket, kills it with all its child processes after its second checkpoint, and reruns the
same command. The ratio is taken within a round, for LoRA and for full-parameter training. Model and rows are cached on
the node in both cases. There is no evaluation, which only a fresh start would run.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from benchmarks.report import rounds_parser, spread, write_report
from cookbooks.quickstart import prepare
from utils.storage.bucket import open_store
from utils.storage.embedded_bucket import embedded_bucket

KILL_AFTER, STEPS = 2, 4
RUNS = "s3://anneal/benchmark-runs"
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora_config": {"r": 8, "lora_alpha": 16}, "learning_rate": 5e-4},
    "full": {"learning_rate": 1e-5},
}


def main() -> None:
    rounds = rounds_parser(__doc__).parse_args().rounds
    prepare.main()
    measured: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary, embedded_bucket():
        directory = Path(temporary)
        for method in METHODS:
            measure(directory, method, STEPS)  # fill the node cache with the model and the rows
        for _ in range(rounds):
            measured.append({method: measure(directory, method, KILL_AFTER) for method in METHODS})
            print(measured[-1], flush=True)
    ratios = {
        method: [round_[method]["again_seconds"] / round_[method]["fresh_seconds"] for round_ in measured]
        for method in METHODS
    }
    write_report(
        "resume", {f"{method}_again_to_fresh": spread(values) for method, values in ratios.items()}, measured
    )


def measure(directory: Path, method: str, kill_after: int) -> dict[str, float]:
    """Return the seconds to the first step of a fresh run, and of the same run resumed after a kill."""
    name = f"{method}-{time.time_ns()}"
    config = directory / f"{name}.yaml"
    settings = {
        "model_id": f"{prepare.HOME}/smollm2-135m",
        "train_path": f"{prepare.HOME}/train.jsonl",
        "storage_path": RUNS,
        "output_dir": str(directory / "scratch"),
        "run_name": name,
        "device": "cpu",
        "num_devices": 2,
        "train_batch_size_per_device": 4,
        "max_steps": STEPS,
        "gradient_checkpointing": False,
        "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 1},
    }
    config.write_text(yaml.safe_dump(settings | METHODS[method]))
    fresh = first_step(config, 1, f"step-{kill_after:06d}")
    resumed = first_step(config, kill_after + 1, None) if kill_after < STEPS else fresh
    run = open_store(f"{RUNS}/{name}")
    run.delete([stored.key for stored in run.list()])
    return {"fresh_seconds": fresh, "again_seconds": resumed}


def first_step(config: Path, step: int, kill_after: str | None) -> float:
    """Return the seconds until main.py has done a step; then let it finish, or kill it after the given checkpoint."""
    start, seconds = time.time(), 0.0
    process = subprocess.Popen(
        [sys.executable, "main.py", str(config), "--json"],
        cwd=PROJECT,
        env=dict(os.environ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if not seconds and (match := re.match(r"step (\d+)/", line)):
            assert int(match[1]) == step, line
            seconds = time.time() - start
        if kill_after and kill_after in line:
            kill_all(process)
            return seconds
    assert process.wait() == 0
    return seconds


def kill_all(process: "subprocess.Popen[str]") -> None:
    """Send SIGKILL to a process and all its descendants."""
    main = psutil.Process(process.pid)
    processes = [main, *main.children(recursive=True)]
    for target in processes:
        target.kill()
    process.wait()
    psutil.wait_procs(processes[1:], timeout=30)


if __name__ == "__main__":
    main()

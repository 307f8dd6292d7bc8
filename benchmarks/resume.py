"""What it costs to come back: `make bench-resume` prints the time to the first new step, sent again against started afresh.

Each round starts a run of a new name in a bucket, kills it with everything it has started behind its second checkpoint,
and sends the same command again; the ratio is taken within a round, for LoRA and for full-parameter training. Model and
rows lie on the node already, in both; no evaluation, which only a fresh start would pay for.
"""

import argparse
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

from benchmarks.report import spread, write_report
from cookbooks.quickstart import prepare
from utils.bucket import open_store
from utils.embedded_bucket import embedded_bucket

KILLED_BEHIND, STEPS = 2, 4
RUNS = "s3://anneal/benchmark-runs"
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora_config": {"r": 8, "lora_alpha": 16}, "learning_rate": 5e-4},
    "full": {"learning_rate": 1e-5},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    prepare.main()
    measured: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary, embedded_bucket():
        directory = Path(temporary)
        for kind in KINDS:
            measure(directory, kind, STEPS)  # brings the model and the rows to the node
        for _ in range(rounds):
            measured.append({kind: measure(directory, kind, KILLED_BEHIND) for kind in KINDS})
            print(measured[-1], flush=True)
    ratios = {
        kind: [round_[kind]["again_seconds"] / round_[kind]["fresh_seconds"] for round_ in measured]
        for kind in KINDS
    }
    write_report(
        "resume", {f"{kind}_again_to_fresh": spread(values) for kind, values in ratios.items()}, measured
    )


def measure(directory: Path, kind: str, kill_behind: int) -> dict[str, float]:
    """Seconds to the first step of a fresh run, and of the same run sent again after it was killed."""
    name = f"{kind}-{time.time_ns()}"
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
    config.write_text(yaml.safe_dump(settings | KINDS[kind]))
    fresh = first_step(config, 1, f"step-{kill_behind:06d}")
    again = first_step(config, kill_behind + 1, None) if kill_behind < STEPS else fresh
    left = open_store(f"{RUNS}/{name}")
    left.delete([stored.key for stored in left.list()])
    return {"fresh_seconds": fresh, "again_seconds": again}


def first_step(config: Path, step: int, kill_behind: str | None) -> float:
    """Seconds until main.py has taken a step; then it ends by itself, or is killed when a checkpoint is committed."""
    began, taken = time.time(), 0.0
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
        if not taken and (found := re.match(r"step (\d+)/", line)):
            assert int(found[1]) == step, line
            taken = time.time() - began
        if kill_behind and kill_behind in line:
            kill_all(process)
            return taken
    assert process.wait() == 0
    return taken


def kill_all(process: "subprocess.Popen[str]") -> None:
    """SIGKILL for a process and all that it has started."""
    main = psutil.Process(process.pid)
    family = [main, *main.children(recursive=True)]
    for member in family:
        member.kill()
    process.wait()
    psutil.wait_procs(family[1:], timeout=30)


if __name__ == "__main__":
    main()

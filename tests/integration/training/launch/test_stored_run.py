"""A run that an earlier version started resumes with the current code and ends with the same weights."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from runs.layout import checkpoint_key
from tests.support.jobs import PROJECT, read_metrics, started

STORED = PROJECT / "tests" / "data" / "run_of_before"
EXPECTED = json.loads((STORED / "expected.json").read_text())
RUN = Path("runs", "stored")
"""Path of the run in its home directory: `storage_path: runs`, `run_name: stored`."""


@pytest.mark.slow
def test_run_of_an_earlier_version_resumes_to_the_same_weights(tmp_path: Path):
    home = tmp_path / "home"
    shutil.copytree(STORED, home)

    with started(home / "run.yaml", within=_on_two_cpus_in(home)) as job:
        finished = job.end()

    assert finished.exit_code == 0, finished.errors
    assert finished.result["train_steps"] == EXPECTED["steps"]
    assert _stored_steps(home) == _stored_steps(STORED), "the run restarted from step 0"
    assert _losses(home / RUN) == [
        [step, name, pytest.approx(loss, abs=1e-5)] for step, name, loss in EXPECTED["losses"]
    ]
    # Other CPU types round differently, so the weights are bit-identical only on the recorded type.
    if _cpu() == EXPECTED["cpu"]:
        weights = home / RUN / checkpoint_key(EXPECTED["steps"], "adapter_model.safetensors")
        assert hashlib.sha256(weights.read_bytes()).hexdigest() == EXPECTED["adapter_sha256"]


def _cpu() -> str:
    """Return the CPU's vendor and the vector extensions that torch uses; they determine the CPU kernels."""
    vendor = re.search(r"^vendor_id\s*: (\S+)", Path("/proc/cpuinfo").read_text(), re.M)
    return f"{vendor[1] if vendor else 'unknown'} {torch.backends.cpu.get_cpu_capability()}"


def _on_two_cpus_in(home: Path) -> list[str]:
    """Return a command prefix that runs in `home`, because paths in the YAML are relative, on two CPUs as the recorded run did."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    return ["env", f"--chdir={home}", "taskset", "--cpu-list", ",".join(map(str, cpus))]


def _stored_steps(home: Path) -> list[dict[str, object]]:
    """Return the metrics up to the stored checkpoint; their timings are unique to the stored run."""
    return [line for line in read_metrics(home / RUN) if line["step"] <= EXPECTED["stored_step"]]


def _losses(run: Path) -> list[list[object]]:
    return [
        [line["step"], name, line[name]]
        for line in read_metrics(run)
        for name in ("loss", "eval_loss")
        if name in line
    ]

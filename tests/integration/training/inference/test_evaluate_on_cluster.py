"""Tests of main.py evaluate on a cluster: other work holds its resources, and its GCS is killed."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.grids import only_in_test_nodes
from tests.support.jobs import PROJECT, environment
from tests.support.messages import assert_names
from tests.support.ray_cluster import held_cpu, ray_cluster
from tests.support.tiny_model import write_data
from tests.support.trained_runs import store_full_run
from utils.storage.bucket import open_store

pytestmark = pytest.mark.slow


def _wait_for(file: Path, text: str) -> None:
    deadline = time.monotonic() + 100
    while text not in file.read_text():
        assert time.monotonic() < deadline, file.read_text()
        time.sleep(0.5)


@only_in_test_nodes
def test_evaluation_names_what_it_waits_for_and_a_lost_cluster(tiny_model: Path, tmp_path: Path):
    write_data(tmp_path, train_rows=4, valid_rows=4)
    run = store_full_run(
        open_store(str(tmp_path / "runs")), "run", tiny_model, output_dir=str(tmp_path / "scratch")
    )
    command = [
        sys.executable,
        "main.py",
        "evaluate",
        run,
        "--data",
        str(tmp_path / "valid.jsonl"),
        "--match",
        "text",
    ]
    errors = tmp_path / "errors.txt"
    with ray_cluster(cpus=1) as cluster, held_cpu(cluster), errors.open("w") as stderr:
        evaluation = subprocess.Popen(
            [*command, "--device", "cpu", "--max-new-tokens", "8"],
            cwd=PROJECT,
            env=environment() | cluster.variables,
            stderr=stderr,
        )
        try:
            _wait_for(errors, "waiting until other work")
            cluster.kill_head("gcs_server")
            exit_code = evaluation.wait(90)
        finally:
            evaluation.kill()
            evaluation.wait()
    written = errors.read_text()
    assert re.search(r"CPU 1 \(has 1, free 0\), since \d\d:\d\d:\d\d$", written, re.MULTILINE), written
    assert exit_code == 1, written
    assert "Traceback" not in written
    (line,) = [line for line in written.splitlines() if "error: " in line]
    assert_names(line, "the GCS at", "gcs_server.out")

"""benchmarks/gpu.py with shapes that two CPU cores train: every part runs, and its figures land in the table.

`make test-kernels` runs it (ALL_KERNELS=1).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import PARTS
from tests.support.jobs import PROJECT, environment


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.mark.skipif(not os.environ.get("ALL_KERNELS"), reason="`make test-kernels` runs it")
@pytest.mark.parametrize("part", PARTS)
def test_a_part_runs_and_is_shown(part: str, directory: Path):
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--tiny", "--part", part, "--results", str(directory)],
        cwd=PROJECT,
        env=environment()
        | {"TMPDIR": str(directory), "RAY_TMPDIR": "/tmp"},  # Ray's sockets want short paths
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (round_,) = json.loads((directory / f"gpu_{part}.json").read_text())["rounds"]
    for contestant in round_["order"]:
        assert round_[contestant]["step_seconds"] > 0
        assert round_[contestant]["losses"]
    shown = [line for line in done.stdout.splitlines() if line.startswith(f"| {part} ")]
    # No MFU on CPU, and Liger's kernels need a GPU.
    expected = [name for name in PARTS[part].targets if name != "MFU" and not name.startswith("liger")]
    assert [
        name for name in expected if any(name in line and "not measured" not in line for line in shown)
    ] == expected

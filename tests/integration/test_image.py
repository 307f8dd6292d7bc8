"""Tests of the image without Docker: its installation into an empty directory, its health check and its entry point.

`make test` covers the entry point, `make test-image` all of it (TEST_IMAGE=1). The base image and the apt packages are not tested.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from main import build_parser
from tests.support.grids import only_in_test_image
from tests.support.jobs import PROJECT

DOCKERFILE = (PROJECT / "Dockerfile").read_text("utf-8").replace("\\\n", "")
ENTRYPOINT = json.loads(re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.M)[-1])


def run_entrypoint(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the entry point with these arguments, as the container does."""
    environment = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    return subprocess.run(
        [*ENTRYPOINT, *arguments], cwd=PROJECT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", [name for name in build_parser()[1] if name != "train"])
def test_entrypoint_passes_commands_of_main_to_main(command: str):
    done = run_entrypoint(Path(sys.executable), command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: main.py {command}")


def test_entrypoint_runs_any_other_command_unchanged():
    assert run_entrypoint(Path(sys.executable), "echo", "ray").stdout == "ray\n"


@only_in_test_image
def test_built_environment_passes_the_health_check_and_runs_commands(tmp_path: Path):
    (install,) = [step for step in re.findall(r"^RUN (.*)$", DOCKERFILE, re.M) if "-m venv" in step]
    shell = json.loads(re.findall(r"^SHELL (.*)$", DOCKERFILE, re.M)[0])
    script = install.replace("python3 -m venv", f"{sys.executable} -m venv").replace(
        "/opt/venv", f"{tmp_path}/venv"
    )
    subprocess.run(
        [*shell, script], cwd=PROJECT, env=os.environ | {"UNSLOTH": "0", "TRACKERS": "0"}, check=True
    )

    python = tmp_path / "venv" / "bin" / "python"
    health = json.loads(re.findall(r"^HEALTHCHECK .*CMD (.*)$", DOCKERFILE, re.M)[0])
    subprocess.run([python, *health[1:]], check=True)
    assert run_entrypoint(python, "--help").stdout.startswith("usage: main.py CONFIG.yaml")
    assert run_entrypoint(python, "ray", "--version").stdout.startswith("ray, version ")

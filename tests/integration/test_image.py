"""The image's own steps, where there is no Docker: its installation into a clean directory, its health check, its entry point.

`make test` looks at the entry point, `make test-image` does the rest (TEST_IMAGE=1). The base and what apt brings are not tried.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from runs import commands as run_commands
from tests.support.jobs import PROJECT
from training.inference import commands as model_commands

DOCKERFILE = (PROJECT / "Dockerfile").read_text("utf-8").replace("\\\n", "")
ENTRYPOINT = json.loads(re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.M)[-1])


def started(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What the container would do with these arguments."""
    environment = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    return subprocess.run(
        [*ENTRYPOINT, *arguments], cwd=PROJECT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("command", [*run_commands.COMMANDS, *model_commands.COMMANDS])
def test_commands_of_main_are_told_from_others(command: str):
    done = started(Path(sys.executable), command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: main.py {command}")


def test_any_other_command_runs_as_it_stands():
    assert started(Path(sys.executable), "echo", "ray").stdout == "ray\n"


@pytest.mark.skipif(not os.environ.get("TEST_IMAGE"), reason="`make test-image` runs it")
def test_what_the_build_installs_works(tmp_path: Path):
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
    assert started(python, "--help").stdout.startswith("usage: main.py CONFIG.yaml")
    assert started(python, "ray", "--version").stdout.startswith("ray, version ")

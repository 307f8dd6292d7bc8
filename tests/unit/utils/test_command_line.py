"""The command lines that messages print work from the directory of whoever reads them."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.jobs import PROJECT
from utils.command_line import COMMAND_VARIABLE, main_command, main_line, ray_command


@pytest.mark.parametrize("directory", [PROJECT, PROJECT / "docs", Path("/")])
def test_printed_command_runs_from_the_current_directory(directory: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(directory)
    done = subprocess.run(shlex.split(main_line("--help")), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "main.py CONFIG.yaml" in done.stdout


def test_printed_paths_are_relative_where_that_is_shorter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(PROJECT)
    assert main_command("runs", "my dir")[1:] == ["main.py", "runs", "my dir"]
    monkeypatch.chdir(PROJECT / "docs")
    assert main_command()[1:] == ["../main.py"]
    monkeypatch.chdir("/dev/shm")
    assert Path(main_command()[1]) == PROJECT / "main.py"


def test_submitted_job_prints_commands_for_the_machine_that_submitted_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(COMMAND_VARIABLE, json.dumps(["python", "../main.py", "run.yaml", "--submit", "URL"]))
    assert main_line("chat", "s3://b/run") == "python ../main.py chat s3://b/run"


def test_ray_command_belongs_to_the_environment_of_this_python(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir("/")
    program, *arguments = ray_command("job", "logs")
    assert Path("/", program) == Path(sys.executable).with_name("ray")
    assert arguments == ["job", "logs"]

"""Test of the commands that README.md and docs/ show: a real model is trained with the embedded bucket."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from runs import commands as run_records
from tests.support.front_door import run_command_quickly, run_main_quickly
from tests.support.jobs import PROJECT, command, environment
from tests.support.shown_commands import QUICKSTART, QUICKSTART_README, quickstart_commands, run_commands
from training.inference import commands as model_commands
from utils.storage.bucket import open_store
from utils.storage.embedded_bucket import STATE_VARIABLE, embedded_bucket

YAML = Path(QUICKSTART)
COOKBOOK = QUICKSTART_README.read_text("utf-8")
COMMANDS = (*run_records.COMMANDS, *model_commands.COMMANDS)
REJECTED = {"stop": "nothing to stop", "remove": "--yes"}
"""What the commands that change a run say of this one: it is completed, and its removal is not confirmed."""
COPY_SNIPPET = textwrap.dedent(COOKBOOK.partition("python -c '")[2].partition("'\n")[0])
"""The first snippet of Python in the quickstart's README, which copies a checkpoint out of the embedded bucket."""
SHORT_COMMANDS = [("runs", "s3://anneal/runs"), ("show", "run:NAME")]
"""Shown commands that take seconds."""
GIGABYTE = 10**9

pytestmark = pytest.mark.timeout(900)


class ProcessTreeMemory:
    """A monitor of the peak memory of a process and its descendants, which counts shared pages once (PSS)."""

    def __init__(self, pid: int):
        self.peak_bytes = 0
        self._root = psutil.Process(pid)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(2):
            total = 0
            try:
                tree = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in tree:
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.ZombieProcess):
                    continue
            self.peak_bytes = max(self.peak_bytes, total)

    def stop(self) -> int:
        self._ended.set()
        self._thread.join()
        return self.peak_bytes


@dataclass(frozen=True)
class Trained:
    """A shortened run of the quickstart."""

    variables: dict[str, str]
    """Environment with a bucket of its own."""
    directory: Path
    result: dict[str, Any]
    peak_bytes: int
    """Peak memory of all its processes."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train a quarter of the quickstart's steps, with half of its validation rows."""
    directory = tmp_path_factory.mktemp("quickstart")
    variables = environment() | {
        STATE_VARIABLE: str(directory / "bucket"),
        "XDG_CACHE_HOME": str(directory / "cache"),
    }
    prepared = subprocess.run(
        [sys.executable, "cookbooks/quickstart/prepare.py"],
        cwd=PROJECT,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert prepared.returncode == 0, prepared.stderr
    process = subprocess.Popen(
        command(YAML, "max_steps=8", "max_valid_rows=16", "--json"),
        cwd=PROJECT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    memory = ProcessTreeMemory(process.pid)
    output, errors = process.communicate()
    peak = memory.stop()
    assert process.returncode == 0, errors
    return Trained(variables, directory, json.loads(output.splitlines()[-1]), peak)


def test_quickstart_lowers_the_eval_loss(trained: Trained):
    """The eval loss falls on problem types that the training data does not contain, in less than 8 GB of memory."""
    result = trained.result
    first, last = result["eval_losses"][0]["eval_loss"], result["eval_losses"][-1]["eval_loss"]
    print(
        f"\neval loss {first:.4f} -> {last:.4f}, {result['elapsed_seconds']:.0f} s, {trained.peak_bytes / GIGABYTE:.2f} GB"
    )
    assert last < 0.85 * first
    assert 0 < trained.peak_bytes < 8 * GIGABYTE
    assert all(Path(log).exists() for log in result["log_files"])
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(STATE_VARIABLE, trained.variables[STATE_VARIABLE])
        with embedded_bucket():
            files = {item.key for item in open_store(result["run_uri"]).list()}
    assert {"config.yaml", "metrics.jsonl", "result.json", "eval_loss.png", "report.html"} <= files
    for shown in SHORT_COMMANDS:
        _run_shown(shown, trained)
    assert not _remaining_processes(trained.directory), "processes of the run are still alive"


@pytest.mark.slow
def test_shown_commands_work(trained: Trained, tmp_path: Path):
    result, variables = trained.result, trained.variables
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(STATE_VARIABLE, variables[STATE_VARIABLE])
        with embedded_bucket():
            run, other = open_store(result["run_uri"]), open_store(f"{result['run_uri']}-other")
            for item in run.list():
                if not item.key.startswith("checkpoints/"):
                    other.write(item.key, run.read(item.key))
    for shown in quickstart_commands():
        checked = shown if "--print-config" in shown else (*shown, "--dry-run")
        yaml = Path(shutil.copy(PROJECT / checked[0], tmp_path))
        finished = run_main_quickly(yaml, *dict.fromkeys(checked[1:]), variables=variables)
        assert finished.exit_code == 0, (shown, finished.errors)
    shown_run_commands = run_commands(COMMANDS)
    assert {shown[0] for shown in shown_run_commands} == set(COMMANDS)
    for shown in shown_run_commands:
        _run_shown(shown, trained)
    copied = subprocess.run(
        [
            sys.executable,
            "-c",
            COPY_SNIPPET.replace("<run name>", result["run_name"])
            .replace("step-000032", result["last_checkpoint"].rpartition("/")[2])
            .replace("downloads", str(tmp_path / "downloads")),
        ],
        cwd=PROJECT,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert copied.returncode == 0, copied.stderr
    assert (Path(copied.stdout.strip()) / "adapter_model.safetensors").exists()


def _run_shown(shown: tuple[str, ...], trained: Trained) -> None:
    """Run a command that a page shows, on the trained run."""
    name, directory = trained.result["run_name"], trained.directory
    substitutes = {"both.png": str(directory / "both.png"), "exported": str(directory / "exported")}
    substitutes |= {"s3://my-bucket/loras": "s3://anneal/loras"}
    substitutes |= {"run:NAME": f"run:{name}", "run:OTHER": f"run:{name}-other"}
    substitutes["64"] = "4"  # tokens per answer: 64 take minutes on two cores
    arguments = [substitutes.get(argument, argument) for argument in shown]
    finished = run_command_quickly(arguments, directory / "shown.txt", variables=trained.variables)
    if shown[0] in REJECTED:
        assert (finished.exit_code, REJECTED[shown[0]] in finished.errors) == (2, True), finished.errors
        return
    assert finished.exit_code == 0, (shown, finished.errors)
    assert finished.output.strip() if shown[0] == "chat" else name in finished.output


def _remaining_processes(directory: Path) -> list[str]:
    """Return the command lines that contain the directory; the processes get a minute to exit."""
    for _ in range(300):
        lines = []
        for process in psutil.process_iter():
            try:
                line = " ".join(process.cmdline())
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            if str(directory) in line and process.pid != os.getpid():
                lines.append(line)
        if not lines:
            return []
        threading.Event().wait(0.2)
    return lines

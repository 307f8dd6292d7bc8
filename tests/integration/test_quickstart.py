"""Test of the commands that README.md and docs/ show: a real model is trained with the embedded bucket."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

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
GIGABYTE = 10**9


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


@pytest.mark.timeout(900)
def test_quickstart_lowers_the_eval_loss_and_shown_commands_work(tmp_path: Path):
    """The eval loss falls on problem types that the training data does not contain, in less than 8 GB of memory."""
    variables = environment() | {
        STATE_VARIABLE: str(tmp_path / "bucket"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
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
        # A quarter of the quickstart's steps and half of its validation rows.
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
    result = json.loads(output.splitlines()[-1])
    first, last = result["eval_losses"][0]["eval_loss"], result["eval_losses"][-1]["eval_loss"]
    print(
        f"\neval loss {first:.4f} -> {last:.4f}, {result['elapsed_seconds']:.0f} s, {peak / GIGABYTE:.2f} GB"
    )
    assert last < 0.85 * first
    assert 0 < peak < 8 * GIGABYTE
    assert all(Path(log).exists() for log in result["log_files"])

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(STATE_VARIABLE, variables[STATE_VARIABLE])
        with embedded_bucket():
            run = open_store(result["run_uri"])
            files = {item.key for item in run.list()}
            other = open_store(f"{result['run_uri']}-other")
            for file in files:
                if not file.startswith("checkpoints/"):
                    other.write(file, run.read(file))
    assert {"config.yaml", "metrics.jsonl", "result.json", "eval_loss.png", "report.html"} <= files

    for shown in quickstart_commands():
        checked = shown if "--print-config" in shown else (*shown, "--dry-run")
        yaml = Path(shutil.copy(PROJECT / checked[0], tmp_path))
        finished = run_main_quickly(yaml, *dict.fromkeys(checked[1:]), variables=variables)
        assert finished.exit_code == 0, (shown, finished.errors)
    shown_run_commands = run_commands(COMMANDS)
    assert {shown[0] for shown in shown_run_commands} == set(COMMANDS)
    substitutes = {"both.png": str(tmp_path / "both.png"), "exported": str(tmp_path / "exported")}
    substitutes["s3://my-bucket/loras"] = "s3://anneal/loras"
    substitutes |= {"run:NAME": f"run:{result['run_name']}", "run:OTHER": f"run:{result['run_name']}-other"}
    substitutes["64"] = "4"  # tokens per answer: 64 take minutes on two cores
    for shown in shown_run_commands:
        arguments = [substitutes.get(argument, argument) for argument in shown]
        finished = run_command_quickly(arguments, tmp_path / "shown.txt", variables=variables)
        if shown[0] in REJECTED:
            assert (finished.exit_code, REJECTED[shown[0]] in finished.errors) == (2, True), finished.errors
            continue
        assert finished.exit_code == 0, (shown, finished.errors)
        assert finished.output.strip() if shown[0] == "chat" else result["run_name"] in finished.output
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
    assert not _remaining_processes(tmp_path), "processes of the run are still alive"


def _remaining_processes(directory: Path) -> list[str]:
    """Return the command lines that contain the directory; the processes get 10 seconds to exit."""
    for _ in range(50):
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

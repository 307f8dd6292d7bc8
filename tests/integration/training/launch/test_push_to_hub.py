"""Runs that push their result to a Hub on this machine, also after a failure or a kill, and are continued from there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from runs.reading import committed
from tests.support.faults import injection
from tests.support.grids import only_in_test_resume
from tests.support.hub import TOKEN, running_hub
from tests.support.jobs import PROJECT, environment, run_main, started, tiny_settings, write_yaml
from tests.support.messages import assert_names
from tests.support.tiny_model import make_model_and_data
from utils.storage.bucket import open_store

pytestmark = pytest.mark.slow


@only_in_test_resume
def test_failed_push_is_repeated_and_the_adapter_continued(tmp_path: Path):
    make_model_and_data(tmp_path)
    settings = tiny_settings(tmp_path) | {
        "max_steps": 2,
        "learning_rate": 1e-2,
        "eval_first": True,
        "lora_config": {"r": 4},
    }
    push = {"push_to_hub": True, "hub_model_id": "ann/tuned", "hub_private_repo": True}
    config = write_yaml(tmp_path / "run.yaml", settings | push | {"run_name": "first"})
    with running_hub() as hub:
        variables = hub.variables(tmp_path / "hub")
        hub.broken = "/commit/"
        failed = run_main(config, "--json", variables=variables)
        assert failed.exit_code == 1, failed.errors
        assert failed.result["status"] == "completed"
        line = next(line for line in failed.errors.splitlines() if line.startswith("error: "))
        assert_names(line, "completed", "push failed", "ann/tuned")
        command = re.search(r"(main.py export .*)$", line)
        assert command, line

        hub.broken = None
        again = subprocess.run(
            [sys.executable, *shlex.split(command[1])],
            cwd=PROJECT,
            env=environment() | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert again.returncode == 0, again.stderr
        assert f"{hub.endpoint}/ann/tuned" in again.stdout
        assert hub.repositories["models/ann/tuned"].is_private
        assert "adapter_model.safetensors" in hub.repositories["models/ann/tuned"].files

        more = {"run_name": "more", "initial_adapter_model_ckpt_path": "ann/tuned", "lora_config": None}
        continued = run_main(
            write_yaml(tmp_path / "more.yaml", settings | more), "--json", variables=variables
        )
        assert continued.exit_code == 0, continued.errors
    assert continued.result["parent"] == "ann/tuned"
    first, last = continued.result["eval_losses"][0], failed.result["eval_losses"][-1]
    assert first["eval_loss"] == pytest.approx(last["eval_loss"], abs=1e-6)
    written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    logs = [path for path in (tmp_path / "scratch").rglob("*.log") if path.is_file()]
    assert not [path for path in (*written, *logs) if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in failed.errors + failed.output + again.stdout + again.stderr


@only_in_test_resume
def test_killed_and_resumed_run_pushes_once(tmp_path: Path):
    make_model_and_data(tmp_path)
    settings = tiny_settings(tmp_path) | {
        "run_name": "resumed",
        "max_steps": 4,
        "save_steps": 2,
        "eval_steps": 2,
        "lora_config": {"r": 4},
        "push_to_hub": True,
        "hub_model_id": "ann/resumed",
    }
    config = write_yaml(tmp_path / "run.yaml", settings)
    run = open_store(str(tmp_path / "runs" / "resumed"))
    with running_hub() as hub:
        variables = hub.variables(tmp_path / "hub")
        hold = injection(tmp_path / "ledger", hold="after_step:3")
        with started(config, variables | hold) as job:
            job.wait_for_line("step 3/")
            job.wait_until(lambda: bool(committed(run)), "the checkpoint of step 2")
            job.kill_all()
        assert "models/ann/resumed" not in hub.repositories
        for _ in range(2):
            finished = run_main(config, "--json", variables=variables)
            assert finished.exit_code == 0, finished.errors
            assert finished.result["train_steps"] == 4
            assert hub.repositories["models/ann/resumed"].commits == ["Upload the adapter of resumed"]
        stored = hub.repositories["models/ann/resumed"].files["adapter_model.safetensors"]
    assert stored == run.read("checkpoints/step-000004/adapter_model.safetensors")

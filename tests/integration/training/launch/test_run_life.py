"""The life cycle of a run: stored files, signals, lost workers, storage errors and reruns."""

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import peft
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from runs import reading
from runs.layout import Manifest, checkpoint_key
from runs.summaries import list_runs
from tests.support.bucket_proxy import Fault, Request, bucket_proxy
from tests.support.faults import (
    fill_disk,
    injection,
    release,
    require_small_disks,
    small_disk,
    small_disk_prefix,
)
from tests.support.front_door import run_main_quickly
from tests.support.grids import only_in_test_resume
from tests.support.iam import is_allowed, needed
from tests.support.jobs import (
    PROJECT,
    CompletedCommand,
    command_line,
    descendants,
    environment,
    read_metrics,
    run_main,
    started,
    tiny_settings,
    write_yaml,
)
from tests.support.messages import assert_names
from tests.support.own_buckets import set_up_own_bucket
from tests.support.tiny_model import make_model, write_data
from utils.command_line import main_line
from utils.files import checksum
from utils.processes import user_and_host
from utils.storage.bucket import open_store, sync_to_node
from utils.storage.embedded_bucket import EmbeddedBucket

ROWS, VALID_ROWS = 40, 11


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run_life")
    make_model(directory / "model")
    write_data(directory, train_rows=ROWS, valid_rows=VALID_ROWS)
    return directory


def settings(files: Path, **more: Any) -> dict[str, Any]:
    return tiny_settings(files) | {
        "num_devices": 2,
        "train_batch_size_per_device": 4,
        "num_epochs": 2,
        "learning_rate": 1e-2,
        **more,
    }


def run_export_command(page: str, directory: Path) -> None:
    """Run the command in a report page that exports the best checkpoint, in fp32."""
    (exporting,) = re.findall(r"<pre>\S+ (main\.py export .*) --to exported$", unescape(page), re.M)
    done = subprocess.run(
        [sys.executable, *shlex.split(exporting), "--to", str(directory), "--dtype", "fp32"],
        cwd=PROJECT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def eval_loss_of(model: Any, tokenizer: Any, rows: Path) -> float:
    """Return the token-weighted loss on assistant messages, computed without the product's code."""
    total, count = 0.0, 0
    for line in rows.read_text().splitlines():
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        conversation = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
        ids = torch.tensor(tokenizer(conversation)["input_ids"])
        start = len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].float()
        losses = torch.nn.functional.cross_entropy(logits[start - 1 : -1], ids[start:], reduction="none")
        total, count = total + losses.sum().item(), count + len(losses)
    return total / count


@pytest.mark.slow
def test_lora_run_reads_from_and_writes_to_the_bucket(
    files: Path, bucket: EmbeddedBucket, bucket_uri: str, tmp_path: Path
):
    """Plain PEFT loads the adapter and computes the eval loss that the run reported."""
    store = open_store(bucket_uri)
    store.upload_many({f"model/{path.name}": path for path in (files / "model").iterdir()})
    store.upload_many({name: files / name for name in ("train.jsonl", "valid.jsonl")})
    config = write_yaml(
        tmp_path / "lora.yaml",
        settings(files, lora_config={"r": 4})
        | {
            "model_id": f"{bucket_uri}/model",
            "train_path": f"{bucket_uri}/train.jsonl",
            "valid_path": f"{bucket_uri}/valid.jsonl",
            "storage_path": f"{bucket_uri}/runs",
        },
    )
    finished = run_main(config, "--json")
    assert finished.exit_code == 0, finished.errors
    result = finished.result
    assert result["status"] == "completed"
    assert result["train_steps"] == 10
    assert [loss["step"] for loss in result["eval_losses"]] == [0, 5, 10]
    assert "warning" not in finished.errors.lower(), "a library printed a warning"

    run = open_store(result["run_uri"])
    assert json.loads(run.read("result.json")) == result
    assert run.read("eval_loss.png").startswith(b"\x89PNG")
    assert b"secret" not in run.read("config.yaml")
    lines = [json.loads(line) for line in run.read("metrics.jsonl").decode().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 11))
    speed = result["speed"]
    assert speed["tokens_per_second"] == result["tokens_per_second"] > speed["trained_tokens_per_second"] > 0
    assert speed["mfu"] is None and not any("mfu" in line for line in steps), (
        "the peak FLOPS of this CPU are unknown"
    )
    assert all(line["peak_memory_bytes"] <= speed["peak_memory_bytes"] for line in steps)
    measured = {"data", "forward", "backward", "optimizer", "evaluation", "saving"}
    assert all(speed["seconds"][phase] > 0 for phase in measured)
    assert sum(speed["seconds"].values()) < result["elapsed_seconds"]
    for phase in ("data", "forward", "backward", "optimizer"):
        seconds = sum(line[f"seconds/{phase}"] for line in steps)
        assert seconds == pytest.approx(speed["seconds"][phase], abs=0.001), (
            "each step must report only its own time"
        )
    summaries = [
        json.loads(path.read_text()) for path in (files / "scratch").glob("cache/prepared/*/summary.json")
    ]
    train_summary = next(summary for summary in summaries if summary["rows"] == ROWS)
    assert result["tokens"] == 2 * train_summary["tokens"]
    assert result["trained_tokens"] == 2 * train_summary["trained_tokens"]

    checkpoint = sync_to_node(result["best_checkpoint"], tmp_path / "cache")
    manifest = Manifest.model_validate_json((checkpoint / "MANIFEST.json").read_text())
    assert {path.name for path in checkpoint.iterdir()} == {file.path for file in manifest.files} | {
        "MANIFEST.json"
    }
    assert all(checksum(checkpoint / file.path) == file.checksum for file in manifest.files)
    assert manifest.data_position.rows_seen == manifest.step * 8
    adapter = json.loads((checkpoint / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == f"{bucket_uri}/model", (
        "the URI, not the path in the node cache"
    )

    base = AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    best = min(loss["eval_loss"] for loss in result["eval_losses"])
    assert eval_loss_of(model, tokenizer, files / "valid.jsonl") == pytest.approx(best, abs=1e-3)

    run_export_command(run.read("report.html").decode(), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert eval_loss_of(merged, tokenizer, files / "valid.jsonl") == pytest.approx(best, abs=1e-3)
    (listed,) = list_runs(f"{bucket_uri}/runs")
    assert (listed.run_uri, listed.status, listed.best_eval_loss) == (result["run_uri"], "completed", best)
    assert listed.age_seconds is not None and listed.age_seconds < 600

    again = run_main(config, "--json")
    assert again.exit_code == 0
    assert again.result == result, "a completed run must not be trained again"
    dry_run = run_main(config, "--json", "--dry-run")
    assert dry_run.exit_code == 0
    assert dry_run.result["completed"] == result
    assert dry_run.result["steps"] == result["train_steps"]


@dataclass(frozen=True)
class ObservedRun:
    """A run in a user's own bucket, with every file that it wrote and every request that it sent.

    While it trains and commits, half of its requests fail.
    """

    secrets: dict[str, str]
    written: dict[str, bytes]
    requests: list[Request]
    finished: CompletedCommand


@pytest.fixture(scope="module")
def observed(
    files: Path, bucket: EmbeddedBucket, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ObservedRun]:
    directory = tmp_path_factory.mktemp("watched")
    with pytest.MonkeyPatch.context() as environment, bucket_proxy(bucket.endpoint) as proxy:
        root_uri = set_up_own_bucket(environment, bucket, "watched")
        store = open_store(root_uri)
        store.upload_many({f"models/tiny/{path.name}": path for path in (files / "model").iterdir()})
        store.upload_many({f"data/{name}": files / name for name in ("train.jsonl", "valid.jsonl")})
        credentials = {
            "AWS_ACCESS_KEY_ID": bucket.access_key,
            "AWS_SECRET_ACCESS_KEY": bucket.secret_key,
            "HF_TOKEN": f"hf_{secrets.token_hex(17)}",
            "WANDB_API_KEY": secrets.token_hex(20),
        }
        config = write_yaml(
            directory / "quiet.yaml",
            settings(files, lora_config={"r": 4}, max_steps=3, num_epochs=None)
            | {
                "model_id": f"{root_uri}/models/tiny",
                "train_path": f"{root_uri}/data/train.jsonl",
                "valid_path": f"{root_uri}/data/valid.jsonl",
                "storage_path": f"{root_uri}/runs",
                "output_dir": str(directory / "scratch"),
                "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 1},
            },
        )
        # The path of a socket is limited to 107 bytes.
        with tempfile.TemporaryDirectory(prefix="ray-") as ray_directory:
            ledger = directory / "ledger"
            variables = credentials | {"RAY_TMPDIR": ray_directory, "AWS_ENDPOINT_URL_S3": proxy.endpoint}
            with started(config, variables | injection(ledger, hold="after_step:0")) as job:
                job.wait_for_line("… training")
                proxy.faults += [
                    Fault("reject", method, share=0.5) for method in ("GET", "HEAD", "PUT", "POST", "DELETE")
                ]
                processes = psutil.Process(job.process.pid).children(recursive=True)
                command_lines = "\n".join(map(command_line, processes))
                release(ledger)
                job.wait_for_line("step 1/")
                written = _files_below(Path(ray_directory))  # a completed run removes them
                finished = job.end()
            proxy.faults.clear()
            assert finished.exit_code == 0, finished.errors
            written |= _files_below(Path(ray_directory)) | _files_below(directory)
        requests = list(proxy.requests)
        run = open_store(finished.result["run_uri"])
        written |= {item.key: run.read(item.key) for item in run.list()}
        written |= {
            "command lines": command_lines.encode(),
            "screen": (finished.output + finished.errors).encode(),
        }
        yield ObservedRun(credentials, written, requests, finished)


@pytest.mark.slow
def test_training_continues_when_half_of_all_storage_requests_fail(observed: ObservedRun):
    assert sum(request.status == 503 for request in observed.requests) > 10
    assert observed.finished.result["train_steps"] == 3
    assert reading.survey(open_store(observed.finished.result["run_uri"]))[1] == []


def _files_below(directory: Path) -> dict[str, bytes]:
    """Return path -> content of all files; processes that run may delete some meanwhile."""
    found = {}
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):
            if path.is_file():
                found[str(path)] = path.read_bytes()
    return found


@pytest.mark.slow
def test_run_exposes_no_secret(observed: ObservedRun):
    """Keys and tokens from the environment are in no command line, terminal output, log of Anneal or Ray, or file of the run."""
    assert any("raylet" in path for path in observed.written), "Ray's logs must be searched"
    assert any("scratch/logs" in path for path in observed.written), "Anneal's logs must be searched"
    for name, secret in observed.secrets.items():
        found = [path for path, content in observed.written.items() if secret.encode() in content]
        assert found == [], name


@pytest.mark.slow
def test_iam_policy_allows_every_request_of_a_run(observed: ObservedRun):
    """The requests come from the driver and the workers, and include those that prune checkpoints."""
    policy = json.loads((PROJECT / "configs" / "iam_policy.json").read_text().replace("MY-BUCKET", "watched"))
    calls = needed(observed.requests)
    assert {call for call in calls if not is_allowed(policy, *call)} == set()
    deleted = {resource for action, resource in calls if action == "s3:DeleteObject"}
    assert any(resource.endswith("/MANIFEST.json") for resource in deleted), "the run must prune a checkpoint"


@pytest.mark.slow
def test_full_parameter_checkpoint_loads_in_plain_transformers(files: Path, tmp_path: Path):
    """Its eval loss there equals the last one that the run reported."""
    config = write_yaml(tmp_path / "full.yaml", settings(files, num_checkpoints_to_keep=1))
    finished = run_main(config, "--json")
    assert finished.exit_code == 0, finished.errors
    last = finished.result["last_checkpoint"]
    model = AutoModelForCausalLM.from_pretrained(last, dtype=torch.float32).eval()
    loss = eval_loss_of(model, AutoTokenizer.from_pretrained(last), files / "valid.jsonl")
    assert loss == pytest.approx(finished.result["eval_losses"][-1]["eval_loss"], abs=1e-3)


@pytest.mark.slow
@only_in_test_resume
def test_rerun_writes_a_missing_result_without_training(files: Path, tmp_path: Path):
    """A driver that is killed after its last checkpoint leaves this state. If that checkpoint is damaged, the rerun fails."""
    config = write_yaml(
        tmp_path / "ended.yaml", settings(files, num_epochs=None, max_steps=7, run_name="ended")
    )
    first = run_main(config, "--json")
    assert first.exit_code == 0, first.errors
    left = [path for path in (files / "scratch").rglob("ended*") if path.parent.name in ("ray", "runs")]
    assert left == [], "a completed run leaves only its logs and the node cache"
    run = open_store(first.result["run_uri"])
    metrics = read_metrics(files / "runs" / "ended")
    run.delete(["result.json", "report.html", "eval_loss.png"])

    again = run_main(config, "--json")
    assert again.exit_code == 0, again.errors
    attempt_keys = {"elapsed_seconds", "ended", "tokens_per_second", "speed", "log_files"}
    assert {key: value for key, value in again.result.items() if key not in attempt_keys} == {
        key: value for key, value in first.result.items() if key not in attempt_keys
    }
    assert again.result["train_steps"] == 7
    assert read_metrics(files / "runs" / "ended") == metrics
    assert json.loads(run.read("result.json")) == again.result

    run.delete(["result.json"])
    for weights in (files / "runs" / "ended").glob("checkpoints/*/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    damaged = run_main(config, "--json")
    assert damaged.exit_code == 1, damaged.errors
    assert damaged.result["status"] == "failed"
    assert_names(damaged.result["reason"], "model.safetensors", "committed")


def checkpoint_of_a_rerun(config: Path) -> str:
    """Return the checkpoint that a rerun of the command would resume from; test_resume and two tests here rerun commands."""
    planned = run_main_quickly(config, "--dry-run", "--json")
    assert planned.exit_code == 0, planned.errors
    return planned.result["resumes_from"]


STEPS = 150
LONG = {"num_epochs": None, "max_steps": STEPS, "lora_config": {"r": 4, "lora_dropout": 0.1}}
EVERY_50 = {"checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 50}}


@pytest.mark.slow
def test_signal_commits_a_checkpoint_and_the_same_command_resumes(files: Path, tmp_path: Path):
    """The resumed run has the losses of an uninterrupted one, dropout included.

    The signal goes to the complete process group, as from `timeout`, a service manager or a terminal.
    """
    uninterrupted = run_main(
        write_yaml(tmp_path / "uninterrupted.yaml", settings(files, **LONG, **EVERY_50)),
        "run_name=uninterrupted",
        "--json",
    )
    assert uninterrupted.exit_code == 0, uninterrupted.errors

    config = write_yaml(tmp_path / "stopped.yaml", settings(files, **LONG, **EVERY_50, run_name="stopped"))
    with started(config, injection(tmp_path / "ledger", hold="in_step_until_stop:21")) as job:
        job.wait_for_line("step 20/")
        os.killpg(job.process.pid, signal.SIGTERM)
        finished = job.end()
    assert finished.exit_code == 128 + signal.SIGTERM, finished.errors
    assert finished.result["status"] == "stopped"
    stopped_at = finished.result["train_steps"]
    assert 20 <= stopped_at < STEPS
    assert finished.result["last_checkpoint"].endswith(f"step-{stopped_at:06d}")
    assert "Traceback" not in finished.errors
    page = (files / "runs" / "stopped" / "report.html").read_text()
    assert "stopped: SIGTERM" in page
    assert main_line(str(config)) in page

    resumed = run_main(config, "--json")
    assert resumed.exit_code == 0, resumed.errors
    steps = {}
    for name in ("uninterrupted", "stopped"):
        steps[name] = [
            (line["step"], line["loss"]) for line in read_metrics(files / "runs" / name) if "loss" in line
        ]
    assert steps["stopped"] == steps["uninterrupted"]
    assert resumed.result["tokens"] == uninterrupted.result["tokens"]


@pytest.mark.slow
def test_signal_before_the_first_step_exits_without_a_result(files: Path, tmp_path: Path):
    """There is nothing to commit yet."""
    config = write_yaml(tmp_path / "early.yaml", settings(files, **LONG, run_name="early"))
    with started(config) as job:
        job.wait_for_line("starting the workers")
        job.process.send_signal(signal.SIGTERM)
        finished = job.end()
    assert finished.exit_code == 128 + signal.SIGTERM, finished.errors
    assert "Traceback" not in finished.errors
    assert not (files / "runs" / "early" / "result.json").exists()


@pytest.mark.slow
def test_stop_command_commits_a_checkpoint_and_remove_deletes_the_run(files: Path, tmp_path: Path):
    """The command finds the driver through the run's storage only."""
    config = write_yaml(
        tmp_path / "asked.yaml", settings(files, **LONG | {"max_steps": 9000}, run_name="asked")
    )
    run = files / "runs" / "asked"
    with started(config) as job:
        job.wait_for_line("step 3/")
        stopped = run_main(Path("stop"), str(run))
        finished = job.end()
    assert finished.exit_code == 128 + signal.SIGTERM, finished.errors
    assert stopped.exit_code == 0, stopped.errors
    steps = finished.result["train_steps"]
    status = f"stopped: by {user_and_host()} with main.py stop"
    assert stopped.output.startswith(f"{run}: {status}, at step {steps}. ")
    assert_names(stopped.output, "resumes it")
    assert_names(run_main(Path("show"), str(run)).output, status, "the same command", "resumes it")
    assert finished.result["last_checkpoint"].endswith(f"step-{steps:06d}")
    assert "main.py stop" in finished.errors
    assert not (run / "stop").exists()
    removed = run_main(Path("remove"), str(run), "--yes")
    assert removed.exit_code == 0, removed.errors
    assert not run.exists()


@pytest.mark.slow
def test_killed_driver_is_reported_by_its_parent(files: Path, tmp_path: Path):
    config = write_yaml(tmp_path / "killed.yaml", settings(files, **LONG, run_name="killed"))
    with started(config) as job:
        job.wait_for_line("starting the workers")
        (driver,) = psutil.Process(job.process.pid).children()
        driver.kill()
        finished = job.end()
    assert finished.exit_code == 128 + signal.SIGKILL
    (line,) = [line for line in finished.errors.splitlines() if line.startswith("error: ")]
    assert_names(line, "SIGKILL", str(files / "scratch" / "logs"), f"main.py {config}")


@pytest.mark.slow
@only_in_test_resume
def test_lost_worker_without_retries_fails_the_run_and_a_rerun_resumes(files: Path, tmp_path: Path):
    config = write_yaml(tmp_path / "lost.yaml", settings(files, **LONG, **EVERY_50, run_name="lost"))
    with started(config, injection(tmp_path / "ledger", hold="after_step:75")) as job:
        job.wait_for_line("checkpoint ")
        workers = job.workers()
        assert len(workers) == 2
        os.kill(workers[1].pid, signal.SIGKILL)
        finished = job.end()
    assert finished.exit_code == 1, finished.errors
    assert finished.result["status"] == "failed"
    assert finished.result["reason"].startswith("worker lost")
    assert "Traceback" not in finished.errors
    assert finished.result["last_checkpoint"] is not None

    recovered = run_main(config, "--json")
    assert recovered.exit_code == 0, recovered.errors
    assert list((files / "scratch" / "runs" / "lost").rglob("restored")) == []
    assert recovered.result["train_steps"] == STEPS


@pytest.mark.slow
def test_lost_worker_within_max_failures_restarts_from_the_latest_checkpoint(files: Path, tmp_path: Path):
    """The metrics contain each step once."""
    config = write_yaml(
        tmp_path / "back.yaml", settings(files, **LONG, **EVERY_50, run_name="back", max_failures=1)
    )
    ledger = tmp_path / "ledger"
    with started(config, injection(ledger, hold="after_step:75")) as job:
        job.wait_for_line("checkpoint ")
        os.kill(job.workers()[0].pid, signal.SIGKILL)
        job.wait_for_line("worker lost")
        release(ledger)
        finished = job.end()
    assert finished.exit_code == 0, finished.errors
    (failure,) = finished.result["failures"]
    assert failure.startswith("worker lost")
    page = unescape((files / "runs" / "back" / "report.html").read_text())
    for text in (finished.errors, page):
        assert "worker lost" in text
    steps = [line["step"] for line in read_metrics(files / "runs" / "back") if "loss" in line]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("process", ["raylet", pytest.param("gcs_server", marks=only_in_test_resume)])
def test_lost_cluster_is_reported_and_a_rerun_would_resume(process: str, files: Path, tmp_path: Path):
    """Ray itself would terminate the driver without a message, after 15 s or a minute."""
    name = f"cluster-{process}"
    config = write_yaml(tmp_path / "cluster.yaml", settings(files, **LONG, **EVERY_50, run_name=name))
    with started(config, injection(tmp_path / "ledger", hold="after_step:75")) as job:
        job.wait_for_line("step 75/")
        job.wait_until(
            lambda: read_metrics(files / "runs" / name)[-1]["step"] > 50, "losses after a checkpoint"
        )
        (listed,) = (run for run in list_runs(str(files / "runs")) if run.run_name == name)
        assert listed.status == "running"
        assert 50 < listed.steps <= 75
        (victim,) = descendants(job.process.pid, process)
        victim.kill()
        killed = time.monotonic()
        finished = job.end()
        assert time.monotonic() - killed < 45, (
            "20 s on an idle machine; Ray itself takes a minute for the GCS"
        )
    assert finished.exit_code == 1, finished.errors
    assert_names(
        finished.result["reason"], "cluster was lost", f"{process}.out", "same command", "step-000050"
    )
    assert finished.errors.count("error: ") == 1
    assert "Traceback" not in finished.errors
    assert checkpoint_of_a_rerun(config).endswith("step-000050")


@pytest.mark.slow
def test_full_disk_raises_an_error_and_a_rerun_would_resume(files: Path, tmp_path: Path):
    """The error names the checkpoint that does not fit. Committed checkpoints stay complete."""
    require_small_disks(tmp_path)
    disk = tmp_path / "disk"
    disk.mkdir()
    every_20 = {"checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 20}}
    config = write_yaml(
        tmp_path / "full.yaml",
        settings(files, max_steps=100, num_epochs=None, run_name="full", output_dir=str(disk), **every_20),
    )
    ledger = tmp_path / "ledger"
    held = injection(ledger, hold="after_step:25")
    with started(config, held, within=small_disk_prefix(disk, "32m")) as job:
        job.wait_for_line("checkpoint ")
        fill_disk(Path(f"/proc/{job.process.pid}/root{disk}"), leaving=500_000)
        release(ledger)
        # Committed checkpoints are deleted from this disk, which frees space.
        while job.process.poll() is None:
            fill_disk(Path(f"/proc/{job.process.pid}/root{disk}"), leaving=500_000)
            time.sleep(0.01)
        finished = job.end()
    assert finished.exit_code == 1, finished.errors
    assert re.search(rf"{disk}\S*/checkpoint-\d+: .*disk.*output_dir", finished.errors)
    assert "Traceback" not in finished.errors
    assert finished.result["status"] == "failed"
    run = open_store(str(files / "runs" / "full"))
    manifests, damage = reading.survey(run)
    assert damage == []
    assert finished.result["last_checkpoint"].endswith(f"step-{manifests[-1].step:06d}")
    committed = {checkpoint_key(manifest.step) for manifest in manifests}
    assert {item.key.rpartition("/")[0] + "/" for item in run.list("checkpoints/")} == committed

    assert checkpoint_of_a_rerun(config) == finished.result["last_checkpoint"]


@only_in_test_resume
@pytest.mark.slow
def test_storage_that_fills_up_raises_an_error_and_a_rerun_resumes(files: Path, tmp_path: Path):
    """The error names the file that does not fit, and nothing half-written remains."""
    require_small_disks(tmp_path)
    storage = tmp_path / "storage"
    storage.mkdir()
    every_10 = {"checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 10}}
    config = write_yaml(
        tmp_path / "full.yaml",
        settings(
            files,
            max_steps=40,
            num_epochs=None,
            run_name="full",
            storage_path=str(storage),
            max_failures=3,
            num_devices=1,
            **every_10,
        ),
    )
    with small_disk(storage, "32m") as disk:
        ledger = tmp_path / "ledger"
        with started(config, injection(ledger, hold="after_step:15"), within=disk.command) as job:
            job.wait_for_line("checkpoint ")
            fill_disk(disk.path, leaving=0)
            release(ledger)
            while job.process.poll() is None:
                fill_disk(disk.path, leaving=0)
                time.sleep(0.01)
            finished = job.end()
        run = open_store(str(disk.path / "full"))
        manifests, damage = reading.survey(run)
        left = [path.name for path in disk.path.rglob("*") if path.name.endswith(".partial")]
        (disk.path / "filler").unlink()
        with started(config, within=disk.command) as job:
            recovered = job.end()
        steps = [line["step"] for line in read_metrics(disk.path / "full") if "loss" in line]
    assert finished.exit_code == 1, finished.errors
    (line,) = [line for line in finished.errors.splitlines() if line.startswith("error: ")]
    assert_names(line, str(storage / "full"), "disk is full", "free some space")
    assert re.search("same command", finished.errors, re.IGNORECASE), "also if result.json does not fit"
    assert finished.errors.rstrip().endswith(line), "one line"
    assert "Traceback" not in finished.errors
    assert (damage, left) == ([], [])
    assert manifests[-1].step < 40
    assert recovered.exit_code == 0, recovered.errors
    assert recovered.result["train_steps"] == 40
    assert steps == list(range(1, 41))


@pytest.mark.slow
def test_disk_too_small_for_a_checkpoint_is_rejected_in_the_plan(files: Path, tmp_path: Path):
    require_small_disks(tmp_path)
    disk = tmp_path / "disk"
    disk.mkdir()
    config = write_yaml(tmp_path / "small.yaml", settings(files, run_name="small"))
    for key in ("output_dir", "storage_path"):
        with started(
            config, within=small_disk_prefix(disk, "800k"), arguments=[f"{key}={disk}", "--dry-run"]
        ) as job:
            finished = job.end()
        assert finished.exit_code == 2, finished.errors
        assert_names(finished.errors, f"error: {key}: ", str(disk), "free")
        assert "Traceback" not in finished.errors


@pytest.mark.slow
def test_access_denied_during_training_reports_checkpoint_and_result(
    files: Path, bucket: EmbeddedBucket, tmp_path: Path
):
    with pytest.MonkeyPatch.context() as environment, bucket_proxy(bucket.endpoint) as proxy:
        root_uri = set_up_own_bucket(environment, bucket, "denied")
        config = write_yaml(
            tmp_path / "denied.yaml",
            settings(files, max_steps=1, num_epochs=None, storage_path=f"{root_uri}/runs"),
        )
        ledger = tmp_path / "ledger"
        variables = {"AWS_ENDPOINT_URL_S3": proxy.endpoint} | injection(ledger, hold="after_step:0")
        with started(config, variables) as job:
            job.wait_for_line("… training")
            proxy.faults += [
                Fault("reject", method, status=403, code="AccessDenied") for method in ("GET", "PUT", "POST")
            ]
            release(ledger)
            finished = job.end()
    assert finished.exit_code == 1, finished.errors
    assert re.search(rf"error: .*{root_uri}/runs/\S+: access denied", finished.errors)
    assert re.search(rf"result\.json .*{root_uri}/runs/\S+: access denied", finished.errors)
    assert "Traceback" not in finished.errors


@pytest.mark.slow
def test_second_interrupt_exits_at_once_and_retains_checkpoints(files: Path, tmp_path: Path):
    config = write_yaml(tmp_path / "twice.yaml", settings(files, **LONG, **EVERY_50, run_name="twice"))
    with started(config, injection(tmp_path / "ledger", hold="in_step_until_stop:75")) as job:
        job.wait_for_line("checkpoint ")
        job.process.send_signal(signal.SIGINT)
        job.process.send_signal(signal.SIGINT)
        finished = job.end()
    assert finished.exit_code == 128 + signal.SIGINT, finished.errors
    assert "Traceback" not in finished.errors
    last = finished.result["last_checkpoint"]
    assert Manifest.model_validate_json(open_store(last).read("MANIFEST.json")).step >= 50


@pytest.mark.slow
def test_interrupted_run_leaves_no_thread_that_calls_ray():
    """If a thread calls Ray after shutdown, Ray terminates the process silently with exit code 1."""
    script = """
import threading, ray
from training.launch.driver import _Fit, _mailbox_on_this_node

class Controller:
    def run(self):
        threading.Event().wait()

class Trainer:
    runs_in_driver = False

    def fit(self):
        controller = ray.remote(Controller).options(num_cpus=0).remote()
        mailbox.controlled_by.remote(controller)
        ray.get(controller.run.remote())

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
mailbox = _mailbox_on_this_node()
fit = _Fit(Trainer(), mailbox)
fit.end()
threads = [thread.name for thread in threading.enumerate() if thread.name == "fit"]
ray.shutdown()
print(threads, fit.error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, cwd=PROJECT
    )
    assert (done.returncode, done.stdout) == (0, "[] None\n"), done.stderr


@pytest.mark.slow
def test_second_driver_of_a_run_raises_an_error_with_the_owner(files: Path, tmp_path: Path):
    """The first driver is not affected."""
    config = write_yaml(tmp_path / "one.yaml", settings(files, **LONG | {"max_steps": 9000}, run_name="one"))
    with started(config) as job:
        job.wait_for_line("starting the workers")
        second = run_main(config, "--json")
        job.wait_for_line("step 1/")
        job.process.send_signal(signal.SIGTERM)
        first = job.end()
    assert second.exit_code == 2, second.errors
    assert re.search(rf"error: .*{files / 'runs' / 'one'} .*process \d+", second.errors)
    assert second.output.count("{") == 0
    assert first.result["status"] == "stopped", first.errors
    assert not (files / "runs" / "one" / "claim").exists() or not list(
        (files / "runs" / "one" / "claim").iterdir()
    )


@pytest.mark.slow
@pytest.mark.parametrize("place", ["node cache", pytest.param("directory", marks=only_in_test_resume)])
def test_run_fails_once_a_mapped_weight_file_is_written_to(
    place: str, files: Path, bucket: EmbeddedBucket, bucket_uri: str, tmp_path: Path
):
    """The frozen base of a LoRA run stays mapped. The loss of the changed weights, here infinite, is not blamed on the rows."""
    model = tmp_path / "model"
    shutil.copytree(files / "model", model)
    changes: dict[str, Any] = {"model_id": str(model)}
    if place == "node cache":
        open_store(f"{bucket_uri}/model").upload_many({path.name: path for path in model.iterdir()})
        changes = {"model_id": f"{bucket_uri}/model", "output_dir": str(tmp_path / "scratch")}
        model = tmp_path / "scratch" / "cache" / "models"
    config = write_yaml(
        tmp_path / "changed.yaml",
        settings(files, lora_config={"r": 4}, num_devices=1, num_epochs=1000, save_steps=10, eval_steps=10)
        | {"storage_path": str(tmp_path / "runs"), "run_name": "changed", **changes},
    )
    with started(config) as job:
        job.wait_for_line("step 10  checkpoint")
        (weights,) = model.rglob("model.safetensors")
        with weights.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
        finished = job.end()
    assert finished.exit_code == 1, finished.errors
    message = finished.errors.partition("error: ")[2]
    found = re.match(r"step (\d+): (\S+) was written to", message)
    assert found, finished.errors
    assert found[2] == str(weights)
    committed = [manifest.step for manifest in reading.committed(open_store(str(tmp_path / "runs/changed")))]
    assert_names(message, f"step-{committed[-1]:06}", "same command")
    assert committed[-1] < int(found[1])
    assert finished.result["status"] == "failed"


@only_in_test_resume
@pytest.mark.slow
def test_run_names_a_mapped_weight_file_that_was_truncated(files: Path, tmp_path: Path):
    """The kernel kills a process that reads a mapped page beyond the end of its file, so only the next attempt can name it."""
    model = tmp_path / "model"
    shutil.copytree(files / "model", model)
    config = write_yaml(
        tmp_path / "truncated.yaml",
        settings(files, lora_config={"r": 4}, num_devices=1, num_epochs=1000, save_steps=10, max_failures=1)
        | {"storage_path": str(tmp_path / "runs"), "run_name": "truncated", "model_id": str(model)},
    )
    with started(config) as job:
        job.wait_for_line("step 10  checkpoint")
        os.truncate(model / "model.safetensors", 100_000)
        finished = job.end()
    assert finished.exit_code == 1, finished.errors
    message = finished.errors.partition("error: ")[2]
    assert_names(message, f"{model}/model.safetensors: has 100000 bytes", "truncated")

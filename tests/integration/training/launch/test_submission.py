"""Runs submitted to a real Ray job server with a token and a real bucket: followed, detached, stopped, rejected, failed."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest
from boto3.session import Session

from cookbooks.launch_as_job.prepare import main as prepare
from runs.layout import Manifest, checkpoint_key
from tests.support.jobs import PROJECT, CompletedCommand, command, environment, run_main, started, write_yaml
from tests.support.messages import assert_names
from tests.support.own_buckets import aws_variables
from tests.support.ray_cluster import RayCluster, needs_ray_default, ray_cluster
from tests.support.tiny_model import make_model_and_data
from utils.command_line import main_command, main_line
from utils.storage.bucket import open_store
from utils.storage.embedded_bucket import EmbeddedBucket

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    needs_ray_default,
]

SECRETS = {
    "HF_TOKEN": "hf_" + "q" * 34,
    "WANDB_API_KEY": "w" * 40,
    "MLFLOW_TRACKING_PASSWORD": "m" * 20,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_and_data(tmp_path_factory.mktemp("submission"))


@pytest.fixture(scope="module")
def storage(bucket: EmbeddedBucket) -> str:
    """Create a bucket that the cluster accesses through the AWS variables, and return the URI of a prefix in it."""
    variables = aws_variables(bucket)
    client = Session(variables["AWS_ACCESS_KEY_ID"], variables["AWS_SECRET_ACCESS_KEY"]).client(
        "s3", endpoint_url=bucket.endpoint, region_name="us-east-1"
    )
    client.create_bucket(Bucket="submitted")
    return "s3://submitted/runs"


@pytest.fixture(scope="module")
def cluster(bucket: EmbeddedBucket) -> Iterator[RayCluster]:
    with ray_cluster(cpus=2, job_server=True, variables=aws_variables(bucket)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def laptop(bucket: EmbeddedBucket, cluster: RayCluster) -> dict[str, str]:
    """Return the environment of the machine that submits: its own credentials and the cluster's token."""
    return aws_variables(bucket) | cluster.token | SECRETS


def config(files: Path, path: Path, storage: str, **more: object) -> Path:
    """Write a YAML whose model and rows are local, so they are uploaded with the job; its results go to the bucket."""
    settings = {
        "model_id": str(files / "model"),
        "train_path": str(files / "train.jsonl"),
        "valid_path": [str(files / "val*.jsonl")],
        "storage_path": storage,
        "num_devices": 2,
        "device": "cpu",
        "dtype": "fp32",
        "num_epochs": 1,
        "train_batch_size_per_device": 4,
        "gradient_checkpointing": False,
        "max_failures": 0,
        "lora_config": {"r": 4},
    }
    return write_yaml(path, settings | more)


def job_list(cluster: RayCluster) -> str:
    """Return the job server's list of its jobs, as JSON text."""
    request = urllib.request.Request(
        f"{cluster.job_server}/api/jobs/",
        headers={"Authorization": f"Bearer {cluster.token['RAY_AUTH_TOKEN']}"},
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read().decode()


def printed_command(finished: CompletedCommand, name: str) -> list[str]:
    """Return the command that --detach printed under this name."""
    match = re.search(rf"^{name} +(.*?)(?:  \(.*)?$", finished.output, re.M)
    assert match, finished.output
    return shlex.split(match[1])


def run_ray_command(arguments: list[str], variables: Mapping[str, str]) -> str:
    """Run a command of Ray's CLI and return its output."""
    program = Path(command(Path())[0]).with_name(Path(arguments[0]).name)
    done = subprocess.run(
        [str(program), *arguments[1:]],
        env=environment() | dict(variables),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_submitted_run_is_followed_and_exposes_no_secret(
    files: Path, tmp_path: Path, storage: str, cluster: RayCluster, laptop: dict[str, str]
):
    """The job's output goes to standard error, its result to standard output. The rerun command submits no second job."""
    yaml = config(files, tmp_path / "followed.yaml", storage)
    finished = run_main(yaml, "--submit", cluster.job_server, "--json", variables=laptop)
    assert finished.exit_code == 0, finished.errors
    assert finished.result["status"] == "completed"
    assert finished.result["run_uri"].startswith(f"{storage}/followed-")
    assert len(finished.output.splitlines()) == 1
    uri = re.escape(finished.result["run_uri"])
    printed = re.findall(rf"^(results \D*?) +{uri}(?: \(.*\))?$", finished.errors, re.M)
    assert len(printed) == 2 and len(set(printed)) == 1, "the local check and the job must print the same run"
    assert "step 5/5  loss" in finished.errors
    jobs = job_list(cluster)
    assert "main.py followed.yaml" in jobs
    secrets = [*SECRETS.values(), cluster.token["RAY_AUTH_TOKEN"], laptop["AWS_SECRET_ACCESS_KEY"]]
    assert not [secret for secret in secrets if secret in jobs + finished.errors]
    again = run_main(yaml, "--submit", cluster.job_server, "--json", variables=laptop)
    assert again.exit_code == 0, again.errors
    assert again.result == finished.result
    assert len(json.loads(job_list(cluster))) == len(json.loads(jobs))


def test_stopped_job_is_resumed_by_the_same_command(
    files: Path,
    tmp_path: Path,
    storage: str,
    cluster: RayCluster,
    laptop: dict[str, str],
    bucket: EmbeddedBucket,
    monkeypatch: pytest.MonkeyPatch,
):
    """Ctrl-C only detaches from the job. `ray job stop` commits a checkpoint, from which the same command resumes."""
    yaml = config(
        files, tmp_path / "stopped.yaml", storage, run_name="stopped", max_steps=4000, num_epochs=None
    )
    submitted = ["--submit", cluster.job_server]
    with started(yaml, laptop, arguments=submitted) as job:
        job.wait_for_line("step 5/4000")
        job.process.send_signal(signal.SIGINT)
        detached = job.end()
    assert detached.exit_code == 130
    assert "Traceback" not in detached.errors
    stop = re.findall(r"interrupted by SIGINT: .*: (.*)$", detached.errors, re.M)[-1]
    run_ray_command(shlex.split(stop), laptop)
    for name, value in aws_variables(bucket).items():
        monkeypatch.setenv(name, value)
    manifests = [
        Manifest.model_validate_json(open_store(f"{storage}/stopped").read(item.key))
        for item in open_store(f"{storage}/stopped").list("checkpoints/")
        if item.key.endswith("MANIFEST.json")
    ]
    assert 5 <= manifests[-1].step < 4000
    adapter = open_store(f"{storage}/stopped").read(checkpoint_key(manifests[-1].step, "adapter_config.json"))
    assert json.loads(adapter)["base_model_name_or_path"].startswith(f"{storage}/models/model-"), (
        "the base model must outlive the job's directory"
    )
    with started(yaml, laptop, arguments=submitted) as job:
        job.wait_for_line(f"step {manifests[-1].step + 1}/4000")
        stop = re.search(r"^stop +(.*?)  \(", job.errors, re.M)
        assert stop
        run_ray_command(shlex.split(stop[1]), laptop)
        stopped = job.end()
    assert stopped.exit_code == 143
    assert stopped.result["status"] == "stopped"
    assert stopped.result["train_steps"] > manifests[-1].step
    resume = f"with the same command: {main_line(str(yaml), '--submit', cluster.job_server)}"
    assert resume in stopped.errors, "not the command that runs in the job"
    warned = [line for line in stopped.errors.splitlines() if line.startswith("warning: ")]
    assert not [line for line in warned if "stopped.yaml:" in line], "keys that the user did not write"


def test_detach_prints_commands_that_follow_and_resume_the_job(
    files: Path, tmp_path: Path, storage: str, cluster: RayCluster, laptop: dict[str, str]
):
    """The job fails: its log contains the result, and rerunning the command returns the job's exit code."""
    yaml = config(files, tmp_path / "detached.yaml", storage, learning_rate=1e30, max_grad_norm=0)
    detached = run_main(yaml, "--submit", cluster.job_server, "--detach", variables=laptop)
    assert detached.exit_code == 0, detached.errors
    log = run_ray_command(printed_command(detached, "follow"), laptop)
    assert '"status":"failed"' in log
    again = run_main(yaml, "--submit", cluster.job_server, "--json", variables=laptop)
    assert again.exit_code == 1
    assert again.result["status"] == "failed"
    resume = main_command(str(yaml), "--submit", cluster.job_server)
    assert printed_command(detached, "resume") == resume


def test_job_that_does_not_fit_the_cluster_raises_an_error(
    files: Path, tmp_path: Path, storage: str, cluster: RayCluster, laptop: dict[str, str]
):
    yaml = config(files, tmp_path / "large.yaml", storage, num_devices=3)
    rejected = run_main(yaml, "--submit", cluster.job_server, "--json", variables=laptop)
    assert rejected.exit_code == 2
    assert_names(rejected.errors, "3 workers", "CPU 3 (has 2)")
    assert rejected.output == ""


def test_job_checks_uris_that_only_the_cluster_can_access(
    files: Path, tmp_path: Path, storage: str, cluster: RayCluster, laptop: dict[str, str]
):
    """A user without access to the bucket can submit. The job itself checks a path on the cluster."""
    yaml = config(
        files,
        tmp_path / "outside.yaml",
        storage,
        num_devices=1,
        max_steps=1,
        num_epochs=None,
        lora_config=None,
    )
    no_access = laptop | {"AWS_SECRET_ACCESS_KEY": "wrong"}
    finished = run_main(yaml, "--submit", cluster.job_server, "--json", variables=no_access)
    assert finished.exit_code == 0, finished.errors
    assert re.search("^warning: .*storage_path: ", finished.errors, re.M)
    rejected = run_main(
        yaml,
        f"train_path=file://{tmp_path}/nowhere.jsonl",
        "--submit",
        cluster.job_server,
        variables=laptop,
    )
    assert rejected.exit_code == 2
    assert "train_path: " in rejected.errors
    assert "nowhere.jsonl" in rejected.errors.splitlines()[-1]


def test_unusable_job_server_raises_an_error_with_the_fix(
    files: Path,
    tmp_path: Path,
    storage: str,
    cluster: RayCluster,
    laptop: dict[str, str],
):
    yaml = config(files, tmp_path / "lost.yaml", storage)

    def error_of(address: str, variables: Mapping[str, str]) -> str:
        finished = run_main(yaml, "--submit", address, variables=variables)
        assert finished.exit_code == 2, finished.errors
        assert "Traceback" not in finished.errors
        return finished.errors.splitlines()[-1]

    unauthorized = {name: value for name, value in laptop.items() if not name.startswith("RAY_AUTH")}
    assert "RAY_AUTH_MODE=token" in error_of(cluster.job_server, unauthorized)
    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        message = error_of(f"http://127.0.0.1:{other.server_port}", laptop)
        other.shutdown()
    assert_names(message, f"http://127.0.0.1:{other.server_port}", "job server")
    assert_names(error_of("http://127.0.0.1:1", laptop), "--submit: ", "http://127.0.0.1:1")
    for no_address in ("head:6379", f"{cluster.job_server}/ x"):
        assert "http://HEAD:8265" in error_of(no_address, laptop)


def test_commands_of_the_cookbook_complete(
    files: Path, tmp_path: Path, cluster: RayCluster, laptop: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    """The README's commands run in their order; only the model, the paths and the cluster are replaced."""
    cookbook = PROJECT / "cookbooks" / "launch_as_job"
    readme = (cookbook / "README.md").read_text("utf-8")
    yaml = cookbook / "smollm2-135m.yaml"
    shutil.copytree(files / "model", tmp_path / "smollm2-135m")
    prepare(tmp_path)  # uses the copied model and writes the rows
    overrides = [
        f"model_id=file://{tmp_path}/smollm2-135m",
        f"train_path={tmp_path}/train.jsonl",
        f"valid_path={tmp_path}/valid.jsonl",
        f"storage_path={tmp_path}/runs",
    ]
    commands = [
        shlex.split(line.replace("http://127.0.0.1:8265", cluster.job_server))
        for line in re.findall(r"^ {4}((?:python main\.py|ray job) .*8265.*)$", readme, re.M)
        if "HEAD" not in line
    ]
    assert [line[:2] for line in commands] == [["python", "main.py"], ["python", "main.py"], ["ray", "job"]]
    followed, detached, by_ray = commands
    finished = run_main(yaml, *followed[3:], *overrides, variables=laptop)
    assert finished.exit_code == 0, finished.errors
    submitted = run_main(yaml, *detached[3:], *overrides, variables=laptop)
    assert submitted.exit_code == 0, submitted.errors
    assert "completed: " in run_ray_command(printed_command(submitted, "follow"), laptop)
    monkeypatch.chdir(PROJECT)
    assert "completed: " in run_ray_command([*by_ray, *overrides], laptop)

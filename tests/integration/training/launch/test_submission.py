"""Runs as jobs of a real job server behind a token, with a real bucket: submitted, followed, stopped, rejected, failed."""

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
from runs.layout import Manifest
from tests.support.jobs import PROJECT, Finished, command, environment, run_main, started, write_yaml
from tests.support.messages import assert_names
from tests.support.own_buckets import variables_of
from tests.support.ray_cluster import RayCluster, needs_ray_default, ray_cluster
from tests.support.tiny_model import make_model, write_data
from utils.storage.bucket import open_store
from utils.storage.embedded_bucket import EmbeddedBucket

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    needs_ray_default,
]

SECRETS = {
    "HF_TOKEN": "hf_" + "q" * 34,
    "WANDB_API_KEY": "w" * 40,
    "MLFLOW_TRACKING_PASSWORD": "m" * 20,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("submission")
    make_model(root / "model")
    write_data(root)
    return root


@pytest.fixture(scope="module")
def storage(bucket: EmbeddedBucket) -> str:
    """A prefix of a bucket that the cluster reaches as anybody's."""
    variables = variables_of(bucket)
    client = Session(variables["AWS_ACCESS_KEY_ID"], variables["AWS_SECRET_ACCESS_KEY"]).client(
        "s3", endpoint_url=bucket.endpoint, region_name="us-east-1"
    )
    client.create_bucket(Bucket="submitted")
    return "s3://submitted/runs"


@pytest.fixture(scope="module")
def cluster(bucket: EmbeddedBucket) -> Iterator[RayCluster]:
    with ray_cluster(cpus=2, job_server=True, variables=variables_of(bucket)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def laptop(bucket: EmbeddedBucket, cluster: RayCluster) -> dict[str, str]:
    """The environment of who submits: credentials of their own, and the token."""
    return variables_of(bucket) | cluster.token | SECRETS


def config(files: Path, path: Path, storage: str, **more: object) -> Path:
    """Local model and rows, which travel; results go to the bucket."""
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


def jobs_of(cluster: RayCluster) -> str:
    """All that the job server tells of its jobs."""
    request = urllib.request.Request(
        f"{cluster.job_server}/api/jobs/",
        headers={"Authorization": f"Bearer {cluster.token['RAY_AUTH_TOKEN']}"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()


def printed_command(finished: Finished, name: str) -> list[str]:
    """What --detach says to type."""
    match = re.search(rf"^{name} +(.*?)(?:  \(.*)?$", finished.output, re.M)
    assert match, finished.output
    return shlex.split(match[1])


def type_in(words: list[str], variables: Mapping[str, str]) -> str:
    """Run one of Ray's own commands."""
    program = Path(command(Path())[0]).with_name(words[0])
    done = subprocess.run(
        [str(program), *words[1:]],
        env=environment() | dict(variables),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_is_submitted_and_followed(
    files: Path, tmp_path: Path, storage: str, cluster: RayCluster, laptop: dict[str, str]
):
    """Its output comes to standard error, its result to standard output, and nothing secret goes anywhere."""
    yaml = config(files, tmp_path / "followed.yaml", storage)
    finished = run_main(yaml, "--submit", cluster.job_server, "--json", variables=laptop)
    assert finished.exit_code == 0, finished.errors
    assert finished.result["status"] == "completed"
    assert finished.result["run_uri"].startswith(f"{storage}/followed-")
    assert len(finished.output.splitlines()) == 1
    uri = re.escape(finished.result["run_uri"])
    printed = re.findall(rf"^(results \D*?) +{uri}$", finished.errors, re.M)
    assert len(printed) == 2 and len(set(printed)) == 1, "by the check here and by the job: the same run"
    assert "step 5/5  loss" in finished.errors
    jobs = jobs_of(cluster)
    assert "main.py followed.yaml" in jobs
    secrets = [*SECRETS.values(), cluster.token["RAY_AUTH_TOKEN"], laptop["AWS_SECRET_ACCESS_KEY"]]
    assert not [secret for secret in secrets if secret in jobs + finished.errors]
    again = run_main(yaml, "--submit", cluster.job_server, "--json", variables=laptop)
    assert again.exit_code == 0, again.errors
    assert again.result == finished.result
    assert len(json.loads(jobs_of(cluster))) == len(json.loads(jobs))


def test_a_detached_job_is_stopped_and_resumed_by_the_same_command(
    files: Path,
    tmp_path: Path,
    storage: str,
    cluster: RayCluster,
    laptop: dict[str, str],
    bucket: EmbeddedBucket,
    monkeypatch: pytest.MonkeyPatch,
):
    """Ctrl-C leaves it alone; a stop commits a checkpoint, from which the same command resumes."""
    yaml = config(
        files, tmp_path / "stopped.yaml", storage, run_name="stopped", max_steps=4000, num_epochs=None
    )
    submitted = ["--submit", cluster.job_server]
    with started(yaml, laptop, arguments=submitted) as job:
        job.wait_for_line("step 5/4000")
        job.process.send_signal(signal.SIGINT)
        left = job.end()
    assert left.exit_code == 130
    assert "Traceback" not in left.errors
    stop = re.findall(r"interrupted: .*: (.*)$", left.errors, re.M)[-1]
    type_in(shlex.split(stop), laptop)
    for name, value in variables_of(bucket).items():
        monkeypatch.setenv(name, value)
    manifests = [
        Manifest.model_validate_json(open_store(f"{storage}/stopped").read(item.key))
        for item in open_store(f"{storage}/stopped").list("checkpoints/")
        if item.key.endswith("MANIFEST.json")
    ]
    assert 5 <= manifests[-1].step < 4000
    with started(yaml, laptop, arguments=submitted) as job:
        job.wait_for_line(f"step {manifests[-1].step + 1}/4000")
        stop = re.search(r"^stop +(.*?)  \(", job.errors, re.M)
        assert stop
        type_in(shlex.split(stop[1]), laptop)
        stopped = job.end()
    assert stopped.exit_code == 143
    assert stopped.result["status"] == "stopped"
    assert stopped.result["train_steps"] > manifests[-1].step


def test_a_job_that_is_not_followed(
    files: Path, tmp_path: Path, storage: str, cluster: RayCluster, laptop: dict[str, str]
):
    """The commands that are printed do what they say; one that fails has its own exit code, and says why."""
    yaml = config(files, tmp_path / "detached.yaml", storage, learning_rate=1e30, max_grad_norm=0)
    left = run_main(yaml, "--submit", cluster.job_server, "--detach", variables=laptop)
    assert left.exit_code == 0, left.errors
    log = type_in(printed_command(left, "follow"), laptop)
    assert '"status":"failed"' in log
    again = run_main(yaml, "--submit", cluster.job_server, "--json", variables=laptop)
    assert again.exit_code == 1
    assert again.result["status"] == "failed"
    assert printed_command(left, "resume") == ["python", "main.py", str(yaml), "--submit", cluster.job_server]


def test_a_job_that_does_not_fit_the_cluster_raises_an_error(
    files: Path, tmp_path: Path, storage: str, cluster: RayCluster, laptop: dict[str, str]
):
    yaml = config(files, tmp_path / "large.yaml", storage, num_devices=3)
    refused = run_main(yaml, "--submit", cluster.job_server, "--json", variables=laptop)
    assert refused.exit_code == 2
    assert_names(refused.errors, "3 workers", "CPU 3 (has 2)")
    assert refused.output == ""


def test_paths_that_only_the_cluster_sees_are_checked_by_the_job(
    files: Path, tmp_path: Path, storage: str, cluster: RayCluster, laptop: dict[str, str]
):
    """Somebody without rights to the bucket may submit; a path of the cluster's own is looked at by the job."""
    yaml = config(files, tmp_path / "outside.yaml", storage, num_devices=1, max_steps=1, num_epochs=None)
    without = laptop | {"AWS_SECRET_ACCESS_KEY": "wrong"}
    finished = run_main(yaml, "--submit", cluster.job_server, "--json", variables=without)
    assert finished.exit_code == 0, finished.errors
    assert re.search("^warning: .*storage_path: ", finished.errors, re.M)
    there = run_main(
        yaml,
        f"train_path=file://{tmp_path}/nowhere.jsonl",
        "--submit",
        cluster.job_server,
        variables=laptop,
    )
    assert there.exit_code == 2
    assert "train_path: " in there.errors
    assert "nowhere.jsonl" in there.errors.splitlines()[-1]


def test_the_wrong_place_to_submit_to(
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


def test_the_cookbook(
    files: Path, tmp_path: Path, cluster: RayCluster, laptop: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    """Its commands as they stand there, in their order, but for a smaller model and this cluster."""
    cookbook = PROJECT / "cookbooks" / "launch_as_job"
    readme = (cookbook / "README.md").read_text("utf-8")
    yaml = cookbook / "smollm2-135m.yaml"
    shutil.copytree(files / "model", tmp_path / "smollm2-135m")
    prepare(tmp_path)  # finds the model there, and adds rows
    smaller = [
        f"model_id=file://{tmp_path}/smollm2-135m",
        f"train_path={tmp_path}/train.jsonl",
        f"valid_path={tmp_path}/valid.jsonl",
        f"storage_path={tmp_path}/runs",
    ]
    typed = [
        shlex.split(line.replace("http://127.0.0.1:8265", cluster.job_server))
        for line in re.findall(r"^ {4}((?:python main\.py|ray job) .*8265.*)$", readme, re.M)
        if "HEAD" not in line
    ]
    assert [line[:2] for line in typed] == [["python", "main.py"], ["python", "main.py"], ["ray", "job"]]
    followed, detached, by_ray = typed
    finished = run_main(yaml, *followed[3:], *smaller, variables=laptop)
    assert finished.exit_code == 0, finished.errors
    left = run_main(yaml, *detached[3:], *smaller, variables=laptop)
    assert left.exit_code == 0, left.errors
    assert "completed: " in type_in(printed_command(left, "follow"), laptop)
    monkeypatch.chdir(PROJECT)
    assert "completed: " in type_in([*by_ray, *smaller], laptop)

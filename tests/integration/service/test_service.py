"""The service on Ray Serve, used by OpenAI's own client."""

import json
import math
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest
from s3transfer.manager import TransferManager

from cookbooks.quickstart.word_problems import TRAIN_KINDS, write_problems
from service.config import load_service
from service.keys import create_key
from tests.support.grids import only_in_test_service
from tests.support.jobs import PROJECT, environment, error_of, run_main
from tests.support.polling import start_long_job
from tests.support.ports import free_port
from tests.support.ray_cluster import RayCluster, ray_cluster
from tests.support.served import OPENAI, PREFERENCE_CLIENT, Served, run_client, served
from tests.support.service import write_service
from tests.support.shown_commands import service_commands
from tests.support.wandb_files import history_of, wandb_records
from utils.storage.embedded_bucket import EmbeddedBucket
from utils.storage.s3 import S3Store

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not OPENAI.is_dir(), reason="OpenAI's client is not installed: make setup-dev"),
]


NEEDLESS_PROCESSES = ("dashboard.py", "monitor.py", "AutoscalingCoordinator")
"""Processes that Ray starts by default, and that would delay the start of a service on this machine, and of its jobs."""


def check(received: dict[str, Any], model: str) -> None:
    job, failed = received["job"], received["failed"]
    assert job["status"] == "succeeded"
    order = ["validating_files", "queued", "running", "succeeded"]
    assert received["seen"] == [status for status in order if status in received["seen"]]
    assert failed["error"]["code"] == "invalid_file"
    assert failed["error"]["param"] == "training_file"
    assert f"{received['bad']}:1" in failed["error"]["message"]
    assert "s3://" not in failed["error"]["message"]
    assert (received["paused"], received["cancelled"]) == ("paused", "cancelled")
    assert received["listed"] == received["expected"]
    assert received["of_team"] == [job["id"]]
    steps = [event["data"]["step"] for event in received["events"] if event["type"] == "metrics"]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] == 0
    assert received["events"][-1]["message"] == "Created fine-tuning job"
    newest = received["checkpoints"][0]
    assert newest["step_number"] == steps[0]
    assert newest["metrics"]["valid_loss"] > 0
    lines = received["csv"].splitlines()
    assert lines[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert len(lines) == steps[0] + 1
    assert all(0 <= float(line.split(",")[2]) <= 1 for line in lines[1:])
    assert 0 <= float(lines[-1].split(",")[4]) <= 1
    assert received["unknown"]["code"] == "not_found"
    assert job["fine_tuned_model"].startswith(f"ft:{model}:default:first:")
    assert received["models"] == [model, job["fine_tuned_model"]]
    assert received["retrieved"] == [job["fine_tuned_model"], newest["fine_tuned_model_checkpoint"]]
    base, tuned, step = received["chats"]
    assert base["logprobs"] != tuned["logprobs"]
    tuned_id, step_id = received["retrieved"]
    for chat, asked in ((base, model), (tuned, tuned_id), (step, step_id)):
        assert chat["models"] == [asked]
        assert chat["streamed"] == chat["text"]
        assert chat["streamed_usage"] == chat["usage"]
        assert chat["usage"]["completion_tokens"] == len(chat["logprobs"]) <= 8
        assert chat["finish_reason"] in ("stop", "length")
    assert received["deleted"]
    assert received["models_after"] == [model]
    assert set(received["files_after"]) == {received["file"], job["result_files"][0]}


def test_openai_client_fine_tunes_a_model(tmp_path: Path, bucket_uri: str, tiny_model: Path):
    base = {"output_dir": str(tmp_path / "scratch"), "train_batch_size_per_device": 8, "learning_rate": 1e-3}
    published = f"{bucket_uri}/loras"
    config = write_service(tmp_path, bucket_uri, str(tiny_model), base, publish_path=published)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(write_problems(TRAIN_KINDS, 16, 1))
    with served(config) as service:
        assert service.key
        received = run_client(service.base_url, service.key, str(rows), "tiny")
        check(received, "tiny")
        assert {
            f"tiny/{received['job']['id']}/{name}"
            for name in ("adapter_config.json", "adapter_model.safetensors")
        } <= {item.key for item in S3Store(published).list()}
        assert not any(map(service.descendants, NEEDLESS_PROCESSES))
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(120) == 128 + signal.SIGTERM


@pytest.mark.slow
@only_in_test_service
def test_openai_client_trains_on_preferences(tmp_path: Path, bucket_uri: str, tiny_model: Path):
    base = {"output_dir": str(tmp_path / "scratch"), "train_batch_size_per_device": 2, "learning_rate": 1e-2}
    config = write_service(tmp_path, bucket_uri, str(tiny_model), base)
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps(preference(number)) + "\n" for number in range(8)))
    variables = {"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "offline"}
    with served(config, variables=variables) as service:
        assert service.key
        received = run_client(service.base_url, service.key, str(rows), "tiny", program=PREFERENCE_CLIENT)
        (path,) = (tmp_path / "scratch").rglob("*.wandb")
        logged = wandb_records(path)
    job, failed = received["job"], received["failed"]
    assert job["status"] == "succeeded", job["error"]
    hyperparameters = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.0, "beta": 0.3}
    assert job["method"]["dpo"]["hyperparameters"] == hyperparameters
    assert job["fine_tuned_model"] == received["answered_by"]
    assert failed["error"]["param"] == "training_file"
    assert f"{received['chats']}:1" in failed["error"]["message"]
    metrics = [event["data"] for event in reversed(received["events"]) if event["type"] == "metrics"]
    assert [figures["step"] for figures in metrics] == [0, 1, 2, 3, 4]
    # Before training, policy and reference are the same, and the loss of a pair is -log(sigmoid(0)).
    assert metrics[0]["valid_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert metrics[1]["train_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert metrics[-1]["valid_loss"] < 0.9 * metrics[0]["valid_loss"]
    newest = received["checkpoints"][0]
    assert newest["step_number"] == 4
    assert newest["metrics"]["valid_loss"] == metrics[-1]["valid_loss"]
    header, *lines = received["csv"].splitlines()
    assert header == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert [line.split(",")[0] for line in lines] == ["1", "2", "3", "4"]
    assert [float(line.split(",")[1]) for line in lines] == [each["train_loss"] for each in metrics[1:]]
    (integration,) = job["integrations"]
    assert integration["wandb"]["project"] == "tuning"
    (run,) = [record.run for record in logged if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name, list(run.tags)) == ("tuning", "first", ["a"])
    losses = [float(point["train/loss"]) for point in history_of(logged) if "train/loss" in point]
    assert losses == pytest.approx([each["train_loss"] for each in metrics[1:]])


def preference(number: int) -> dict[str, Any]:
    """Return a row in OpenAI's format for preferences."""
    question = {"role": "user", "content": f"{number} + 1?"}
    return {
        "input": {"messages": [question], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [{"role": "assistant", "content": f"{number + 1}."}],
        "non_preferred_output": [{"role": "assistant", "content": "I do not know."}],
    }


@only_in_test_service
@pytest.mark.slow
def test_openai_client_fine_tunes_on_an_existing_cluster(tmp_path: Path, bucket_uri: str, tiny_model: Path):
    base = {"output_dir": str(tmp_path / "scratch"), "train_batch_size_per_device": 8, "learning_rate": 1e-3}
    config = write_service(tmp_path, bucket_uri, str(tiny_model), base)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(write_problems(TRAIN_KINDS, 16, 1))
    with ray_cluster(3) as cluster, served(config, variables=cluster.variables) as service:
        assert service.key
        check(run_client(service.base_url, service.key, str(rows), "tiny"), "tiny")


OTHER_APPLICATION = """
import sys
import ray
from ray import serve

@serve.deployment(ray_actor_options={"num_cpus": 0})
class Other:
    def answer(self):
        return "still here"

ray.init(log_to_driver=False)
if sys.argv[1] == "start":
    serve.start(proxy_location="EveryNode", http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
    serve.run(Other.bind(), name="other", route_prefix="/other")
if sys.argv[1] == "status":
    print(serve.status().applications["fine-tuning"].status.value)
else:
    print(sorted(serve.status().applications), serve.get_app_handle("other").answer.remote().result())
"""


def other_application(cluster: RayCluster, *arguments: str) -> str:
    """Start an application beside the service, or ask it; return what it printed.

    Args:
        cluster: The cluster that it runs on.
        arguments: "start" and the port of Serve's proxies, "ask", or "status" for the status of the service.
    """
    command = [sys.executable, "-c", OTHER_APPLICATION, *arguments]
    variables = environment() | cluster.variables
    done = subprocess.run(command, env=variables, cwd=PROJECT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1]


def failed_serve(config: Path, variables: dict[str, str], port: int | None = None) -> str:
    """Return the error output of a service that does not start."""
    command = [str(PROJECT / "main.py"), "serve", str(config), "--port", str(port or free_port())]
    done = subprocess.run(
        [sys.executable, *command],
        env=environment() | variables,
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.slow
@only_in_test_service
def test_stopped_service_leaves_other_applications_running(tmp_path: Path, bucket_uri: str, tiny_model: Path):
    config = write_service(tmp_path, bucket_uri, str(tiny_model), {"output_dir": str(tmp_path / "scratch")})
    port = free_port()
    with ray_cluster(3) as cluster:
        assert other_application(cluster, "start", str(port)) == "['other'] still here"
        with served(config, port, variables=cluster.variables) as service:
            assert other_application(cluster, "ask") == "['fine-tuning', 'other'] still here"
            headers = {"Authorization": f"Bearer {service.key}"}
            models = httpx.get(f"{service.base_url}/models", headers=headers).json()["data"]
            assert [model["id"] for model in models] == ["tiny"]
            service.process.send_signal(signal.SIGTERM)
            assert service.process.wait(120) == 128 + signal.SIGTERM
        assert other_application(cluster, "ask") == "['other'] still here"


@pytest.mark.slow
@only_in_test_service
def test_start_that_fails_leaves_a_running_service(tmp_path: Path, bucket_uri: str, tiny_model: Path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.mkdir()
    bad.mkdir()
    config = write_service(good, bucket_uri, str(tiny_model), {"output_dir": str(tmp_path / "scratch")})
    port = free_port()
    with ray_cluster(3) as cluster, served(config, port, variables=cluster.variables) as service:
        headers = {"Authorization": f"Bearer {service.key}"}

        def models() -> list[str]:
            answer = httpx.get(f"{service.base_url}/models", headers=headers, timeout=60)
            return [model["id"] for model in answer.json()["data"]]

        error = failed_serve(config, cluster.variables)
        assert f"Serve already runs on the cluster at host: 127.0.0.1, port: {port}" in error
        rejected = {"tiny": {"config": "base.yaml", "resources": {"object_store_memory": 1}}}
        error = failed_serve(
            write_service(bad, bucket_uri, str(tiny_model), models=rejected), cluster.variables, port
        )
        assert "object_store_memory" in error
        assert models() == ["tiny"]
        error = failed_serve(write_service(bad, bucket_uri, f"{bucket_uri}/none"), cluster.variables, port)
        assert f"engine-tiny: utils.storage.store.NotFoundError: {bucket_uri}/none" in error, error
        assert models() == ["tiny"]


@pytest.mark.slow
@only_in_test_service
def test_process_exits_once_another_has_replaced_its_service(
    tmp_path: Path, bucket_uri: str, tiny_model: Path
):
    config = write_service(tmp_path, bucket_uri, str(tiny_model), {"output_dir": str(tmp_path / "scratch")})
    port = free_port()
    with ray_cluster(4) as cluster:
        with served(config, port, variables=cluster.variables) as first:
            headers = {"Authorization": f"Bearer {first.key}"}
            with served(config, port, variables=cluster.variables) as second:
                assert first.process.wait(120) == 0
                assert "another process has replaced the service" in first.errors.read_text()
                models = httpx.get(f"{second.base_url}/models", headers=headers, timeout=60).json()["data"]
                assert [model["id"] for model in models] == ["tiny"]
                second.process.send_signal(signal.SIGTERM)
                assert second.process.wait(120) == 128 + signal.SIGTERM
        assert other_application(cluster, "start", str(port)) == "['other'] still here"


@pytest.mark.slow
@only_in_test_service
def test_process_that_stops_passes_its_service_to_the_one_that_replaces_it(
    tmp_path: Path, bucket_uri: str, tiny_model: Path
):
    good, waiting = tmp_path / "good", tmp_path / "waiting"
    good.mkdir()
    waiting.mkdir()
    config = write_service(good, bucket_uri, str(tiny_model), {"output_dir": str(tmp_path / "scratch")})
    models = {"tiny": {"config": "base.yaml", "resources": {"licence": 1}}}
    never_ready = write_service(waiting, bucket_uri, str(tiny_model), models=models)
    port = free_port()
    command = [sys.executable, str(PROJECT / "main.py"), "serve", str(never_ready), "--port", str(port)]
    with ray_cluster(3) as cluster:
        assert other_application(cluster, "start", str(port)) == "['other'] still here"
        with served(config, port, variables=cluster.variables) as first:
            process = subprocess.Popen(
                command, env=environment() | cluster.variables, cwd=PROJECT, process_group=0
            )
            try:
                deadline = time.monotonic() + 120
                while other_application(cluster, "status") != "DEPLOYING":
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                first.process.send_signal(signal.SIGTERM)
                assert first.process.wait(120) == 128 + signal.SIGTERM
                assert "belongs to another process" in first.errors.read_text()
                assert other_application(cluster, "ask") == "['fine-tuning', 'other'] still here"
                process.send_signal(signal.SIGTERM)
                assert process.wait(120) == 128 + signal.SIGTERM
            finally:
                process.kill()
                process.wait()
        assert other_application(cluster, "ask") == "['other'] still here"


@pytest.mark.slow
@only_in_test_service
def test_service_that_cannot_start_is_an_error_and_leaves_no_application(
    tmp_path: Path, bucket_uri: str, tiny_model: Path
):
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.mkdir()
    bad.mkdir()
    config = write_service(good, bucket_uri, str(tiny_model), {"output_dir": str(tmp_path / "scratch")})
    with ray_cluster(3) as cluster:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            error = failed_serve(config, cluster.variables, port)
        assert f"Serve cannot start the service at host: 127.0.0.1, port: {port}" in error, error
        port = free_port()
        assert other_application(cluster, "start", str(port)) == "['other'] still here"
        error = failed_serve(config, cluster.variables)
        assert f"Serve already runs on the cluster at host: 127.0.0.1, port: {port}" in error
        assert other_application(cluster, "ask") == "['other'] still here"
        vllm = write_service(
            bad, bucket_uri, str(tiny_model), models={"tiny": {"config": "base.yaml", "engine": "vllm"}}
        )
        error = failed_serve(vllm, cluster.variables | {"ANNEAL_VLLM_PYTHON": "/none/python"}, port)
        assert "engine: vllm: /none/python does not exist" in error, error
        missing = write_service(bad, bucket_uri, f"{bucket_uri}/none")
        error = failed_serve(missing, cluster.variables, port)
        assert f"engine-tiny: utils.storage.store.NotFoundError: {bucket_uri}/none" in error, error
        assert other_application(cluster, "ask") == "['other'] still here"


@pytest.mark.slow
def test_engine_without_its_resources_is_an_error(tmp_path: Path, bucket_uri: str, tiny_model: Path):
    models = {"tiny": {"config": "base.yaml", "resources": {"GPU": 1, "licence": 1}}}
    config = write_service(tmp_path, bucket_uri, str(tiny_model), models=models)
    error = failed_serve(config, {"CUDA_VISIBLE_DEVICES": ""})
    assert "tiny need {GPU: 1}, but this machine has 0" in error


@pytest.mark.slow
@only_in_test_service
def test_signal_stops_a_service_that_waits_for_resources(tmp_path: Path, bucket_uri: str, tiny_model: Path):
    models = {"tiny": {"config": "base.yaml", "resources": {"licence": 1}}}
    config = write_service(tmp_path, bucket_uri, str(tiny_model), models=models)
    port = str(free_port())
    command = [sys.executable, str(PROJECT / "main.py"), "serve", str(config), "--port", port]
    with ray_cluster(3) as cluster:
        assert other_application(cluster, "start", port) == "['other'] still here"
        variables = environment() | cluster.variables
        process = subprocess.Popen(command, env=variables, cwd=PROJECT, process_group=0)
        try:
            deadline = time.monotonic() + 120
            while "fine-tuning" not in other_application(cluster, "ask"):
                assert process.poll() is None
                assert time.monotonic() < deadline
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 128 + signal.SIGTERM
        finally:
            process.kill()
            process.wait()
        assert other_application(cluster, "ask") == "['other'] still here"


@pytest.mark.slow
def test_dry_run_checks_bucket_models_and_memory(tmp_path: Path, bucket_uri: str, tiny_model: Path):
    base = {"output_dir": str(tmp_path / "scratch")}
    checked = run_main(
        Path("serve"), str(write_service(tmp_path, bucket_uri, str(tiny_model), base)), "--dry-run"
    )
    assert checked.exit_code == 0, checked.errors
    assert f"storage_path: {bucket_uri} is writable" in checked.output
    assert "models.tiny: supervised: " in checked.output
    assert "models.tiny: dpo: " in checked.output
    assert "per device" in checked.output
    assert S3Store(bucket_uri).list() == []
    missing = run_main(
        Path("serve"), str(write_service(tmp_path, bucket_uri, "s3://anneal/no/model", base)), "--dry-run"
    )
    assert "models.tiny: model_id" in error_of(missing)


def test_shown_commands_create_list_and_revoke_keys(bucket: EmbeddedBucket):
    shown = [arguments for arguments in service_commands() if arguments[0] == "keys"]
    created, listed, revoked = (run_main(Path(name), *arguments) for name, *arguments in shown)
    assert (created.exit_code, listed.exit_code, revoked.exit_code) == (0, 0, 0)
    assert created.output.startswith("sk-")
    assert "valid" in listed.output
    assert "revoked" in revoked.output
    assert created.output.strip() not in listed.output + revoked.output


@only_in_test_service
def test_openai_client_fine_tunes_the_quickstart_model(tmp_path: Path, bucket: EmbeddedBucket):
    subprocess.run(
        [sys.executable, str(PROJECT / "cookbooks" / "quickstart" / "prepare.py")], cwd=PROJECT, check=True
    )
    ((_, name),) = [shown for shown in service_commands() if shown[0] == "serve"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(write_problems(TRAIN_KINDS, 64, 1))
    with served(PROJECT / name, errors=tmp_path / "stderr") as service:
        key = service.key or create_key(S3Store(load_service(PROJECT / name).config.storage_path), "default")
        check(run_client(service.base_url, key, str(rows), "smollm2-135m", timeout=600), "smollm2-135m")


@pytest.mark.slow
@only_in_test_service
def test_idle_connection_stays_open(tmp_path: Path, bucket_uri: str, tiny_model: Path):
    config = write_service(tmp_path, bucket_uri, str(tiny_model), {"output_dir": str(tmp_path / "scratch")})
    with served(config) as service:
        host, port = service.base_url.removeprefix("http://").removesuffix("/v1").split(":")
        connection = HTTPConnection(host, int(port), timeout=30)
        for idle in (7, 0):
            connection.request("GET", "/healthz")
            assert connection.getresponse().read() == b"ok\n"
            time.sleep(idle)
        connection.close()


@only_in_test_service
def test_100_clients_that_poll_a_job_get_no_server_error(tmp_path: Path, bucket_uri: str, tiny_model: Path):
    """For a minute, each client asks for the running job and its newest events once a second."""
    base = {"output_dir": str(tmp_path / "scratch"), "train_batch_size_per_device": 4}
    limits = {"requests_per_minute": 10**6}
    config = write_service(tmp_path, bucket_uri, str(tiny_model), base, limits=limits)
    content = write_problems(TRAIN_KINDS, 2048, 1).encode()
    with served(config) as service:
        job = start_long_job(service, content, tmp_path / "scratch", hyperparameters={"n_epochs": 50})
        _, answered = job.speed(clients=100, seconds=60)
        job.cancel()
    assert set(answered) == {200}
    assert answered[200] > 1000


@only_in_test_service
def test_upload_of_1_gb_takes_64_mb_of_memory(
    tmp_path: Path, bucket_uri: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]
):
    """Time: at most 1.2 times that of boto3's own upload of the same file, side by side."""
    content = tmp_path / "rows.jsonl"
    block = b"x" * 999_999 + b"\n"
    with content.open("wb") as file:
        for _ in range(1000):
            file.write(block)
    config = write_service(tmp_path, bucket_uri, str(tiny_model), limits={"file_bytes": 2 * 10**9})
    store = S3Store(bucket_uri)
    ratios = []
    with served(config) as service:
        (replica,) = service.descendants("ServeReplica:fine-tuning:api")
        before, peaks = replica.memory_info().rss, list[int]()
        for number in range(3):
            began = time.monotonic()
            with content.open("rb") as file, TransferManager(store._client()) as transfers:
                transfers.upload(file, store.bucket, f"{store.prefix}/boto3-{number}").result()
            of_boto3 = time.monotonic() - began
            began = time.monotonic()
            sizes: list[int] = []
            with sampled(lambda: sizes.append(replica.memory_info().rss)):  # noqa: B023
                upload(service, content)
            ratios.append((time.monotonic() - began) / of_boto3)
            peaks.append(max(sizes) - before)
    with capsys.disabled():
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        grown = ", ".join(f"{peak / 1e6:.0f}" for peak in peaks)
        print(f"(1 GB: {grown} MB of memory; {shown} times as long as boto3)")
    assert max(peaks) < 64_000_000
    assert statistics.median(ratios) < 1.2


@contextmanager
def sampled(sample: Callable[[], None]) -> Iterator[None]:
    """Call a function every 20 ms within the block."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(0.02):
            sample()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def upload(service: Served, content: Path) -> None:
    """Send a file with as little work as possible in this process, which has the same two cores."""
    name = b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    head = name + b'--B\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'
    tail = b"\r\n--B--\r\n"
    length = len(head) + content.stat().st_size + len(tail)
    host, port = service.base_url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port))) as connection, content.open("rb") as file:
        lines = [
            "POST /v1/files HTTP/1.1",
            "Host: x",
            f"Authorization: Bearer {service.key}",
            f"Content-Length: {length}",
        ]
        lines += ["Content-Type: multipart/form-data; boundary=B", "Connection: close", "", ""]
        connection.sendall("\r\n".join(lines).encode() + head)
        connection.sendfile(file)
        connection.sendall(tail)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")

"""A cluster that is lost while a process is connected to it, but does not train: one line with the cause, the log and the fix."""

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.faults import small_shard_variables
from tests.support.grids import only_in_test_nodes
from tests.support.jobs import PROJECT, Job, descendants, environment, started, tiny_settings, write_yaml
from tests.support.messages import assert_names
from tests.support.own_buckets import set_up_own_bucket
from tests.support.ray_cluster import ray_cluster
from tests.support.tiny_model import make_model_and_data
from utils.storage.bucket import open_store
from utils.storage.embedded_bucket import EmbeddedBucket

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

MOST_SECONDS = 20  # measured: 1 to 14; Ray itself takes 60 for the GCS, and prints nothing


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a tiny model with rows that are checked for longer than a test takes."""
    directory = make_model_and_data(tmp_path_factory.mktemp("lost"))
    rows = (directory / "train.jsonl").read_text()
    (directory / "train.jsonl").write_text(rows * 20_000)
    return directory


def end_of(job: Job, began: float) -> str:
    """Return the error line of a job that lost its cluster at a time."""
    finished = job.end()
    assert time.monotonic() - began < MOST_SECONDS
    assert finished.exit_code == 1, finished.errors
    assert finished.errors.count("error: ") == 1, finished.errors
    assert "Traceback" not in finished.errors
    (line,) = [line for line in finished.errors.splitlines() if line.startswith("error: ")]
    assert_names(line, "cluster was lost", "Run the same command again.")
    return line


@pytest.mark.parametrize(
    ("process", "log"),
    [
        ("gcs_server", "gcs_server.out"),
        pytest.param("raylet", "raylet.out", marks=only_in_test_nodes),
    ],
)
def test_cluster_of_this_machine_that_is_lost_while_the_run_is_planned(
    process: str, log: str, files: Path, tmp_path: Path
):
    settings = tiny_settings(files) | {"num_devices": 1, "train_batch_size_per_device": 4}
    with started(write_yaml(tmp_path / "run.yaml", settings)) as job:
        job.wait_until(lambda: bool(job.workers()), "the first worker")
        job.wait_for_line("checking the rows")
        children = psutil.Process(job.process.pid).children(recursive=True)
        (found,) = descendants(job.process.pid, process)
        found.kill()
        line = end_of(job, time.monotonic())
    assert log in line
    assert Path(line.partition("Its log: ")[2].partition(". ")[0]).exists(), line
    assert not (files / "runs").exists()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


@pytest.mark.parametrize(
    ("started_last", "killed"),
    [
        pytest.param("gcs_server", "gcs_server", marks=only_in_test_nodes),
        ("raylet", "gcs_server"),
        pytest.param("raylet", "raylet", marks=only_in_test_nodes),
    ],
    ids=["GCS at its start", "GCS while the raylet starts", "raylet at its start"],
)
def test_cluster_of_this_machine_that_is_lost_while_it_starts(
    started_last: str, killed: str, files: Path, tmp_path: Path
):
    settings = tiny_settings(files) | {"num_devices": 1, "train_path": str(files / "valid.jsonl")}
    with started(write_yaml(tmp_path / "run.yaml", settings)) as job:
        job.wait_until(lambda: started_last in _names(job), started_last)
        children = _names(job)
        children[killed].kill()
        line = end_of(job, time.monotonic())
    assert ("the GCS has exited" if killed == "gcs_server" else "the raylet has exited") in line
    assert Path(line.partition("Its log: ")[2].partition(". ")[0]).exists(), line
    assert not (files / "runs").exists()
    _, alive = psutil.wait_procs(list(children.values()), timeout=60)
    assert not alive


def _names(job: Job) -> dict[str, psutil.Process]:
    """Return the descendants of a job by name."""
    found = {}
    for child in psutil.Process(job.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found[child.name()] = child
    return found


def test_cluster_that_is_lost_while_a_dry_run_asks_it(files: Path, tmp_path: Path):
    """Ray blocks the main thread in calls to the GCS, which no signal interrupts."""
    settings = tiny_settings(files) | {"num_devices": 1, "train_path": str(files / "valid.jsonl")}
    config = write_yaml(tmp_path / "run.yaml", settings)
    with ray_cluster(cpus=1) as cluster, started(config, cluster.variables, arguments=["--dry-run"]) as job:
        job.wait_for_line("checking the cluster")
        cluster.kill_head("gcs_server")
        assert "gcs_server.out" in end_of(job, time.monotonic())


@only_in_test_nodes
def test_cluster_that_is_lost_while_it_prepares_rows(files: Path, bucket: EmbeddedBucket, tmp_path: Path):
    with pytest.MonkeyPatch.context() as patch:
        uri = set_up_own_bucket(patch, bucket, "lost")
        store = open_store(uri)
        store.upload(files / "train.jsonl", "train.jsonl")
        settings = tiny_settings(files) | {
            "train_path": f"{uri}/train.jsonl",
            "valid_path": None,
            "storage_path": f"{uri}/runs",
            "num_devices": 1,
        }
        del settings["output_dir"]
        variables = small_shard_variables(1_000_000) | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        with (
            ray_cluster(cpus=1) as cluster,
            started(write_yaml(tmp_path / "run.yaml", settings), cluster.variables | variables) as job,
        ):
            job.wait_until(
                lambda: any("/data-" in item.key for item in store.list("runs/prepared/")), "a shard"
            )
            cluster.kill_head("gcs_server")
            assert "gcs_server.out" in end_of(job, time.monotonic())
        assert store.list("runs/prepared/") == [], "no summary names them"


WORK_WHILE_CONNECTED = """
import sys, time
import ray
from configs.schema import FinetuneConfig
from training.launch.row_tasks import rows_on_cluster
from training.planning.endpoints import target_cluster
from utils.errors import AnnealError
from utils.processes import raise_signals
raise_signals()
config = FinetuneConfig.model_validate({"model_id": "m", "train_path": "rows.jsonl", "device": "cpu"})
try:
    with rows_on_cluster(config, target_cluster()) as connect, connect():
        print("connected", flush=True)
        sys.stdin.readline()
        exec(sys.argv[1])
except AnnealError as error:
    print(f"raised: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(
    ("work", "how"),
    [
        pytest.param("time.sleep(100)", "raised: ", marks=only_in_test_nodes),
        ("ray.nodes(); time.sleep(100)", "error: "),
    ],
    ids=["joins the rows", "asks the GCS"],
)
def test_cluster_that_is_lost_while_the_driver_works_on_prepared_rows(work: str, how: str):
    with ray_cluster(cpus=1) as cluster:
        driver = subprocess.Popen(
            [sys.executable, "-c", WORK_WHILE_CONNECTED, work],
            cwd=PROJECT,
            env=environment() | cluster.variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert driver.stdout and driver.stdout.readline() == "connected\n"
            cluster.kill_head("gcs_server")
            killed = time.monotonic()
            _, errors = driver.communicate("\n", timeout=100)
        finally:
            driver.kill()
            driver.wait()
    assert time.monotonic() - killed < MOST_SECONDS
    assert driver.returncode == 1, errors
    (line,) = [line for line in errors.splitlines() if "cluster was lost" in line]
    assert_names(line, "gcs_server.out", "Run the same command again.")
    assert line.startswith(how), line

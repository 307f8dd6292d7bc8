"""A submitted run is the same run as that of its YAML on this machine: equal name, settings and rows, whatever the paths are."""

import os
import shlex
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any, cast

import pytest
from ray.job_submission import JobSubmissionClient

from configs.loading import ConfigError, LoadedConfig, load_config, with_written
from runs.layout import RESULT_FILE
from tests.support.front_door import run_main_quickly
from tests.support.jobs import tiny_settings, write_yaml
from tests.support.messages import assert_names
from tests.support.stored_runs import commit_plan, make_result, write_lease
from tests.support.tiny_model import make_model_and_data
from training.checkpoints.lease import LeaseError
from training.launch.packaging import Package, pack
from training.launch.submission import check_from_here, submit
from training.planning.endpoints import ClusterTarget
from training.planning.plan import RunPlan
from training.planning.planner import make_plan
from training.planning.report import PlanReport
from utils.processes import started_after_boot, this_machine
from utils.storage.bucket import open_store

HERE = ClusterTarget(None)
JOB_SERVER = ClusterTarget("http://127.0.0.1:8265")
AS_WRITTEN: dict[str, Any] = {
    "model_id": "model",
    "train_path": ["train.jsonl"],
    "valid_path": {"all": "./valid.jsonl"},
    "chat_template": "chat.jinja",
    "deepspeed": {"config_path": "zero.json"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_and_data(tmp_path_factory.mktemp("identity"))


@pytest.fixture
def files(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working directory with a model and rows, because the paths in the YAMLs are relative."""
    files = tmp_path / "laptop"
    shutil.copytree(made, files)
    shutil.copyfile(files / "model" / "chat_template.jinja", files / "chat.jinja")
    (files / "zero.json").write_text('{"zero_optimization": {"stage": 1}}')
    monkeypatch.chdir(files)
    return files


def load(files: Path, **changes: Any) -> LoadedConfig:
    """Return the YAML of a run whose rows have a relative path and whose storage has an absolute one."""
    settings = tiny_settings(files) | {"train_path": "train.jsonl", "output_dir": None} | changes
    return load_config(write_yaml(files / "sub.yaml", settings))


def pack_into(directory: Path, loaded: LoadedConfig) -> Package:
    directory.mkdir()
    return pack(loaded, directory)


def plan(loaded: LoadedConfig, directory: Path = Path()) -> tuple[RunPlan, PlanReport]:
    """Return the plan of a run that starts in a directory."""
    with chdir(directory):
        return make_plan(loaded, target=HERE)[:2]


def load_in_job(package: Package, *, written: bool = True) -> LoadedConfig:
    """Return the YAML as main.py loads it in a job; without `written` as a job of an earlier version did."""
    loaded = load_config(package.directory / package.yaml)
    return with_written(loaded, load_config(package.directory / package.written)) if written else loaded


def test_submitted_run_has_the_name_settings_and_paths_of_its_yaml(files: Path, tmp_path: Path):
    loaded = load(files, **AS_WRITTEN)
    package = pack_into(tmp_path / "job", loaded)
    here, _ = plan(loaded)
    for packed in (package.loaded, load_in_job(package)):
        job, job_report = plan(packed, package.directory)
        assert (job.run_name, job.config_hash) == (here.run_name, here.config_hash)
        for key, value in AS_WRITTEN.items():
            assert job.config.model_dump()[key] == value
        assert [source.path for source in job_report.train.sources] == ["train.jsonl"]


class JobServer:
    """A job server that keeps what it is sent."""

    def submit_job(self, **sent: Any) -> str:
        self.sent = sent
        return "job-1"


def test_job_has_the_name_that_its_yaml_has_here(files: Path, tmp_path: Path):
    loaded = load(files)
    package = pack_into(tmp_path / "job", loaded)
    server = JobServer()
    submit(cast(JobSubmissionClient, server), "http://127.0.0.1:8265", package, ["python", "main.py"])
    job_yaml = shlex.split(server.sent["entrypoint"])[2]
    with chdir(server.sent["runtime_env"]["working_dir"]):
        planned = run_main_quickly(
            Path(job_yaml), "--dry-run", "--json", variables=server.sent["runtime_env"]["env_vars"]
        )
    assert planned.exit_code == 0, planned.errors
    assert planned.result["run_name"] == plan(loaded)[0].run_name


@pytest.mark.parametrize("submitted_first", [True, False])
def test_run_started_as_a_job_resumes_here_and_vice_versa(files: Path, tmp_path: Path, submitted_first: bool):
    loaded = load(files, run_name="sub-a")
    package = pack_into(tmp_path / "job", loaded)
    sides = [(load_in_job(package), package.directory), (loaded, files)]
    first, second = sides if submitted_first else sides[::-1]
    commit_plan(plan(*first)[0])
    assert plan(*second)[1].resumes_from


@pytest.mark.parametrize("name", [{"run_name": "moved"}, {"run_name": "moved", "valid_path": None}])
def test_equal_rows_at_another_path_are_the_same_run(files: Path, name: dict[str, Any]):
    original = plan(load(files, **name))[0]
    commit_plan(original)
    shutil.copyfile(files / "train.jsonl", files / "copy.jsonl")
    moved = load(files, train_path="copy.jsonl", **name)
    continued, report = plan(moved)
    assert report.resumes_from
    assert continued.config.train_path == "train.jsonl", "the record of the run stays one with its hash"
    assert continued.config_hash == original.config_hash
    with pytest.raises(ConfigError) as error:
        plan(load(files, train_path="copy.jsonl", seed=9, **name))
    assert_names(str(error.value), "different settings", "seed")
    assert "train_path" not in str(error.value)
    (files / "copy.jsonl").write_text((files / "train.jsonl").read_text().replace("1", "2"))
    with pytest.raises(ConfigError) as error:
        plan(load(files, train_path="copy.jsonl", **name))
    assert_names(str(error.value), "train_path: the rows have changed", "train.jsonl -> copy.jsonl")


def test_run_that_an_earlier_version_submitted_continues(files: Path, tmp_path: Path):
    """Its settings have the paths of rows that were in the job's directory."""
    loaded = load(files, run_name="sub-a", model_id="file://" + str(files / "model"))
    package = pack_into(tmp_path / "job", loaded)
    earlier = plan(load_in_job(package, written=False), package.directory)[0]
    assert earlier.config.train_path == "files/train_path/train.jsonl"
    commit_plan(earlier)
    assert plan(loaded)[1].resumes_from


def check(package: Package) -> PlanReport | str:
    return check_from_here(package, JOB_SERVER, lambda *_: None)


@pytest.mark.parametrize("name", [{"run_name": "sub-a"}, {}])
def test_records_in_a_storage_path_that_exists_here_are_read(
    files: Path, tmp_path: Path, name: dict[str, Any]
):
    loaded = load(files, **name)
    package = pack_into(tmp_path / "job", loaded)
    assert check(package) == "storage_path: a path of the cluster's machines"
    first = plan(loaded)[0]
    commit_plan(first)
    unfinished = check(package)
    assert isinstance(unfinished, PlanReport)
    assert unfinished.resumes_from
    store = open_store(first.run_uri)
    checkpoint = f"{first.run_uri}/checkpoints/step-000001"
    result = make_result(first.run_uri, [], best_checkpoint=checkpoint, last_checkpoint=checkpoint)
    store.write(RESULT_FILE, result.model_dump_json().encode())
    completed = check(package)
    assert isinstance(completed, PlanReport)
    assert completed.completed == result


def test_run_whose_driver_is_alive_here_is_not_submitted(files: Path, tmp_path: Path):
    loaded = load(files, run_name="sub-a")
    package = pack_into(tmp_path / "job", loaded)
    first = plan(loaded)[0]
    commit_plan(first)
    alive = {
        "machine": this_machine(),
        "process": os.getpid(),
        "process_started": started_after_boot(os.getpid()),
    }
    write_lease(open_store(str(files / "runs")), "sub-a", **alive)
    with pytest.raises(LeaseError, match="is being trained by ann@elsewhere"):
        check(package)


def test_rows_that_only_the_cluster_has_leave_the_check_to_the_job(files: Path, tmp_path: Path):
    loaded = load(files, run_name="sub-a")
    commit_plan(plan(loaded)[0])
    package = pack_into(
        tmp_path / "job", load(files, run_name="sub-a", train_path="file:///mnt/none/rows.jsonl")
    )
    assert check(package) == "train_path, storage_path: paths of the cluster's machines"

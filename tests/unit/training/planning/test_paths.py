"""Storage and scratch directory of a run, in and outside an Anyscale workspace."""

from pathlib import Path

import pytest

from configs.loading import load_config
from configs.schema import FinetuneConfig
from runs import layout
from training.planning import paths
from training.planning.paths import scratch_directory, storage_path


@pytest.fixture
def config(tmp_path: Path) -> FinetuneConfig:
    (tmp_path / "config.yaml").write_text("{model_id: org/name, train_path: train.jsonl}")
    return load_config(tmp_path / "config.yaml").config


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Move a workspace's directories from /mnt to a temporary directory and return it."""
    for module, name, directory in (
        (layout, "CLUSTER_STORAGE", "cluster_storage"),
        (paths, "LOCAL_STORAGE", "local_storage"),
    ):
        assert getattr(module, name) == Path("/mnt") / directory
        monkeypatch.setattr(module, name, tmp_path / "mnt" / directory)
    monkeypatch.delenv("ANYSCALE_ARTIFACT_STORAGE", raising=False)
    return tmp_path / "mnt"


def test_embedded_bucket_and_user_cache_are_used_outside_a_workspace(
    config: FinetuneConfig, workspace: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/user/.cache")
    assert storage_path(config) == "s3://anneal/runs"
    assert scratch_directory(config) == Path("/home/user/.cache/anneal")


def test_workspace_provides_shared_storage_and_local_scratch(
    config: FinetuneConfig, workspace: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("cluster_storage", "local_storage"):
        (workspace / name).mkdir(parents=True)
    assert storage_path(config) == str(workspace / "cluster_storage" / "anneal")
    assert scratch_directory(config) == workspace / "local_storage" / "anneal"
    monkeypatch.setenv("ANYSCALE_ARTIFACT_STORAGE", "s3://org/artifacts")
    assert storage_path(config) == "s3://org/artifacts/anneal"


def test_yaml_paths_override_those_of_the_workspace(config: FinetuneConfig, workspace: Path):
    for name in ("cluster_storage", "local_storage"):
        (workspace / name).mkdir(parents=True)
    configured = config.model_copy(update={"storage_path": "s3://my/runs", "output_dir": "/scratch"})
    assert storage_path(configured) == "s3://my/runs"
    assert scratch_directory(configured) == Path("/scratch")

"""Checks of batch size, disks and packages, made before a cluster is started."""

from pathlib import Path
from typing import Any

import pytest

from configs.loading import ConfigError, LoadedConfig
from configs.schema import FinetuneConfig
from training.planning import checks
from training.planning.checks import check_batch, check_checkpoint_fits, reject_missing_requirements
from training.planning.endpoints import ClusterTarget

LOCAL = ClusterTarget(None)


def config(**keys: Any) -> FinetuneConfig:
    defaults = {"model_id": "org/name", "train_path": "rows.jsonl", "train_batch_size_per_device": 1}
    return FinetuneConfig.model_validate(defaults | keys)


@pytest.mark.parametrize("key", ["train_batch_size_per_device", "gradient_accumulation_steps", "num_devices"])
def test_step_of_far_more_rows_than_the_data_is_rejected(key: str):
    with pytest.raises(ConfigError, match=rf"^{key}: .*100,000,000,000,000.*\b40\b.*Lower"):
        check_batch(config(**{key: 10**14}), rows=40)
    check_batch(config(**{key: 1000}), rows=40)


def test_checkpoint_that_fits_on_no_disk_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs, scratch = tmp_path / "runs", tmp_path / "scratch"
    free = {runs: 20 * 1024**2, scratch: 10**12}
    monkeypatch.setattr(checks, "free_bytes", free.__getitem__)
    with pytest.raises(ConfigError, match=rf"^storage_path: .*26\.0 MiB.*{runs} has 20\.0 MiB.*larger disk"):
        check_checkpoint_fits(26 * 1024**2, str(runs), scratch)
    check_checkpoint_fits(19 * 1024**2, str(runs), scratch)
    check_checkpoint_fits(26 * 1024**2, "s3://bucket/runs", scratch)
    free[scratch] = 0
    with pytest.raises(ConfigError, match=r"^output_dir: "):
        check_checkpoint_fits(1, "s3://bucket/runs", scratch)


def test_tracker_of_a_submitted_run_is_not_asked_of_this_machine(monkeypatch: pytest.MonkeyPatch):
    """The job checks its own environment."""
    monkeypatch.setattr(checks, "is_installed", lambda package: False)
    tracked = config(logger={"provider": "wandb", "project": "p"})
    loaded = LoadedConfig(tracked, Path("a.yaml"), (), (), frozenset())
    with pytest.raises(ConfigError, match=r"^logger: "):
        reject_missing_requirements(loaded, LOCAL)
    reject_missing_requirements(loaded, ClusterTarget("http://head:8265"))

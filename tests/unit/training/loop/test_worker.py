"""Inputs and callbacks of a worker."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from configs.loading import load_config
from configs.schema import FinetuneConfig
from tests.support.bucket_proxy import bucket_proxy
from tests.support.jobs import tiny_settings, write_yaml
from tests.support.own_buckets import set_up_own_bucket
from tests.support.tiny_model import write_data
from training.checkpoints.lease import held_lease
from training.events import Event, Phase
from training.loop.callbacks import Preempted
from training.loop.worker import _callbacks, _prepare_inputs, cpu_threads
from training.planning.endpoints import ClusterTarget
from training.planning.planner import make_plan
from training.world import World
from utils.files import FilesInUse
from utils.storage.bucket import open_store
from utils.storage.embedded_bucket import EmbeddedBucket


@pytest.mark.parametrize(("address", "watches"), [(None, False), ("head:6379", True)])
def test_preemption_notices_are_checked_only_on_a_remote_cluster(address: str | None, watches: bool):
    """The check broadcasts in every step, and a local cluster gets no notices."""
    plan: Any = SimpleNamespace(
        config=FinetuneConfig(model_id="a", train_path="b"),
        steps_per_epoch=10,
        max_steps=20,
        resolved=SimpleNamespace(target=ClusterTarget(address)),
    )
    inputs: Any = SimpleNamespace(valid=None, mapped=FilesInUse(()), resume=SimpleNamespace(directory=None))
    callbacks = _callbacks(plan, inputs, MagicMock(), World(1, 1, 2, 2, 0), MagicMock(), MagicMock())
    assert any(isinstance(callback, Preempted) for callback in callbacks) == watches


@pytest.mark.slow
def test_weights_are_downloaded_while_libraries_load(
    bucket: EmbeddedBucket, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    uri = set_up_own_bucket(monkeypatch, bucket, "weights-in-background")
    open_store(f"{uri}/model").upload_many({path.name: path for path in tiny_model.iterdir()})
    write_data(tmp_path)
    with bucket_proxy(bucket.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        settings = tiny_settings(tmp_path) | {"model_id": f"{uri}/model"}
        plan, _, _ = make_plan(
            load_config(write_yaml(tmp_path / "run.yaml", settings)), target=ClusterTarget(None)
        )
        proxy.requests.clear()

        def emit(event: Event) -> None:
            deadline = time.monotonic() + 120
            while event == Phase("loading libraries") and time.monotonic() < deadline:
                if any(
                    request.is_download and request.path.endswith(".safetensors")
                    for request in proxy.requests
                ):
                    return
                time.sleep(0.01)
            assert event != Phase("loading libraries"), proxy.requests

        driver: Any = SimpleNamespace(emit=emit)
        with held_lease(open_store(plan.run_uri), waiting=lambda _: None) as lease:
            inputs = _prepare_inputs(plan, lease, World(0, 0, 1, 1, 0), driver)
    name = "model.safetensors"
    assert (inputs.model_directory / name).read_bytes() == (tiny_model / name).read_bytes()


@pytest.mark.parametrize(
    ("requested", "local_world_size", "cores", "threads"),
    [
        (None, 1, 8, 8),
        (None, 3, 8, 2),
        (None, 4, 2, 1),
        (1, 1, 8, 1),
        (2.0, 3, 8, 2),
        (0.5, 1, 8, 1),
        (16, 1, 8, 8),
    ],
)
def test_threads_of_a_worker_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
    requested: float | None,
    local_world_size: int,
    cores: int,
    threads: int,
):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    assert cpu_threads(requested, local_world_size) == threads

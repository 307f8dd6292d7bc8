"""Callbacks of a worker."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from configs.schema import FinetuneConfig
from training.loop.callbacks import Preempted
from training.loop.worker import _callbacks
from training.planning.endpoints import ClusterTarget
from training.world import World
from utils.files import FilesInUse


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

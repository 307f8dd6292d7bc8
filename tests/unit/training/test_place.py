"""How workers talk with each other, without Ray."""

from collections.abc import Iterator

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from training.place import World


@pytest.fixture
def group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_workers_on_cpu_leave_the_gpus_of_their_node_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    place = World(rank=0, local_rank=0, world_size=2, local_world_size=2, node_rank=0)
    assert place.broadcast(True)
    assert not place.broadcast(False)

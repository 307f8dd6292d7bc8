"""Collectives of `World` between two real worker processes over gloo, without Ray."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from training.world import World, exclude_frozen_weights_from_sync

pytestmark = pytest.mark.slow

WORLD_SIZE = 2


def _exchange(rank: int, directory: Path) -> None:
    """Run one worker: call every collective and save the values that this rank receives."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=WORLD_SIZE
    )
    # A worker on CPU can see the GPUs of its node; torch's CPU build raises an error as soon as one is used.
    torch.cuda.is_available = lambda: True
    world = World(rank=rank, local_rank=rank, world_size=WORLD_SIZE, local_world_size=WORLD_SIZE, node_rank=0)
    patient = world.with_long_timeout()
    received = {
        # Each rank passes a different flag; only rank 0's may be returned.
        "true": world.broadcast(rank == 0),
        "false": world.broadcast(rank != 0),
        "gathered": world.gather({"rank": rank}),
        "own group": patient.group is not None,
        "patient true": patient.broadcast(rank == 0),
        "patient gathered": patient.gather(rank),
    }
    layers = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)).requires_grad_(False)
    layers[1].requires_grad_(True)
    for parameter in layers.parameters():
        parameter.data.fill_(rank)
    exclude_frozen_weights_from_sync(layers)
    torch.nn.parallel.DistributedDataParallel(layers)
    received |= {"frozen": layers[0].weight.item(), "trained": layers[1].weight.item()}
    torch.save(received, directory / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def received(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the values that each rank received, in rank order."""
    directory = tmp_path_factory.mktemp("world")
    spawn(_exchange, (directory,), nprocs=WORLD_SIZE)
    return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]


def test_broadcast_returns_the_flag_of_rank_0_on_every_rank(received: list[dict[str, Any]]):
    assert [(values["true"], values["false"]) for values in received] == [(True, False)] * WORLD_SIZE


def test_gather_returns_all_values_in_rank_order_on_every_rank(received: list[dict[str, Any]]):
    assert [values["gathered"] for values in received] == [[{"rank": 0}, {"rank": 1}]] * WORLD_SIZE


def test_patient_group_is_separate_and_supports_all_collectives(received: list[dict[str, Any]]):
    assert [(values["own group"], values["patient true"]) for values in received] == [
        (True, True)
    ] * WORLD_SIZE
    assert [values["patient gathered"] for values in received] == [[0, 1]] * WORLD_SIZE


def test_ddp_broadcasts_trained_weights_only(received: list[dict[str, Any]]):
    assert [values["trained"] for values in received] == [0, 0]
    assert [values["frozen"] for values in received] == [0, 1]

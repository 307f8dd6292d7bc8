"""Collective calls between two real worker processes over gloo, without Ray."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from training.world import World

WORLD_SIZE = 2


def _exchange(rank: int, directory: Path) -> None:
    """Be one worker: make every collective call and save what this rank received."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=WORLD_SIZE
    )
    # A worker on CPU can see the GPUs of its node; torch's CPU build raises an error as soon as one is used.
    torch.cuda.is_available = lambda: True
    world = World(rank=rank, local_rank=rank, world_size=WORLD_SIZE, local_world_size=WORLD_SIZE, node_rank=0)
    patient = world.with_patient_group()
    received = {
        # Each rank passes another flag: only rank 0's may arrive.
        "true": world.broadcast(rank == 0),
        "false": world.broadcast(rank != 0),
        "gathered": world.gather({"rank": rank}),
        "own group": patient.group is not None,
        "patient true": patient.broadcast(rank == 0),
        "patient gathered": patient.gather(rank),
    }
    torch.save(received, directory / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def received(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank received, by rank."""
    directory = tmp_path_factory.mktemp("world")
    spawn(_exchange, (directory,), nprocs=WORLD_SIZE)
    return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]


def test_every_rank_receives_the_flag_of_rank_0(received: list[dict[str, Any]]):
    assert [(of_rank["true"], of_rank["false"]) for of_rank in received] == [(True, False)] * WORLD_SIZE


def test_every_rank_receives_all_values_in_rank_order(received: list[dict[str, Any]]):
    assert [of_rank["gathered"] for of_rank in received] == [[{"rank": 0}, {"rank": 1}]] * WORLD_SIZE


def test_the_patient_group_is_separate_and_carries_the_same_calls(received: list[dict[str, Any]]):
    assert [(of_rank["own group"], of_rank["patient true"]) for of_rank in received] == [
        (True, True)
    ] * WORLD_SIZE
    assert [of_rank["patient gathered"] for of_rank in received] == [[0, 1]] * WORLD_SIZE

"""How many workers a run with a range has, and their random states when that changes."""

from pathlib import Path

import pytest
from ray.train import ScalingConfig

from training.trainers import has_random_states, seed_of_new_rank
from training.worker_groups import GroupSizes


@pytest.mark.parametrize(
    ("cpus", "workers"), [((1, 0), 0), ((1, 2), 2), ((3, 2), 2), ((4, 2), 6), ((9, 9), 6)]
)
def test_only_so_many_as_can_share_a_step(cpus: tuple[int, int], workers: int):
    """Ray would take 3 or 5; below the fewest there are none."""
    scaling = ScalingConfig(num_workers=(2, 6), resources_per_worker={"CPU": 1})
    sizes = GroupSizes(scaling, (2, 6), None)
    reserved = {f"node {number}": {"CPU": float(count)} for number, count in enumerate(cpus)}
    assert sizes._count_possible_workers(reserved) == workers


def test_random_states_are_those_of_the_same_rank_among_as_many(tmp_path: Path):
    for name in ("rng_state_0.pth", "rng_state_1.pth"):
        (tmp_path / name).touch()
    assert [has_random_states(tmp_path, rank, 3) for rank in range(3)] == [True, True, False]
    assert not has_random_states(tmp_path, 0, 1)


def test_ranks_without_random_states_get_each_their_own():
    seeds = {seed_of_new_rank(seed, step, rank) for seed in (1, 2) for step in (10, 20) for rank in range(3)}
    assert len(seeds) == 12
    assert seed_of_new_rank(1, 10, 2) == seed_of_new_rank(1, 10, 2)
    assert max(seeds) < 2**32

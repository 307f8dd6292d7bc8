"""Random states of ranks when the number of workers changes."""

from pathlib import Path

from training.loop.trainers import has_random_states, seed_of_new_rank


def test_random_states_are_found_by_rank(tmp_path: Path):
    for name in ("rng_state_0.pth", "rng_state_1.pth"):
        (tmp_path / name).touch()
    assert [has_random_states(tmp_path, rank, 3) for rank in range(3)] == [True, True, False]
    assert not has_random_states(tmp_path, 0, 1)


def test_ranks_without_random_states_get_distinct_reproducible_seeds():
    seeds = {seed_of_new_rank(seed, step, rank) for seed in (1, 2) for step in (10, 20) for rank in range(3)}
    assert len(seeds) == 12
    assert seed_of_new_rank(1, 10, 2) == seed_of_new_rank(1, 10, 2)
    assert max(seeds) < 2**32

"""The order of rows in batches and steps, and the packing of rows into sequences."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import FinetuneConfig
from training.data.batches import PADDING_ROW, BatchPlan, BatchShape, TrainBatches, eval_batches, pack
from training.planning.plan import order_of as plan_order

ROWS = 203
LENGTHS = np.random.default_rng(0).integers(2, 400, ROWS)


def make_plan(
    batch_size: int, world_size: int, accumulation: int, *, grouped: bool, seed: int = 1
) -> BatchPlan:
    shape = BatchShape(ROWS, batch_size, world_size, accumulation)
    return BatchPlan(shape, seed, lengths=LENGTHS if grouped else None)


def batches_by_rank(plan: BatchPlan, epoch: int) -> list[list[list[int]]]:
    """Return the micro-batches of each rank in an epoch."""
    ranks = [TrainBatches(plan, rank=rank) for rank in range(plan.shape.world_size)]
    for rank in ranks:
        rank.set_epoch(epoch)
    return [list(rank) for rank in ranks]


def padding_tokens(plan: BatchPlan, epoch: int = 0) -> int:
    """Return the number of padding tokens in an epoch."""
    batches = [[LENGTHS[row] for row in batch] for rank in batches_by_rank(plan, epoch) for batch in rank]
    return sum(int(max(batch) * len(batch) - sum(batch)) for batch in batches)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_epoch_contains_each_row_once_in_seeded_order(sizes: tuple[int, int, int], grouped: bool):
    plan = make_plan(*sizes, grouped=grouped)
    for epoch in (0, 1):
        batch_rows = [row for rank in batches_by_rank(plan, epoch) for batch in rank for row in batch]
        assert sorted(row for row in batch_rows if row != PADDING_ROW) == list(range(ROWS))
        assert plan.epoch(epoch) == make_plan(*sizes, grouped=grouped).epoch(epoch)
    assert plan.epoch(0) != plan.epoch(1)
    assert plan.epoch(0) != make_plan(*sizes, grouped=grouped, seed=2).epoch(0)


@pytest.mark.parametrize("grouped", [False, True])
def test_steps_depend_only_on_the_rows_per_step(grouped: bool):
    plans = [make_plan(*sizes, grouped=grouped) for sizes in [(8, 1, 1), (2, 2, 2), (1, 4, 2)]]
    for step in range(1, 2 * plans[0].shape.steps_per_epoch + 1):
        assert plans[0].step(step) == plans[1].step(step) == plans[2].step(step)


def test_epochs_contain_each_row_once_when_the_device_count_changes():
    """The number of workers changes in every step; each row must still occur once per epoch, apart from padding."""
    config = FinetuneConfig.model_validate(
        {
            "model_id": "any",
            "train_path": "any",
            "num_devices": {"min": 1, "max": 6},
            "train_batch_size_per_device": 2,
            "gradient_accumulation_steps": 2,
        }
    )
    plans = {devices: plan_order(config, LENGTHS, 400, devices) for devices in config.device_counts}
    shapes = [plan.shape for plan in plans.values()]
    assert len({(shape.steps_per_epoch, shape.sequences_per_step) for shape in shapes}) == 1
    steps = shapes[0].steps_per_epoch
    for epoch in (0, 1):
        ledger = []
        for step in range(steps):
            plan = plans[config.device_counts[step % len(plans)]]
            accumulated = plan.shape.gradient_accumulation_steps
            batch_rows = [
                row
                for rank in batches_by_rank(plan, epoch)
                for batch in rank[step * accumulated : (step + 1) * accumulated]
                for row in batch
            ]
            rows = [row for row in batch_rows if row != PADDING_ROW]
            assert sorted(rows) == sorted(plan.rows_of_step(epoch * steps + step + 1))
            ledger += rows
        assert sorted(ledger) == list(range(ROWS))


def test_step_lists_the_rows_of_its_batches():
    plan = make_plan(2, 2, 2, grouped=True)
    ranks = batches_by_rank(plan, 1)
    for step in range(plan.shape.steps_per_epoch):
        batch_rows = [row for rank in ranks for batch in rank[2 * step : 2 * step + 2] for row in batch]
        assert sorted(plan.step(plan.shape.steps_per_epoch + step + 1)) == sorted(
            row for row in batch_rows if row != PADDING_ROW
        )


def test_grouping_reduces_padding_and_still_shuffles():
    """Rows of a step have similar lengths; the order of steps is random, and each epoch groups rows differently."""
    grouped, ungrouped = make_plan(8, 1, 1, grouped=True), make_plan(8, 1, 1, grouped=False)
    assert padding_tokens(grouped) < padding_tokens(ungrouped) / 3
    means = [LENGTHS[grouped.step(step)].mean() for step in range(1, 26)]
    assert abs(np.corrcoef(means, np.arange(25))[0, 1]) < 0.5
    steps_by_epoch = [
        {tuple(sorted(grouped.step(step + 26 * epoch))) for step in range(1, 26)} for epoch in (0, 1)
    ]
    assert len(steps_by_epoch[0] & steps_by_epoch[1]) == 0


def test_evaluation_contains_each_row_once():
    shares = [eval_batches(11, 3, 2, rank) for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1])
    rows = [row for share in shares for batch in share for row in batch]
    assert sorted(row for row in rows if row != PADDING_ROW) == list(range(11))


def test_evaluation_batches_are_no_larger_than_the_rows_of_a_worker():
    for sequences, rows_each in ((11, 6), (1, 1)):
        shares = [eval_batches(sequences, 10**14, 2, rank) for rank in (0, 1)]
        assert [list(map(len, share)) for share in shares] == [[rows_each], [rows_each]]
        rows = [row for share in shares for batch in share for row in batch]
        assert sorted(row for row in rows if row != PADDING_ROW) == list(range(sequences))


def test_packs_of_gsm8k_like_rows_are_99_percent_full():
    """The lengths of GSM8K rows are nearly log-normal: 215 tokens on average, from about 90 to about 570."""
    lengths = np.random.default_rng(0).lognormal(np.log(205), 0.3, 4000).clip(90, 570).astype(int)
    for capacity in (1024, 2048, 4096):
        packs = pack(lengths, capacity)
        assert lengths.sum() / (len(packs) * capacity) >= 0.99


@given(st.lists(st.integers(1, 60), min_size=1, max_size=200))
def test_packs_contain_each_row_once_within_their_capacity(lengths: list[int]):
    packs = pack(lengths, 60)
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    loads = sorted(sum(lengths[row] for row in rows) for rows in packs)
    assert loads[-1] <= 60
    # Otherwise the two emptiest packs would fit into one.
    assert len(loads) == 1 or loads[0] + loads[1] > 60
    assert pack(lengths, 60) == packs


def test_rows_of_a_step_are_the_rows_of_its_packs():
    packs = pack(LENGTHS, 400)
    plan = BatchPlan(BatchShape(len(packs), 2, 1, 2), 1, packs=packs)
    step_rows = [row for step in range(1, plan.shape.steps_per_epoch + 1) for row in plan.rows_of_step(step)]
    assert sorted(step_rows) == list(range(ROWS))
    assert plan.rows_of_step(1) == [row for sequence in plan.step(1) for row in packs[sequence]]

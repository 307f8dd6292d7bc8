"""Which row is trained when, and how rows are packed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import FinetuneConfig
from training.data.batches import PADDING_ROW, BatchPlan, BatchShape, TrainBatches, eval_batches, pack
from training.planning.plan import order_of as plan_order

ROWS = 203
LENGTHS = np.random.default_rng(0).integers(2, 400, ROWS)


def order_of(
    batch_size: int, world_size: int, accumulation: int, *, grouped: bool, seed: int = 1
) -> BatchPlan:
    shape = BatchShape(ROWS, batch_size, world_size, accumulation)
    return BatchPlan(shape, seed, lengths=LENGTHS if grouped else None)


def batches_of_all(order: BatchPlan, epoch: int) -> list[list[list[int]]]:
    """Rank -> its micro-batches."""
    ranks = [TrainBatches(order, rank=rank) for rank in range(order.shape.world_size)]
    for rank in ranks:
        rank.set_epoch(epoch)
    return [list(rank) for rank in ranks]


def padded(order: BatchPlan, epoch: int = 0) -> int:
    """Tokens of padding in an epoch."""
    batches = [[LENGTHS[row] for row in batch] for rank in batches_of_all(order, epoch) for batch in rank]
    return sum(int(max(batch) * len(batch) - sum(batch)) for batch in batches)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("spread", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_an_epoch_takes_each_row_once(spread: tuple[int, int, int], grouped: bool):
    order = order_of(*spread, grouped=grouped)
    for epoch in (0, 1):
        taken = [row for rank in batches_of_all(order, epoch) for batch in rank for row in batch]
        assert sorted(row for row in taken if row != PADDING_ROW) == list(range(ROWS))
        assert order.epoch(epoch) == order_of(*spread, grouped=grouped).epoch(epoch)
    assert order.epoch(0) != order.epoch(1)
    assert order.epoch(0) != order_of(*spread, grouped=grouped, seed=2).epoch(0)


@pytest.mark.parametrize("grouped", [False, True])
def test_every_spread_takes_the_same_steps(grouped: bool):
    orders = [order_of(*spread, grouped=grouped) for spread in [(8, 1, 1), (2, 2, 2), (1, 4, 2)]]
    for step in range(1, 2 * orders[0].shape.steps_per_epoch + 1):
        assert orders[0].step(step) == orders[1].step(step) == orders[2].step(step)


def test_steps_and_epochs_are_the_same_on_any_number_of_devices():
    """A ledger of a run that has another number of workers in every step: each row once an epoch, padding aside."""
    config = FinetuneConfig.model_validate(
        {
            "model_id": "any",
            "train_path": "any",
            "num_devices": {"min": 1, "max": 6},
            "train_batch_size_per_device": 2,
            "gradient_accumulation_steps": 2,
        }
    )
    spreads = {devices: plan_order(config, LENGTHS, 400, devices) for devices in config.device_counts}
    shapes = [order.shape for order in spreads.values()]
    assert len({(shape.steps_per_epoch, shape.sequences_per_step) for shape in shapes}) == 1
    steps = shapes[0].steps_per_epoch
    for epoch in (0, 1):
        ledger = []
        for step in range(steps):
            order = spreads[config.device_counts[step % len(spreads)]]
            accumulated = order.shape.gradient_accumulation_steps
            taken = [
                row
                for rank in batches_of_all(order, epoch)
                for batch in rank[step * accumulated : (step + 1) * accumulated]
                for row in batch
            ]
            rows = [row for row in taken if row != PADDING_ROW]
            assert sorted(rows) == sorted(order.rows_of_step(epoch * steps + step + 1))
            ledger += rows
        assert sorted(ledger) == list(range(ROWS))


def test_steps_are_what_the_batches_take():
    order = order_of(2, 2, 2, grouped=True)
    ranks = batches_of_all(order, 1)
    for step in range(order.shape.steps_per_epoch):
        taken = [row for rank in ranks for batch in rank[2 * step : 2 * step + 2] for row in batch]
        assert sorted(order.step(order.shape.steps_per_epoch + step + 1)) == sorted(
            row for row in taken if row != PADDING_ROW
        )


def test_grouping_pads_little_and_still_mixes():
    """Rows of a step are about equally long; steps come in any order, and in other company the next time."""
    grouped, mixed = order_of(8, 1, 1, grouped=True), order_of(8, 1, 1, grouped=False)
    assert padded(grouped) < padded(mixed) / 3
    means = [LENGTHS[grouped.step(step)].mean() for step in range(1, 26)]
    assert abs(np.corrcoef(means, np.arange(25))[0, 1]) < 0.5
    company = [{tuple(sorted(grouped.step(step + 26 * epoch))) for step in range(1, 26)} for epoch in (0, 1)]
    assert len(company[0] & company[1]) == 0


def test_evaluation_takes_each_row_once():
    shares = [eval_batches(11, 3, 2, rank) for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1])
    rows = [row for share in shares for batch in share for row in batch]
    assert sorted(row for row in rows if row != PADDING_ROW) == list(range(11))


def test_rows_as_long_as_those_of_gsm8k_fill_99_percent():
    """Their lengths are nearly log-normal: 215 tokens in the mean, the shortest about 90, the longest about 570."""
    lengths = np.random.default_rng(0).lognormal(np.log(205), 0.3, 4000).clip(90, 570).astype(int)
    for capacity in (1024, 2048, 4096):
        packs = pack(lengths, capacity)
        assert lengths.sum() / (len(packs) * capacity) >= 0.99


@given(st.lists(st.integers(1, 60), min_size=1, max_size=200))
def test_packs_hold_each_row_once_and_nothing_that_is_too_long(lengths: list[int]):
    packs = pack(lengths, 60)
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    loads = sorted(sum(lengths[row] for row in rows) for rows in packs)
    assert loads[-1] <= 60
    # Else the two emptiest would be one.
    assert len(loads) == 1 or loads[0] + loads[1] > 60
    assert pack(lengths, 60) == packs


def test_the_rows_of_a_step_are_those_of_its_packs():
    packs = pack(LENGTHS, 400)
    order = BatchPlan(BatchShape(len(packs), 2, 1, 2), 1, packs=packs)
    taken = [row for step in range(1, order.shape.steps_per_epoch + 1) for row in order.rows_of_step(step)]
    assert sorted(taken) == list(range(ROWS))
    assert order.rows_of_step(1) == [row for sequence in order.step(1) for row in packs[sequence]]

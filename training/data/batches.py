"""Which row is trained when: the same order on any number of workers, each row exactly once an epoch."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from training.data.prepare import IGNORED

PADDING_ROW = -1  # stands where the last batch of an epoch has no row left: its labels are all ignored


@dataclass(frozen=True)
class BatchShape:
    """How rows are dealt out."""

    rows: int
    batch_size: int
    """Rows a device and micro-batch."""
    world_size: int
    gradient_accumulation_steps: int

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches that each worker takes in an epoch."""
        return -(-self.rows // (self.batch_size * self.world_size))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the last may accumulate fewer micro-batches."""
        return -(-self.batches_per_epoch // self.gradient_accumulation_steps)

    @property
    def rows_per_step(self) -> int:
        """Rows in a full optimizer step, all workers together."""
        return self.batch_size * self.world_size * self.gradient_accumulation_steps


@lru_cache(maxsize=2)
def epoch_order(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of rows in an epoch: a function of the seed and the epoch alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return tuple(torch.randperm(rows, generator=generator).tolist())


class TrainBatches(Sampler[list[int]]):
    """One worker's micro-batches of an epoch, as lists of row indices or PADDING_ROW.

    Micro-batch i of all workers together is a contiguous piece of the epoch's order, so 1 worker with a batch of 4
    and 2 workers with a batch of 2 take the same steps.
    """

    def __init__(self, shape: BatchShape, *, rank: int, seed: int):
        self.shape = shape
        self.rank = rank
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration deals out."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.shape.batches_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        shape = self.shape
        order = list(epoch_order(shape.rows, self.seed, self.epoch))
        order += [PADDING_ROW] * (len(self) * shape.batch_size * shape.world_size - len(order))
        for batch in range(len(self)):
            begin = (batch * shape.world_size + self.rank) * shape.batch_size
            yield order[begin : begin + shape.batch_size]


def rows_of_step(shape: BatchShape, seed: int, step: int) -> tuple[int, ...]:
    """The rows that optimizer step `step` (from 1) trained, over all workers."""
    epoch, step_in_epoch = divmod(step - 1, shape.steps_per_epoch)
    begin = step_in_epoch * shape.rows_per_step
    return epoch_order(shape.rows, seed, epoch)[begin : begin + shape.rows_per_step]


def eval_batches(rows: int, batch_size: int, world_size: int, rank: int) -> list[list[int]]:
    """One worker's share of the validation rows; every worker gets equally many batches, padded with PADDING_ROW."""
    count = -(-rows // (batch_size * world_size))
    order = list(range(rows)) + [PADDING_ROW] * (count * batch_size * world_size - rows)
    return [
        order[(batch * world_size + rank) * batch_size : (batch * world_size + rank + 1) * batch_size]
        for batch in range(count)
    ]


class TokenRows(Dataset[dict[str, Any]]):
    """Prepared rows by index, and the empty one for PADDING_ROW."""

    def __init__(self, rows: Any, pad_token_id: int):
        self.rows = rows
        self.padding = {"input_ids": [pad_token_id, pad_token_id], "labels": [IGNORED, IGNORED]}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == PADDING_ROW:
            return self.padding
        row = self.rows[index]
        return {"input_ids": row["input_ids"], "labels": row["labels"]}


class EpochDataLoader(DataLoader[Any]):
    """A DataLoader that tells its batches which epoch it is, as transformers' training loop asks."""

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        self.batch_sampler.set_epoch(epoch)  # pyright: ignore

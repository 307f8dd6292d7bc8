"""Detection of errors that repeat in the next attempt."""

import asyncio
from types import SimpleNamespace

import pytest
import torch

from training.events import EventMailbox
from training.loop import worker
from training.loop.worker import Driver
from training.world import World


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Return rank 1's connection to a mailbox in this process."""
    mailbox = EventMailbox()

    def fails_again(rank: int, error: str) -> bool:
        return asyncio.run(mailbox.fails_again(rank, error))

    monkeypatch.setattr(worker.ray, "get", lambda answer: answer)
    return Driver(SimpleNamespace(fails_again=SimpleNamespace(remote=fails_again)), World(1, 1, 2, 2, 0))


def test_only_an_equal_error_is_repeated(driver: Driver):
    assert not driver.fails_again(ValueError("row 3: no"))
    assert driver.fails_again(ValueError("row 3: no"))
    assert not driver.fails_again(ValueError("row 4: no"))


MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 22.07 GiB of which {} is free. Process {} has {}"
FIRST = MESSAGE.format("1.20 GiB", 812, "20.86 GiB")
SECOND = MESSAGE.format("980.44 MiB", 4711, "21.10 GiB")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.OutOfMemoryError(FIRST), torch.OutOfMemoryError(SECOND)),
        (MemoryError("of 1.20 GiB"), MemoryError("of 980 MiB")),
        # The CUDA driver raises an error of this type.
        (RuntimeError(FIRST), RuntimeError(SECOND)),
    ],
)
def test_out_of_memory_error_with_other_figures_is_repeated(
    driver: Driver, first: Exception, second: Exception
):
    assert not driver.fails_again(first)
    assert driver.fails_again(second)


def test_user_error_worded_like_out_of_memory_is_compared_by_its_message(driver: Driver):
    assert not driver.fails_again(ValueError(FIRST))
    assert not driver.fails_again(ValueError(SECOND))
    assert driver.fails_again(ValueError(SECOND))

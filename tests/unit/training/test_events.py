"""Detection of errors that repeat in the next attempt."""

import asyncio

from training.events import EventMailbox


def is_repeated(first: str, second: str) -> bool:
    """Return whether the mailbox counts the second error as a repetition of the first."""

    async def fail() -> bool:
        mailbox = EventMailbox()
        assert not await mailbox.fails_again(0, first)
        return await mailbox.fails_again(0, second)

    return asyncio.run(fail())


def test_only_an_equal_error_is_repeated():
    assert is_repeated("ValueError('row 3: no')", "ValueError('row 3: no')")
    assert not is_repeated("ValueError('row 3: no')", "ValueError('row 4: no')")


def test_out_of_memory_error_with_other_figures_is_repeated():
    message = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 22.07 GiB of which {} is free. Process {} has {}"
    assert is_repeated(
        message.format("1.20 GiB", 812, "20.86 GiB"), message.format("980.44 MiB", 4711, "21.10 GiB")
    )

"""When an attempt is worth another."""

import asyncio

from training.events import EventMailbox


def fails_twice(first: str, second: str) -> bool:
    async def fail() -> bool:
        mailbox = EventMailbox()
        assert not await mailbox.fails_again(0, first)
        return await mailbox.fails_again(0, second)

    return asyncio.run(fail())


def test_the_same_error_twice_is_one_that_another_attempt_meets_as_well():
    assert fails_twice("ValueError('row 3: no')", "ValueError('row 3: no')")
    assert not fails_twice("ValueError('row 3: no')", "ValueError('row 4: no')")


def test_memory_that_ended_ends_again_whatever_else_was_on_the_gpu():
    words = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 22.07 GiB of which {} is free. Process {} has {}"
    assert fails_twice(
        words.format("1.20 GiB", 812, "20.86 GiB"), words.format("980.44 MiB", 4711, "21.10 GiB")
    )

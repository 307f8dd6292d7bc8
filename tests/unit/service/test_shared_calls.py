"""Coroutines share calls, and none gets a result from before it asked."""

import asyncio
import threading

from service.shared_calls import SharedCalls


def test_coroutines_that_ask_during_a_call_share_the_next_one():
    shared, numbers = SharedCalls[int](), iter(range(10))
    has_begun, may_end = threading.Event(), threading.Event()

    def call() -> int:
        number = next(numbers)
        if number == 0:
            has_begun.set()
            may_end.wait(60)
        return number

    async def ask() -> None:
        first = asyncio.create_task(shared("key", call))
        await asyncio.to_thread(has_begun.wait, 60)
        others = [asyncio.create_task(shared("key", call)) for _ in range(8)]
        await asyncio.sleep(0)  # all have asked
        may_end.set()
        assert await first == 0
        assert await asyncio.gather(*others) == [1] * 8
        assert await shared("key", call) == 2

    asyncio.run(ask())


def test_keys_do_not_wait_for_each_other():
    shared, may_end = SharedCalls[str](), threading.Event()

    async def ask() -> None:
        slow = asyncio.create_task(shared("slow", lambda: str(may_end.wait(60))))
        assert await shared("fast", lambda: "done") == "done"
        assert not slow.done()
        may_end.set()
        assert await slow == "True"

    asyncio.run(ask())


def test_coroutine_that_is_cancelled_does_not_cancel_the_call_of_others():
    shared, may_end = SharedCalls[str](), threading.Event()

    async def ask() -> None:
        first, second = (asyncio.create_task(shared("key", lambda: str(may_end.wait(60)))) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        may_end.set()
        assert await second == "True"
        assert first.cancelled()

    asyncio.run(ask())


def test_exception_is_raised_and_not_remembered():
    shared = SharedCalls[int]()

    def fail() -> int:
        raise ValueError("no answer")

    async def ask() -> None:
        for result in await asyncio.gather(shared("key", fail), shared("key", fail), return_exceptions=True):
            assert isinstance(result, ValueError)
        assert await shared("key", lambda: 1) == 1

    asyncio.run(ask())


def test_keys_are_forgotten():
    shared = SharedCalls[int]()

    async def ask() -> None:
        await asyncio.gather(*(shared(f"key {number}", lambda: 1) for number in range(100)))
        await asyncio.sleep(0)
        assert not shared._next
        assert not shared._turns
        assert not shared._running

    asyncio.run(ask())

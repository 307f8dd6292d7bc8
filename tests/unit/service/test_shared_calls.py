"""Threads share calls, and none gets a result from before it asked."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.shared_calls import SharedCalls


def test_threads_that_ask_during_a_call_share_the_next_one():
    shared, numbers, may_end = SharedCalls[int](), iter(range(10)), threading.Event()

    def call() -> int:
        number = next(numbers)
        if number == 0:
            may_end.wait(60)
        return number

    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(shared, "key", call)
        while next_is_waiting(shared):
            time.sleep(0.001)
        others = [pool.submit(shared, "key", call) for _ in range(8)]
        while shared._calls["key"].waiting < 8:
            time.sleep(0.001)
        may_end.set()
        assert first.result(60) == 0
        assert {other.result(60) for other in others} == {1}
    assert shared("key", call) == 2


def next_is_waiting(shared: SharedCalls[int]) -> bool:
    """Return whether the first call has not begun."""
    return "key" not in shared._calls or shared._calls["key"].waiting > 0


def test_keys_do_not_wait_for_each_other():
    shared, may_end = SharedCalls[str](), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(shared, "slow", lambda: str(may_end.wait(60)))
        assert shared("fast", lambda: "done") == "done"
        assert not slow.done()
        may_end.set()
        assert slow.result(60) == "True"


def test_exception_is_raised_and_not_remembered():
    shared = SharedCalls[int]()

    def fail() -> int:
        raise ValueError("no answer")

    with pytest.raises(ValueError, match="no answer"):
        shared("key", fail)
    assert shared("key", lambda: 1) == 1

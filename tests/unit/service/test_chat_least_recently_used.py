"""Loaded values: at most so many, none leaves while a request uses it, and no request is starved or corrupts the rest."""

import asyncio
import random

import pytest

from service.least_recently_used import LeastRecentlyUsed


class Recorder:
    """Loads and unloads keys, and checks that no more than the limit are loaded."""

    def __init__(self, size: int):
        self.loaded: set[str] = set()
        self.in_use: list[str] = []
        self.order: list[str] = []
        self.size = size
        self.values = LeastRecentlyUsed[str](size, self.load, self.unload)

    async def load(self, key: str) -> str:
        await asyncio.sleep(0.002)
        if key.startswith("bad"):
            raise ValueError(key)
        self.loaded.add(key)
        self.order.append(key)
        assert len(self.loaded) <= self.size
        return key

    async def unload(self, key: str) -> None:
        await asyncio.sleep(0.001)
        assert key not in self.in_use
        self.loaded.remove(key)

    async def use(self, key: str, seconds: float) -> None:
        async with self.values.use(key) as value:
            assert value == key
            assert key in self.loaded
            self.in_use.append(key)
            try:
                await asyncio.sleep(seconds)
            finally:
                self.in_use.remove(key)


def test_least_recently_used_value_is_removed():
    async def run() -> list[str]:
        recorder = Recorder(2)
        for key in ("a", "b", "a", "c", "a", "b"):
            await recorder.use(key, 0)
        return recorder.order

    assert asyncio.run(run()) == ["a", "b", "c", "b"]


def test_random_requests_with_cancellations_and_failures():
    """Fifty requests of eight keys for three places; a third of them is cancelled."""

    async def run() -> None:
        generator = random.Random(3)
        recorder = Recorder(3)
        tasks = []
        for _ in range(50):
            key = generator.choice(["a", "b", "c", "d", "e", "f", "g", "bad"])
            tasks.append(asyncio.create_task(recorder.use(key, generator.random() * 0.01)))
            if generator.random() < 0.35:
                asyncio.get_running_loop().call_later(generator.random() * 0.02, tasks[-1].cancel)
            await asyncio.sleep(generator.random() * 0.004)
        async with asyncio.timeout(20):
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        unexpected = [
            o for o in outcomes if o is not None and not isinstance(o, ValueError | asyncio.CancelledError)
        ]
        assert unexpected == []
        await recorder.use("a", 0)

    asyncio.run(run())


def test_waiting_request_is_not_starved():
    async def run() -> None:
        recorder = Recorder(1)
        await recorder.use("a", 0)
        stream = [asyncio.create_task(recorder.use("a", 0.02)) for _ in range(2)]
        await asyncio.sleep(0)
        waiting = asyncio.create_task(recorder.use("b", 0))
        for _ in range(20):
            await asyncio.sleep(0.005)
            stream.append(asyncio.create_task(recorder.use("a", 0.02)))
        assert waiting.done(), "the stream of the other key went first"
        await asyncio.gather(waiting, *stream)

    asyncio.run(run())


def test_failed_load_is_reported_and_frees_its_slot():
    async def run() -> None:
        recorder = Recorder(1)
        with pytest.raises(ValueError, match="bad"):
            await recorder.use("bad", 0)
        await recorder.use("a", 0)

    asyncio.run(run())

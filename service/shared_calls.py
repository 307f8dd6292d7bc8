"""Calls that requests share: of those that need the same result at the same time, one calls."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

import anyio
import anyio.to_thread

Result = TypeVar("Result")

_PAUSE_SECONDS = 0.25


@dataclass
class _Call(Generic[Result]):
    result: asyncio.Future[Result]
    callers: int = 0


class SharedCalls(Generic[Result]):
    """Calls by key, each in a thread, whose results the coroutines of an event loop share.

    A call begins after all coroutines that share it have asked, so none of them gets an older result than from a call of its own.
    Those that ask later share the next call, which begins a quarter of a second later if this one was shared.
    """

    def __init__(self, limiter: Callable[[], anyio.CapacityLimiter] | None = None) -> None:
        """Start without calls.

        Args:
            limiter: Returns the limiter of the threads; None: that of all requests.
        """
        self._limiter = limiter
        self._next: dict[str, _Call[Result]] = {}
        """Calls that have not begun."""
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._running: set[asyncio.Task[None]] = set()

    async def __call__(self, key: str, call: Callable[[], Result]) -> Result:
        """Return the result of `call`, or raise its exception; another coroutine may have called."""
        shared = self._next.get(key)
        if shared is None:
            shared = self._next[key] = _Call(asyncio.get_running_loop().create_future())
            running = asyncio.create_task(self._run(key, call))
            self._running.add(running)  # the event loop itself has only weak references
            running.add_done_callback(self._running.discard)
        shared.callers += 1
        return await asyncio.shield(
            shared.result
        )  # a client that disconnects does not cancel the call of others

    async def _run(self, key: str, call: Callable[[], Result]) -> None:
        turn = self._turns.setdefault(key, asyncio.Lock())
        async with turn:
            shared = self._next.pop(key)
            limiter = self._limiter() if self._limiter else None
            try:
                shared.result.set_result(await anyio.to_thread.run_sync(call, limiter=limiter))
            except Exception as error:  # noqa: BLE001 - raised again in every coroutine that shares the call
                shared.result.set_exception(error)
            if shared.callers > 1:
                await asyncio.sleep(_PAUSE_SECONDS)

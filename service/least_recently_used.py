"""A limited number of loaded values: the least recently used one that no request uses is removed for the next."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass
class _Entry(Generic[Value]):
    value: Value
    users: int = 0


class LeastRecentlyUsed(Generic[Value]):
    """Values that are loaded on demand, by key.

    A request whose value needs a slot waits until one is free. Later requests wait behind it, even for loaded values:
    otherwise a stream of them could keep every slot in use forever.
    """

    def __init__(
        self,
        size: int,
        load: Callable[[str], Awaitable[Value]],
        unload: Callable[[Value], Awaitable[None]],
    ):
        """Start empty.

        Args:
            size: Most values at a time.
            load: Loads the value of a key.
            unload: Removes a value that no request uses.
        """
        self._size, self._load, self._unload = size, load, unload
        self._entries: OrderedDict[str, _Entry[Value]] = OrderedDict()
        self._turn = asyncio.Lock()
        self._released = asyncio.Event()
        self._loading: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def use(self, key: str) -> AsyncIterator[Value]:
        """Load the value of a key if needed, and keep it loaded within the block."""
        async with self._turn:
            if self._loading is not None and not self._loading.done():  # its request was cancelled
                await asyncio.wait({self._loading})
            if key not in self._entries:
                await self._bring(key)
            entry = self._entries[key]
            self._entries.move_to_end(key)
            entry.users += 1
        try:
            yield entry.value
        finally:
            entry.users -= 1
            self._released.set()

    async def _bring(self, key: str) -> None:
        while len(self._entries) >= self._size and not self._idle():
            self._released.clear()
            await self._released.wait()
        self._loading = asyncio.create_task(self._swap(key))
        await asyncio.shield(self._loading)  # a cancelled request does not interrupt the loading

    async def _swap(self, key: str) -> None:
        if len(self._entries) >= self._size:
            await self._unload(self._entries.pop(self._idle()[0]).value)
        self._entries[key] = _Entry(await self._load(key))

    def _idle(self) -> list[str]:
        return [key for key, entry in self._entries.items() if not entry.users]

"""Calls that threads share: of those that need the same result at the same time, one calls."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Result = TypeVar("Result")

_PAUSE_SECONDS = 0.1
_MAX_KEYS = 1000


@dataclass
class _Calls(Generic[Result]):
    running: threading.Lock = field(default_factory=threading.Lock)
    next: Future[Result] | None = None
    """Result of the call that has not begun, if a thread waits for it."""
    waiting: int = 0
    """Threads that wait for that result."""
    earliest: float = 0.0
    """Time before which that call does not begin."""


class SharedCalls(Generic[Result]):
    """Calls by key whose results are shared.

    A call begins after all threads that share it have asked, so none of them gets an older result than from a call of its own.
    Threads that ask later share the next call, which begins a tenth of a second later if this one was shared.
    """

    def __init__(self) -> None:
        """Start without calls."""
        self._calls: dict[str, _Calls[Result]] = {}
        self._changing = threading.Lock()

    def __call__(self, key: str, call: Callable[[], Result]) -> Result:
        """Return the result of `call`, or raise its exception; another thread may have called."""
        with self._changing:
            calls = self._of(key)
            calls.waiting += 1
            result, is_first = calls.next, calls.next is None
            if result is None:
                result = calls.next = Future[Result]()
        if is_first:
            self._run(calls, result, call)
        return result.result()

    def _run(self, calls: _Calls[Result], result: Future[Result], call: Callable[[], Result]) -> None:
        with calls.running:
            time.sleep(max(0.0, calls.earliest - time.monotonic()))
            with self._changing:
                calls.next = None
                is_shared, calls.waiting = calls.waiting > 1, 0
            try:
                result.set_result(call())
            except BaseException as error:  # noqa: BLE001 - raised again by every thread that shares the call
                result.set_exception(error)
            if is_shared:
                calls.earliest = time.monotonic() + _PAUSE_SECONDS

    def _of(self, key: str) -> _Calls[Result]:
        if key not in self._calls and len(self._calls) >= _MAX_KEYS:
            self._calls = {name: calls for name, calls in self._calls.items() if calls.waiting}
        return self._calls.setdefault(key, _Calls())

"""Around every request: key, rate limit, request id, metrics and the access log."""

import json
import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable
from functools import cache
from typing import Any

import anyio
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ApiError, error_body, server_error, storage_error
from service.keys import Caller, key_name, read_caller
from service.metrics import Metrics
from service.shared_calls import SharedCalls
from utils.storage.bucket import BucketError
from utils.storage.s3 import S3Store

_OPEN_PATHS = ("/healthz", "/metrics")
_CACHE_SECONDS, _MAX_KEYS = 2.0, 10_000
_METHODS = ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH")

_log, _access_log = logging.getLogger("service"), logging.getLogger("service.access")


@cache
def _key_threads() -> anyio.CapacityLimiter:
    """Return the limiter of threads that read keys: requests that wait for the bucket must not take them."""
    return anyio.CapacityLimiter(64)


class Keyring:
    """The keys that requests send, with answers of the bucket cached for seconds; for one event loop."""

    def __init__(self, store: S3Store):
        self._store = store
        self._cache: dict[str, tuple[float, Caller | None]] = {}
        self._shared = SharedCalls[Caller | None](_key_threads)

    async def caller(self, authorization: str) -> Caller:
        """Return the caller of a request.

        Args:
            authorization: The Authorization header.

        Raises:
            ApiError: 401 for no key, a wrong key or a revoked key.
        """
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorized("You didn't provide an API key. Send it as `Authorization: Bearer KEY`.")
        name = key_name(key.strip())
        until, caller = self._cache.get(name, (0.0, None))
        if until < time.monotonic():
            caller = await self._shared(name, lambda: read_caller(self._store, name))
            if len(self._cache) >= _MAX_KEYS:
                self._cache.clear()
            self._cache[name] = (time.monotonic() + _CACHE_SECONDS, caller)
        if caller is None:
            raise _unauthorized("Incorrect API key provided, or the key was revoked.", "invalid_api_key")
        return caller


def _unauthorized(message: str, code: str | None = None) -> ApiError:
    return ApiError(status=401, message=message, code=code, headers={"WWW-Authenticate": "Bearer"})


class RequestRates:
    """Requests of the last minute by key, in this replica."""

    def __init__(self, per_minute: int):
        self._per_minute = per_minute
        self._times: dict[str, deque[float]] = {}

    def count(self, key_id: str) -> None:
        """Count a request; raise an ApiError if the key has sent too many in the last minute."""
        now = time.monotonic()
        if len(self._times) >= _MAX_KEYS:
            self._times.clear()
        times = self._times.setdefault(key_id, deque())
        while times and now - times[0] > 60:
            times.popleft()
        if len(times) >= self._per_minute:
            wait = max(1, round(60 - (now - times[0])))
            raise ApiError(
                status=429,
                message=f"Rate limit reached: {self._per_minute} requests per minute. Try again in {wait} s.",
                type="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(wait)},
            )
        times.append(now)


class AuthMiddleware:
    """ASGI middleware that answers requests without a valid key, and logs and counts all of them."""

    def __init__(self, app: ASGIApp, keyring: Keyring, rates: RequestRates, metrics: Metrics):
        self._app, self._keyring, self._rates, self._metrics = app, keyring, rates, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, request_id, status = time.monotonic(), f"req_{secrets.token_hex(12)}", 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._answer(scope, receive, send_with_id)
        finally:
            self._record(scope, request_id, status, time.monotonic() - began)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in _OPEN_PATHS:
            try:
                headers = {name: value for name, value in scope["headers"] if name == b"authorization"}
                authorization = headers.get(b"authorization", b"").decode("latin-1")
                caller = await self._keyring.caller(authorization)
                self._rates.count(caller.key_id)
            except ApiError as error:
                await answer_error(error)(scope, receive, send)
                return
            except BucketError as error:
                _log.error("the bucket does not answer: %s", error)
                await answer_error(storage_error())(scope, receive, send)
                return
            except Exception:  # noqa: BLE001
                _log.exception("the key of a request cannot be read")
                await answer_error(server_error())(scope, receive, send)
                return
            scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send)

    def _record(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unknown")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.observe(method, route, status, seconds)
        caller: Caller | None = scope.get("state", {}).get("caller")
        # Neither the path nor the query: both may contain a prompt or a key that was put in the wrong place.
        line = {
            "request_id": request_id,
            "method": method,
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 1),
            "project": caller.project if caller else None,
            "key": caller.key_id if caller else None,
        }
        _access_log.info(json.dumps(line))


def answer_error(error: ApiError) -> Callable[[Scope, Receive, Send], Awaitable[Any]]:
    """Return the response for an error."""
    return JSONResponse(error_body(error), status_code=error.status, headers=error.headers)

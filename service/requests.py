"""Bodies and query parameters of requests: every wrong one becomes an ApiError that names the parameter."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect, Request

from service.errors import ApiError, invalid
from service.records import Record, Slice

MAX_BODY_BYTES = 1_000_000
MAX_PAGE = 100
RETRY_SECONDS = 600
"""Time within which a request that is marked as a retry is recognized as the same."""
_MAX_DEPTH = 50
_SILENCE_SECONDS = 60.0

Body = TypeVar("Body", bound=BaseModel)
T = TypeVar("T")


class RequestBody(BaseModel):
    """Base class of request bodies: rejects unknown fields and does not coerce values."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


async def blocks_of(request: Request) -> AsyncIterator[bytes]:
    """Yield the body of a request; raise an ApiError if the client disconnects or is silent for too long."""
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(_SILENCE_SECONDS):
                block = await anext(stream)
        except StopAsyncIteration:
            return
        except ClientDisconnect as error:
            raise ApiError(status=499, message="The client closed the connection.") from error
        except TimeoutError as error:
            raise ApiError(
                status=408,
                message=f"The client sent nothing for {_SILENCE_SECONDS:.0f} s. Send the request again.",
                headers={"Connection": "close"},
            ) from error
        yield block


async def read_body(
    request: Request, most: int = MAX_BODY_BYTES, on_large: Callable[[], Awaitable[Any]] | None = None
) -> bytearray:
    """Return the body of a request; raise an ApiError if it is too large.

    Args:
        request: The request.
        most: Maximum number of bytes.
        on_large: Awaited once, when the body has more than MAX_BODY_BYTES.
    """
    body = bytearray()
    async for block in blocks_of(request):
        body += block
        if len(body) > most:
            raise ApiError(status=413, message=f"The request body is larger than {most:,} bytes.")
        if on_large and len(body) - len(block) <= MAX_BODY_BYTES < len(body):
            await on_large()
    return body


def parse_json(body: bytes | bytearray) -> dict[str, Any]:
    """Return the JSON object in a body."""
    try:
        parsed = json.loads(body, parse_constant=reject_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise invalid(f"We could not parse the JSON body of your request: {reason[:200]}") from error
    if not isinstance(parsed, dict):
        raise invalid("The JSON body of your request must be an object.")
    check_value(parsed)
    return parsed


def parse_body(body: bytes | bytearray, kind: type[Body]) -> Body:
    """Return the validated JSON body of a request."""
    given = parse_json(body)
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = _param_of(given, first["loc"], is_missing=first["type"] == "missing")
        code = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}.get(
            first["type"]
        )
        raise invalid(f"Invalid value for '{param}': {first['msg'][:300]}", param, code) from error


def _param_of(given: Any, location: Sequence[str | int], *, is_missing: bool) -> str:
    """Return the parameter at a location of pydantic, which may end with the name of a type."""
    parts: list[str] = []
    for part in location:
        inner: Any = dict(enumerate(given)) if isinstance(given, list) else given
        is_given = isinstance(inner, dict) and part in inner
        if is_given or is_missing:
            parts.append(str(part)[:100])
        if not is_given:
            break
        given = inner[part]
    return ".".join(parts)[:200]


def reject_constant(name: str) -> None:
    """Raise the error for NaN or Infinity, which Python's parser would accept; for `parse_constant`."""
    raise ValueError(f"{name} is not JSON")


def check_value(value: Any, depth: int = 0) -> None:
    """Reject values that could not be stored as JSON in UTF-8."""
    if depth > _MAX_DEPTH:
        raise invalid("We could not parse the JSON body of your request: nested too deeply")
    if isinstance(value, str):
        if "\x00" in value or not _is_unicode(value):
            raise invalid("The JSON body contains text that is not valid Unicode, or a NUL character.")
    elif isinstance(value, dict):
        for name, below in value.items():
            check_value(name, depth + 1)
            check_value(below, depth + 1)
    elif isinstance(value, list):
        for below in value:
            check_value(below, depth + 1)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_retry(request: Request) -> bool:
    """Return whether the client says that it repeats a request whose answer it lost."""
    return request.headers.get("x-stainless-retry-count", "0") not in ("", "0")


@dataclass(frozen=True)
class PageQuery:
    """The position and length of a list."""

    after: str | None
    limit: int
    ascending: bool


def page_query(request: Request, *, default: int = 20, most: int = MAX_PAGE) -> PageQuery:
    """Return `after`, `limit` and `order` of a request."""
    query = request.query_params
    limit = default
    if (given := query.get("limit")) is not None:
        if not given.isascii() or not given.isdigit() or not 1 <= int(given[:9]) <= most or len(given) > 9:
            raise invalid(f"Invalid 'limit': expected an integer from 1 to {most}.", "limit")
        limit = int(given)
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise invalid("Invalid 'order': expected 'asc' or 'desc'.", "order")
    return PageQuery(query.get("after") or None, limit, order == "asc")


def metadata_filter(request: Request) -> dict[str, str] | None:
    """Return the metadata that listed jobs must have; None for `metadata=null`, jobs without metadata."""
    query = request.query_params
    if query.get("metadata") == "null":
        return None
    return {
        name.removeprefix("metadata[").removesuffix("]"): value
        for name, value in query.items()
        if name.startswith("metadata[") and name.endswith("]")
    }


def list_body(found: Slice | None, query: PageQuery, kind: str, shape: Any) -> dict[str, Any]:
    """Return the JSON body of a list; raise an ApiError if `after` names no object of the project."""
    if found is None:
        raise invalid(f"No such {kind}: {(query.after or '')[:200]!r}", "after")
    return list_of([shape(record) for record in found.records], has_more=found.has_more)


def list_of(data: Sequence[Mapping[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """Return the JSON body of a list."""
    return {
        "object": "list",
        "data": list(data),
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }


def slice_by_id(
    entries: Iterable[T],
    query: PageQuery,
    kind: str,
    id_of: Callable[[T], str],
    shape: Callable[[T], Record],
) -> dict[str, Any]:
    """Return the JSON body of a list of which nothing but the requested part is built.

    Args:
        entries: Entries of the complete list, in the order of the request.
        query: The requested part.
        kind: Name of an entry in messages.
        id_of: Returns the id of an entry.
        shape: Returns the body of an entry.
    """
    rest = iter(entries)
    if query.after is not None and all(id_of(entry) != query.after for entry in rest):
        raise invalid(f"No such {kind}: {query.after[:200]!r}", "after")
    found = list(islice(rest, query.limit + 1))
    return list_of([shape(entry) for entry in found[: query.limit]], has_more=len(found) > query.limit)

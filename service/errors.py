"""Errors of the API, in OpenAI's format."""

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """An error that a request is answered with."""

    def __init__(
        self,
        *,
        status: int,
        message: str,
        type: str = "invalid_request_error",  # noqa: A002
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.type = status, message, type
        self.param, self.code, self.headers = param, code, dict(headers or {})


def error_body(error: ApiError) -> dict[str, Any]:
    """Return the JSON body of an error."""
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def not_found(kind: str, identifier: str, param: str = "id") -> ApiError:
    """Return the error for an object that does not exist in the caller's project."""
    return ApiError(
        status=404, message=f"No such {kind}: {identifier[:200]!r}", param=param, code="not_found"
    )


def storage_error() -> ApiError:
    """Return the error for a request during which the bucket did not answer."""
    return ApiError(
        status=503,
        message="The storage does not answer.",
        type="server_error",
        headers={"Retry-After": "5"},
    )


def server_error() -> ApiError:
    """Return the error for a request that an unexpected error ended."""
    return ApiError(status=500, message="The server had an error.", type="server_error")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error for a request with a wrong value."""
    return ApiError(status=400, message=message, param=param, code=code)

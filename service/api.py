"""The API of one replica as an ASGI application."""

import logging
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

import anyio
import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from service.chat import chat_router
from service.config import LoadedService
from service.errors import ApiError, invalid, server_error, storage_error
from service.files import Files
from service.jobs import Jobs
from service.metrics import CONTENT_TYPE, Metrics
from service.middleware import AuthMiddleware, Keyring, RequestRates, answer_error
from service.models import Models, ServedModel
from service.progress import Progress
from service.routes import caller_of, file_router, job_router, model_router
from utils.storage.bucket import BucketError
from utils.storage.retries import CHECK, REQUEST
from utils.storage.s3 import S3Store

_log = logging.getLogger("service")


@cache
def _health_threads() -> anyio.CapacityLimiter:
    """Return the limiter of threads that check the bucket's health: requests that wait for the bucket must not take them."""
    return anyio.CapacityLimiter(8)


def create_app(service: LoadedService, handles: Mapping[str, Any]) -> ASGIApp:
    """Return the ASGI application of one replica.

    Args:
        service: The service YAML.
        handles: Base model -> handle of its engine.
    """
    uri = service.config.storage_path
    store, checks = S3Store(uri, REQUEST), S3Store(uri, CHECK)
    limits = service.config.limits
    models = Models(store, service, int(time.time()))
    metrics = Metrics(store)
    app = FastAPI(title="Anneal", openapi_url=None, redirect_slashes=False)
    _add_error_handlers(app)
    app.include_router(
        job_router(Jobs(store, service, models), Progress(store))
    )  # first, since clients poll them
    app.include_router(file_router(Files(store, S3Store(uri), limits)))
    app.include_router(model_router(models))

    def resolve(model_id: str, request: Request) -> ServedModel:
        return models.resolve(model_id, caller_of(request).project)

    app.include_router(chat_router(resolve, handles))

    @app.get("/healthz")
    async def healthz() -> Response:
        await anyio.to_thread.run_sync(checks.first, "keys/", limiter=_health_threads())
        return Response("ok\n", media_type="text/plain")

    @app.get("/metrics")
    def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    # A request waits for its key before anything else: an error is better than a wait of minutes.
    return AuthMiddleware(app, Keyring(checks), RequestRates(limits.requests_per_minute), metrics)


def _add_error_handlers(app: FastAPI) -> None:
    """Answer every error in OpenAI's format."""

    async def api_error(request: Request, error: Exception) -> Any:
        assert isinstance(error, ApiError)
        return answer_error(error)

    async def http_error(request: Request, error: Exception) -> Any:
        assert isinstance(error, HTTPException)
        message = (
            f"Invalid URL ({request.method} {request.url.path[:200]})"
            if error.status_code == 404
            else error.detail
        )
        return answer_error(ApiError(status=error.status_code, message=message, headers=error.headers))

    async def validation_error(request: Request, error: Exception) -> Any:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return answer_error(invalid(str(first["msg"]), ".".join(map(str, first["loc"]))))

    async def bucket_error(request: Request, error: Exception) -> Any:
        _log.error("the bucket does not answer: %s", error)
        return answer_error(storage_error())

    async def other_error(request: Request, error: Exception) -> Any:
        return answer_error(server_error())

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(Exception, other_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(BucketError, bucket_error)

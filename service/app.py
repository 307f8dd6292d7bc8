"""The service as an ASGI application, and as an application of Ray Serve."""

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from ray import serve
from ray.serve import Application
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from service.config import LoadedService, load_service
from service.errors import ApiError, invalid
from service.files import Files
from service.jobs import Jobs
from service.keys import Keyring
from service.metrics import CONTENT_TYPE, Metrics
from service.middleware import Gate, RequestRates, answer_error
from service.models import Models, ServedModel
from service.routes import caller_of, file_router, job_router, model_router
from service.scheduler import Scheduler
from utils.storage.bucket import BucketError
from utils.storage.s3 import CHECK, S3Store

APP_NAME = "fine-tuning"
_MAX_ONGOING_REQUESTS = 1000

_log = logging.getLogger("service")


def create_app(service: LoadedService, handles: Mapping[str, Any]) -> ASGIApp:
    """Return the ASGI application of one replica.

    Args:
        service: The service YAML.
        handles: Base model -> handle of its engine.
    """
    store = S3Store(service.config.storage_path)
    limits = service.config.limits
    models = Models(store, service, int(time.time()))
    metrics = Metrics(store)
    app = FastAPI(title="Anneal", openapi_url=None, redirect_slashes=False)
    _add_error_handlers(app)
    app.include_router(file_router(Files(store, limits)))
    app.include_router(job_router(Jobs(store, service, models), store))
    app.include_router(model_router(models))

    def resolve(model_id: str, request: Request) -> ServedModel:
        return models.resolve(model_id, caller_of(request).project)

    _ = resolve, handles

    @app.get("/healthz")
    async def healthz() -> Response:
        await run_in_threadpool(S3Store(service.config.storage_path, CHECK).first, "keys/")
        return Response("ok\n", media_type="text/plain")

    @app.get("/metrics")
    def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return Gate(app, Keyring(store), RequestRates(limits.requests_per_minute), metrics)


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
        return answer_error(
            ApiError(
                status=503,
                message="The storage does not answer.",
                type="server_error",
                headers={"Retry-After": "5"},
            )
        )

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(BucketError, bucket_error)


@serve.ingress()
class Ingress:
    """A replica that answers requests."""

    def __init__(self, service: LoadedService, handles: dict[str, Any], scheduler: Any):
        _log_to_stderr()
        self._service, self._handles = service, handles

    def __serve_build_asgi_app__(self) -> ASGIApp:  # noqa: N807
        return create_app(self._service, self._handles)


class SchedulerReplica:
    """The replica that schedules jobs."""

    def __init__(self, service: LoadedService):
        _log_to_stderr()
        store = S3Store(service.config.storage_path)
        self._scheduler = Scheduler(store, service, ray.get_runtime_context().gcs_address)
        self._thread = threading.Thread(target=self._scheduler.run, name="scheduler", daemon=True)
        self._thread.start()

    def check_health(self) -> None:
        """Raise an error if the scheduler's thread has ended; Serve then replaces the replica."""
        if not self._thread.is_alive():
            raise RuntimeError("the scheduler has ended")

    def __del__(self) -> None:
        self._scheduler.stop()


def build(service: LoadedService) -> Application:
    """Return the application that `serve.run` deploys."""
    scheduler = serve.deployment(SchedulerReplica).options(
        name="scheduler", num_replicas=1, ray_actor_options={"num_cpus": 0}, health_check_period_s=5
    )
    ingress = serve.deployment(Ingress).options(
        name="api",
        num_replicas=service.config.num_replicas,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        logging_config={"enable_access_log": False},  # it has its own
        health_check_period_s=5,
    )
    handles: dict[str, Any] = {}
    return ingress.bind(service, handles, scheduler.bind(service))


def build_from_file(arguments: dict[str, str]) -> Application:
    """Return the application for a Serve config file: `import_path: service.app:build_from_file`, `args: {config: PATH}`."""
    return build(load_service(Path(arguments["config"])))


def _log_to_stderr() -> None:
    """Write the logs of the service, one line of JSON per request, to the replica's log file."""
    logger = logging.getLogger("service")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False

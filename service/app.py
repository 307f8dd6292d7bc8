"""The service as an application of Ray Serve."""

import ctypes
import logging
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import uvicorn
from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.api import create_app
from service.config import LoadedService, load_service
from service.engine import engine_deployment
from utils.storage.bucket import BucketError
from utils.storage.retries import CHECK
from utils.storage.s3 import S3Store

APP_NAME = "fine-tuning"
_MAX_ONGOING_REQUESTS = 1000
_MAX_CONNECTIONS, _BACKLOG = 4000, 1024
_KEEP_ALIVE_SECONDS = 65
"""Longer than clients keep idle connections (httpx: 5 s), so that no request meets a connection that is being closed."""
_M_MMAP_THRESHOLD, _LARGE_BYTES = -3, 1024 * 1024
_RECEIVED_BYTES = _LARGE_BYTES // 2
"""At _LARGE_BYTES, glibc would map new memory for each block."""


@serve.ingress()
class ProxiedReplica:
    """A replica that answers the requests of Serve's proxies, on clusters whose load balancer expects them."""

    def __init__(self, service: LoadedService, handles: dict[str, Any], scheduler: Any):
        _prepare(service)
        self._service, self._handles = service, handles

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return create_app(self._service, self._handles)


class _Protocol(H11Protocol):
    """HTTP that receives bodies in blocks of 512 KB: for asyncio's 256 KB, an upload takes a quarter more CPU time."""

    def connection_made(self, transport: Any) -> None:
        """Set the size of blocks, an attribute of asyncio's transports on selectors."""
        super().connection_made(transport)
        transport.max_size = _RECEIVED_BYTES


class ListeningReplica:
    """A replica that listens on the service's port itself; the kernel shares connections among the replicas of a machine.

    Serve's proxies and replicas queue the body of a request without a limit. Here an upload that is faster than the bucket
    waits in the client's socket instead.
    """

    def __init__(self, service: LoadedService, handles: dict[str, Any], scheduler: Any):
        _prepare(service)
        listening = socket.create_server(
            (service.config.host, service.config.port),
            family=socket.AF_INET6 if ":" in service.config.host else socket.AF_INET,
            backlog=_BACKLOG,
            reuse_port=True,
        )
        app = create_app(service, handles)
        config = uvicorn.Config(
            app,
            http=_Protocol,
            loop="asyncio",
            log_config=None,
            access_log=False,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([listening],), name="http", daemon=True
        )
        self._thread.start()

    def check_health(self) -> None:
        """Raise an error if the server has ended; Serve then replaces the replica."""
        if not self._thread.is_alive():
            raise RuntimeError("the HTTP server has ended")

    def __del__(self) -> None:
        self._server.should_exit = True


class SchedulerReplica:
    """The replica that schedules jobs."""

    def __init__(self, service: LoadedService):
        from service.scheduler import Scheduler  # imports Ray Train, which no other replica needs

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


def build(service: LoadedService, *, behind_proxies: bool) -> Application:
    """Return the application that `serve.run` deploys.

    Args:
        service: The service YAML.
        behind_proxies: Serve's proxies receive the requests; otherwise the replicas listen on the service's port.
    """
    deployment: Any = serve.deployment
    scheduler = deployment(SchedulerReplica).options(
        name="scheduler", num_replicas=1, ray_actor_options={"num_cpus": 0}, health_check_period_s=5
    )
    replica = ProxiedReplica if behind_proxies else ListeningReplica
    ingress = deployment(replica).options(
        name="api",
        num_replicas=service.config.num_replicas,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        logging_config={"enable_access_log": False},  # it has its own
        health_check_period_s=5,
    )
    handles = {
        name: engine_deployment(name, base, service.bases[name].config)
        for name, base in service.config.models.items()
    }
    return ingress.bind(service, handles, scheduler.bind(service))


def build_from_file(arguments: dict[str, str]) -> Application:
    """Return the application for a Serve config file: `import_path: service.app:build_from_file`, `args: {config: PATH}`."""
    return build(load_service(Path(arguments["config"])), behind_proxies=True)


def _prepare(service: LoadedService) -> None:
    """Set up the logs and the memory of a replica, and load the client of S3, for which the first request would wait."""
    _log_to_stderr()
    _return_large_blocks()
    with suppress(BucketError):  # requests report a bucket that does not answer
        S3Store(service.config.storage_path, CHECK).first("keys/")


def _log_to_stderr() -> None:
    """Write the logs of the service, one line of JSON per request, to the replica's log file."""
    logger = logging.getLogger("service")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _return_large_blocks() -> None:
    """Let glibc return the freed parts of uploads to the system; by default, the heaps of the threads retain them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)

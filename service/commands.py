"""The commands `serve` and `keys`."""

import ipaddress
import json
import math
import os
import socket
import threading
import time
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from configs.loading import load_config
from configs.schema import DeepspeedFile
from service.config import LoadedService, ServiceConfig, load_service
from service.keys import create_first_key, create_key, list_keys, revoke_keys
from service.ownership import Ownership
from training.launch.reachability import check_cluster_answers
from training.models.kernels import is_installed
from training.planning.endpoints import (
    ClusterTarget,
    set_ray_environment,
    target_cluster,
)
from training.planning.paths import needs_embedded_bucket
from utils.arguments import add_json_option, positive
from utils.console import open_consoles
from utils.errors import AnnealError, last_line
from utils.processes import importing, record_signals, restore_handlers, run_in_own_session
from utils.storage.bucket import check_writable
from utils.storage.embedded_bucket import STATE_VARIABLE, embedded_bucket, state_directory
from utils.storage.s3 import S3Store

COMMANDS = {
    "serve": "run the fine-tuning service: OpenAI's API for files, jobs, models and chat",
    "keys": "create, list and revoke API keys of the fine-tuning service",
}
DEFAULT_SERVICE = Path("cookbooks/fine_tuning_service/service.yaml")
DEFAULT_PROJECT = "default"
_STOP_SECONDS = 600
_ANSWER_SECONDS = 60
"""Seconds until a proxy of Serve on this machine must answer."""
_HEALTH_SECONDS = 20  # /healthz waits about 10 s for a bucket that does not answer
_POLL_SECONDS = 0.2
_OWNER_SECONDS = 2.0
"""Interval at which a process checks that no other has replaced its service."""


class ServiceError(AnnealError):
    """An error before the service is ready."""


def add_arguments(commands: Mapping[str, ArgumentParser]) -> None:
    """Add the commands' arguments to their parsers."""
    serving, keys = commands["serve"], commands["keys"]
    serving.set_defaults(run_command=serve_command)
    serving.add_argument("config", type=Path, metavar="SERVICE.yaml")
    serving.add_argument(
        "--port", type=_port, metavar="PORT", help="port to listen on; default: the service YAML's"
    )
    serving.add_argument(
        "--dry-run",
        action="store_true",
        help="check the service YAML, the bucket, the models and the memory of jobs, and exit",
    )
    add_json_option(serving)
    keys.set_defaults(run_command=keys_command)
    keys.add_argument("action", choices=("create", "list", "revoke"))
    keys.add_argument(
        "project", metavar="PROJECT", help="project whose files, jobs and models the key accesses"
    )
    keys.add_argument(
        "--id", dest="key_id", metavar="KEY_ID", help="with revoke: the only key to revoke; default: all"
    )
    keys.add_argument(
        "--service",
        type=Path,
        default=DEFAULT_SERVICE,
        metavar="SERVICE.yaml",
        help="service YAML, which names the bucket; default: %(default)s",
    )
    add_json_option(keys)


def serve_command(config: Path, port: int | None, dry_run: bool, as_json: bool) -> int:
    """Run the service until a signal, or check everything that it needs.

    Args:
        config: The service YAML.
        port: A port that replaces the YAML's.
        dry_run: Check and exit.
        as_json: Print one line of JSON when the service is ready.
    """
    service = load_service(config, port)
    missing = [name for name in ("fastapi", "grpc_reflection", "python_multipart") if not is_installed(name)]
    if missing:
        raise ServiceError(
            f"the packages of the service are not installed ({', '.join(missing)}): run make setup-service"
        )
    target = target_cluster()
    if not target.is_local:
        _check_deepspeed(service)
    set_ray_environment(target)
    check_cluster_answers(target)
    output, progress = open_consoles()
    warn_about_address(service.config.host, progress)
    if target.is_local:
        _check_port(service)
    if dry_run:
        with _bucket(service):
            from service.dry_run import check_service

            check_service(service, target, progress if as_json else output)
        return 0
    work = _Run(service, target, output, progress, as_json)
    if not target.is_local:
        return work.run()
    return run_in_own_session(
        work.run,
        on_lost=lambda how: progress.print(
            f"error: the service's process was terminated ({how}). The bucket has its state: the same command continues all jobs.",
            soft_wrap=True,
            highlight=False,
        ),
    )


def keys_command(action: str, project: str, key_id: str | None, service: Path, as_json: bool) -> None:
    """Create, list or revoke keys of a project.

    Args:
        action: "create", "list" or "revoke".
        project: Name of the project.
        key_id: For "revoke": the only key to revoke.
        service: The service YAML.
        as_json: Print one line of JSON.
    """
    output, _ = open_consoles()
    loaded = load_service(service)
    with _bucket(loaded):
        store = S3Store(loaded.config.storage_path)
        if action == "create":
            key = create_key(store, project)
            output.print(json.dumps({"api_key": key}) if as_json else key, soft_wrap=True, highlight=False)
            return
        found = list_keys(store, project) if action == "list" else revoke_keys(store, project, key_id)
        if as_json:
            output.print(json.dumps([asdict(record) for record in found]), soft_wrap=True, highlight=False)
            return
        for record in found:
            created = time.strftime("%Y-%m-%d %H:%M", time.gmtime(record.created_at))
            state = "revoked" if record.revoked_at else "valid"
            output.print(f"{record.id}  {state:8} created {created} UTC", highlight=False)


def warn_about_address(host: str, progress: Console) -> None:
    """Print a warning if the service listens on an address that other machines reach."""
    if host == "localhost":
        return
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        progress.print(
            f"warning: host: {host}: other machines can connect, and keys and data are sent without encryption. Put a proxy with TLS "
            "before the service, or set host: 127.0.0.1.",
            soft_wrap=True,
            highlight=False,
        )


def _check_deepspeed(service: LoadedService) -> None:
    """Reject relative paths of DeepSpeed files: jobs run in other directories, on nodes that may not have the files."""
    for name, base in service.bases.items():
        written = load_config(base.path).config.deepspeed  # `service.bases` has absolute paths
        if isinstance(written, DeepspeedFile) and not Path(written.config_path).is_absolute():
            raise ServiceError(
                f"models.{name}.config: deepspeed.config_path: {written.config_path} is a relative path, but jobs run on the cluster's nodes. "
                f"Use a preset, such as deepspeed: zero_2, or an absolute path that every node has, in {base.path}"
            )


def _check_port(service: LoadedService) -> None:
    """Check that the address can be listened on. The replicas share it, so they could not detect another program."""
    host, port = service.config.host, service.config.port
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ServiceError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}. Choose another port with --port, or set host to an address "
            "of this machine"
        ) from error


@contextmanager
def _bucket(service: LoadedService) -> Iterator[None]:
    """Keep the embedded bucket running if the service uses it."""
    configs = [
        base.config.model_copy(update={"storage_path": service.config.storage_path})
        for base in service.bases.values()
    ]
    with ExitStack() as stack:
        if any(map(needs_embedded_bucket, configs)):
            stack.enter_context(embedded_bucket())
        yield


class _Run:
    """A running service."""

    def __init__(
        self, service: LoadedService, target: ClusterTarget, output: Console, progress: Console, as_json: bool
    ):
        self._service, self._target, self._as_json = service, target, as_json
        self._output, self._progress = output, progress
        self._stop = threading.Event()
        self._ownership = Ownership()

    def run(self) -> int:
        """Start the service, wait for a signal and stop it; return the exit code."""
        config = self._service.config
        with _bucket(self._service):
            check_writable(config.storage_path)
            self._write("starting Ray and the service")
            with importing():
                import ray
                from ray import serve

                from service.app import APP_NAME
                from training.loop.ray_internals import client_of_serve

            _connect(self._target, self._service)
            received = record_signals(then=self._stop.set)
            try:
                if self._target.is_local:
                    _check_resources(self._service)
                running = client_of_serve()
                if running is not None:
                    _check_http_options(config, running)
                try:
                    self._deploy()
                    if not self._stop.is_set():
                        self._announce(create_first_key(S3Store(config.storage_path), DEFAULT_PROJECT))
                    self._wait_for_end()
                finally:
                    deletes = self._ownership.leave()
                    if self._stop.is_set():
                        self._write(
                            "stopping: running jobs commit a checkpoint; the same command continues them"
                            if deletes
                            else "stopping: the service on the cluster belongs to another process, and continues"
                        )
                    if deletes and APP_NAME in serve.status().applications:
                        serve.delete(APP_NAME)
                    if running is None and not serve.status().applications:
                        serve.shutdown()
                    if deletes:
                        _stop_drivers(received)
            finally:
                ray.shutdown()
                restore_handlers()
        return 128 + received[0] if received else 0

    def _deploy(self) -> None:
        """Deploy the application, and wait until it answers or a signal arrives.

        Raises:
            ServiceError: Ray rejects the application, a replica does not start, or the bucket does not answer the replicas.
        """
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.config import HTTPOptions
        from ray.serve.exceptions import RayServeException
        from ray.serve.schema import ApplicationStatus

        from service.app import APP_NAME, build

        config, is_local = self._service.config, self._target.is_local
        replaces = APP_NAME in serve.status().applications
        if replaces:
            self._ownership.claim()
        try:
            application = build(self._service, behind_proxies=not is_local)
            serve.start(
                proxy_location="Disabled" if is_local else "EveryNode",
                http_options=HTTPOptions(host=config.host, port=config.port),
            )
            # `serve.run` would wait for the replicas without a limit, and no signal would stop it.
            serve.run_many(
                [serve.RunTarget(application, APP_NAME, "/")],
                wait_for_ingress_deployment_creation=False,
                wait_for_applications_running=False,
            )
        except (RayError, RayServeException, TimeoutError, ValueError) as error:
            raise ServiceError(
                f"Serve cannot start the service at host: {config.host}, port: {config.port}: {last_line(error)}"
            ) from error
        # A service that already ran, and its jobs, must survive an update that fails or is interrupted. A process that
        # replaces nothing owns from here on only: another may replace it before it is running.
        if not replaces:
            self._ownership.take()
        while not self._stop.wait(_POLL_SECONDS):
            if replaces:
                self._ownership.claim()
            found = serve.status().applications.get(APP_NAME)
            if found is None:
                raise ServiceError(
                    f"another process deleted the application {APP_NAME} while it started. Start the service again"
                )
            if found.status == ApplicationStatus.DEPLOY_FAILED:
                raise ServiceError(f"the service cannot start. {_reason(found)}")
            if found.status == ApplicationStatus.RUNNING:
                if not is_local:
                    self._wait_for_answer()
                if replaces and not self._stop.is_set():
                    self._ownership.take()
                return

    def _wait_for_end(self) -> None:
        """Wait for a signal, or until another process has replaced the service."""
        from ray.exceptions import RpcError

        while not self._stop.wait(_OWNER_SECONDS):
            with suppress(RpcError):  # the head restarts; if it does not return, Ray terminates this process
                if not self._ownership.is_mine():
                    self._write(
                        "another process has replaced the service on the cluster, which continues; this one exits"
                    )
                    return

    def _wait_for_answer(self) -> None:
        """Wait until a proxy of Serve answers at the service's address; print a warning if this machine has none.

        Raises:
            ServiceError: The service answers, but the bucket does not answer the service.
        """
        import httpx

        config, deadline = self._service.config, time.monotonic() + _ANSWER_SECONDS
        while not self._stop.is_set():
            try:
                status = httpx.get(
                    f"{self._url}/healthz", timeout=_HEALTH_SECONDS, trust_env=False
                ).status_code
            except httpx.TransportError:
                status = None
            if status == httpx.codes.OK:
                return
            if time.monotonic() > deadline:
                if status == httpx.codes.SERVICE_UNAVAILABLE:
                    raise ServiceError(
                        f"storage_path: {config.storage_path}: the bucket does not answer the service. Check that the cluster's nodes can "
                        "connect to the bucket and have its credentials"
                    )
                self._write(
                    f"warning: the service does not answer at host: {config.host}, port: {config.port} of this machine. It answers on the "
                    "nodes that have a proxy of Serve; `serve status` lists them"
                )
                return
            self._stop.wait(_POLL_SECONDS)

    @property
    def _url(self) -> str:
        host = self._service.config.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self._service.config.port}"

    def _announce(self, key: str | None) -> None:
        url = f"{self._url}/v1"
        if self._as_json:
            ready = {"base_url": url} | ({"api_key": key} if key else {})
            self._output.print(json.dumps(ready), soft_wrap=True, highlight=False)
            return
        self._output.print(f"ready: base_url={url}", soft_wrap=True, highlight=False)
        if key:
            self._output.print(
                f"the first key, of project {DEFAULT_PROJECT}; it is shown only now: {key}",
                soft_wrap=True,
                highlight=False,
            )

    def _write(self, text: str) -> None:
        self._progress.print(text, soft_wrap=True, highlight=False)


def _connect(target: ClusterTarget, service: LoadedService) -> None:
    """Connect to the cluster at RAY_ADDRESS, or start a local one, where jobs and engines share all cores."""
    import logging

    import ray

    from training.inference.vllm_environment import PYTHON_VARIABLE
    from training.launch.packaging import EVERYTHING_BUT_CODE, PROJECT
    from training.loop.ray_internals import lean_head_node

    if target.is_local:
        engines = sum(base.engine_resources["CPU"] for base in service.config.models.values())
        cores = os.cpu_count() or 1
        with lean_head_node():
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                num_cpus=cores + math.ceil(engines),
            )
    else:
        environment = {"working_dir": str(PROJECT), "excludes": EVERYTHING_BUT_CODE}
        variables = {STATE_VARIABLE: str(state_directory())}
        if python := os.environ.get(PYTHON_VARIABLE):
            variables[PYTHON_VARIABLE] = python
        environment |= {"env_vars": variables}
        ray.init(
            address=target.address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env=environment,
        )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def _check_http_options(config: ServiceConfig, running: Any) -> None:
    """Check that a running Serve, which keeps its HTTP options, listens at the service's address.

    Args:
        config: The service YAML.
        running: Client of the running Serve.
    """
    where = f"the service cannot listen at host: {config.host}, port: {config.port}: Serve already runs on the cluster"
    if running.get_serve_details()["proxy_location"] == "Disabled":
        raise ServiceError(f"{where} without proxies. Stop it with `serve shutdown`")
    has = running.http_config
    if (has.host, has.port) != (config.host, config.port):
        raise ServiceError(
            f"{where} at host: {has.host}, port: {has.port}. Write these into the service YAML, or stop it with `serve shutdown`"
        )


def _check_resources(service: LoadedService) -> None:
    """Check that this machine has the Ray resources of all engines; Serve would wait for them without a limit."""
    import ray

    available = ray.cluster_resources()
    needed: dict[str, float] = {}
    for base in service.config.models.values():
        for name, amount in base.engine_resources.items():
            needed[name] = round(needed.get(name, 0) + amount, 4)  # Ray's precision
    for name, amount in needed.items():
        if amount > available.get(name, 0):
            models = ", ".join(
                model for model, base in service.config.models.items() if name in base.engine_resources
            )
            raise ServiceError(
                f"models: the engines of {models} need {{{name}: {amount:g}}}, but this machine has {available.get(name, 0):g}. Reduce "
                "`resources` or `num_replicas`, or set RAY_ADDRESS to a cluster"
            )


def _reason(application: Any) -> str:
    """Return the deployment of an application that failed, and the error of its replica."""
    for name, deployment in application.deployments.items():
        if deployment.status == "DEPLOY_FAILED":
            return f"{name}: {last_line(deployment.message)}"
    return application.message


def _stop_drivers(signals: list[int]) -> None:
    """Ask all drivers to commit a checkpoint, and wait until they have exited; a second signal stops at once."""
    import ray.exceptions

    from service.drivers import driver_state, find_driver, job_ids_of_drivers

    drivers = [actor for job_id in job_ids_of_drivers() if (actor := find_driver(job_id)) is not None]
    for actor in drivers:
        actor.stop.remote()
    deadline = time.monotonic() + _STOP_SECONDS
    while drivers and len(signals) < 2 and time.monotonic() < deadline:
        try:
            states = [(actor, driver_state(actor, 5)) for actor in drivers]
        except (ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError):
            time.sleep(0.2)
            continue
        drivers = [actor for actor, state in states if state is not None and state.exit_code is None]
        time.sleep(0.2)


def _port(text: str) -> int:
    port = positive(text)
    if port > 65535:
        raise ArgumentTypeError(f"{text}: the highest port is 65535")
    return port

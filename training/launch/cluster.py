"""The Ray cluster of a run: a local cluster, or the one at RAY_ADDRESS (driver side)."""

import json
import math
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions
from ray.util import placement_group_table

from configs.schema import FinetuneConfig
from training.launch.packaging import EVERYTHING_BUT_CODE, PROJECT
from training.launch.reachability import cannot_connect
from training.launch.vitals import ClusterLostError, Vitals, kill, processes_below_raylet
from training.loop.ray_internals import (
    RAY_JOB_CONFIG_JSON_ENV_VAR,
    autoscaler_maximum,
    cluster_on_this_machine,
    end_local_head,
    has_node_groups,
    lean_head_node,
    session_directory,
)
from training.models.kernels import Device
from training.planning.endpoints import ClusterError, ClusterTarget
from utils.errors import AnnealError, first_line
from utils.files import format_bytes
from utils.processes import Stopped, last_stopped, raise_signals, restore_handlers
from utils.storage.bucket import uses_embedded_bucket
from utils.storage.embedded_bucket import STATE_VARIABLE, state_directory
from utils.storage.node_cache import LIMIT_VARIABLE

if TYPE_CHECKING:
    from training.planning.plan import RunPlan  # imports torch

# On CPU, glibc returns a step's large blocks to the kernel and allocates them again in the next step, which costs 10% of the
# step time. Ray's own processes preload jemalloc. With these settings workers do too, and it retains freed memory for 10 s.
_CPU_ALLOCATOR = {
    "RAY_LD_PRELOAD_ON_WORKERS": "1",
    "MALLOC_CONF": "oversize_threshold:0,dirty_decay_ms:10000,muzzy_decay_ms:10000",
}
# Rows of varying length fragment fixed-size blocks. torch reads the variable at the first use of a GPU, which happens in Ray's
# code before ours runs.
GPU_ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
# A worker that requested no GPU sees all GPUs of its node, and libraries would use them.
_NO_GPUS = {"CUDA_VISIBLE_DEVICES": ""}
_NAMES_OF_GPU_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

_vitals: Vitals | None = None
"""The watch over the cluster that this process is connected to; as the connection, there is one per process."""


@dataclass(frozen=True)
class Workers:
    """The workers that a run requests from a cluster."""

    count: int
    """Maximum number of workers."""
    least: int
    """Minimum number of workers that a run can start with."""
    device: Device
    each: dict[str, float]
    """Ray resources per worker."""
    storage: str
    """URI that every worker must be able to access."""

    @property
    def together(self) -> dict[str, float]:
        """Ray resources of the maximum number of workers."""
        return {name: amount * self.count for name, amount in self.each.items()}

    @property
    def at_least(self) -> dict[str, float]:
        """Ray resources of the minimum number of workers."""
        return {name: amount * self.least for name, amount in self.each.items()}


def workers_of(plan: "RunPlan") -> Workers:
    """Return the workers that a plan requests."""
    return workers_on(plan.device, plan.config, plan.run_uri)


def workers_on(device: Device, config: FinetuneConfig, storage: str) -> Workers:
    """Return the workers that a configuration requests on a device, and that access a storage URI."""
    each = resources_of_device(device) | config.worker_resources
    return Workers(config.most_devices, config.fewest_devices, device, each, storage)


def resources_of_device(device: Device) -> dict[str, float]:
    """Return the default Ray resources per worker."""
    return {"CPU": 1.0, "GPU": 1.0} if device == "cuda" else {"CPU": 1.0}


@dataclass
class Connection:
    """A connection to a cluster."""

    keeps_logs: bool = False
    """True to keep the session directory of a local cluster, with Ray's logs, when it ends."""


@contextmanager
def disconnecting() -> Iterator[Connection]:
    """Disconnect from the cluster when the block exits; raise ClusterLostError if it is lost in the block."""
    connection = Connection()
    try:
        yield connection
    except (ClusterLostError, ClusterStartError):
        connection.keeps_logs = True
        raise
    except Stopped:
        raise
    except KeyboardInterrupt as interrupt:  # calls of Ray raise it in place of LostInterrupt and Stopped
        if lost := _vitals and _vitals.lost:
            connection.keeps_logs = True
            raise ClusterLostError(lost) from None
        raise last_stopped() or interrupt from None
    finally:
        disconnect(keep_logs=connection.keeps_logs)


@contextmanager
def cluster(workers: Workers, target: ClusterTarget, progress: Callable[[str], None]) -> Iterator[Connection]:
    """Connect to the target cluster, or start a local one sized to the workers; disconnect when the block exits.

    The session directory of a local cluster is removed, unless the block raises an error or asks to keep it.

    Args:
        workers: The workers that the cluster must have resources for.
        target: The cluster to connect to. A local one may already have been started for these workers.
        progress: Called with a line if the cluster has to scale up.
    """
    address = target.address
    with disconnecting() as connection:
        try:
            if address:
                join_cluster(workers.device, target)
            elif not ray.is_initialized():
                start_local_cluster(workers)
            growth = _missing(workers, address)
            if growth:
                progress(f"waiting for the cluster to scale up: {growth}")
            yield connection
        except BaseException:
            connection.keeps_logs = True
            raise


def vitals() -> Vitals:
    """Return the watch over the cluster that this process is connected to."""
    assert _vitals is not None
    return _vitals


def join_cluster(device: Device, target: ClusterTarget) -> None:
    """Connect to an existing cluster, unless this process is connected already."""
    assert target.address
    if not ray.is_initialized():
        _join(target.address, _runtime_environment(device))


class ClusterStartError(ClusterError):
    """A local cluster that Ray cannot start; the message has Ray's reason and the directory of Ray's files."""

    def __init__(self, reason: Exception):
        directory = os.environ.get("RAY_TMPDIR", "/tmp")
        super().__init__(
            f"Ray cannot start on this machine: {first_line(reason).rstrip('.')}. Its files and sockets go to {directory}/ray: this must be a "
            "short path on a disk with free space that you may write to. RAY_TMPDIR=DIRECTORY sets another one."
        )


def start_local_cluster(workers: Workers) -> None:
    """Start a cluster on this machine that is sized to the workers, and connect to it."""
    os.environ.update(_allocator(workers.device) | (_NO_GPUS if workers.device == "cpu" else {}))
    gpus = _gpus_here(workers)
    try:
        with lean_head_node():
            _connect(
                None,
                address="local",  # otherwise Ray connects to a cluster that another process started on this machine
                num_cpus=math.ceil(workers.together["CPU"]),
                num_gpus=gpus,
                resources={
                    name: amount
                    for name, amount in workers.together.items()
                    if name not in ("CPU", "GPU", "memory")
                },
                include_dashboard=False,
                log_to_driver=False,
            )
    except AnnealError:
        raise
    except Exception as error:  # Ray has no class for these errors
        traceback.print_exc()  # for the log file
        raise ClusterStartError(error) from error


def disconnect(*, keep_logs: bool = False) -> None:
    """Disconnect from the cluster; end a local one and, unless its logs are kept, remove its session directory.

    ray.shutdown restores the kernel's default action for SIGTERM, so the handlers are installed again.
    """
    if _vitals:
        _vitals.end()
    session = session_directory()
    below_raylet = processes_below_raylet()
    try:
        ray.shutdown()
    finally:
        restore_handlers()
    end_local_head()
    kill(below_raylet)
    if _vitals:
        _vitals.left()
    if session and not keep_logs:
        _remove_session(session)


def _remove_session(session: Path) -> None:
    """Remove the session directory, and Ray's link to the latest session if it names this one: Ray replaces no broken link."""
    shutil.rmtree(session, ignore_errors=True)
    latest = session.with_name("session_latest")
    if latest.is_symlink() and latest.readlink() == session:
        latest.unlink(missing_ok=True)


def _connect(gcs: str | None, **arguments: Any) -> None:
    """Call ray.init, and watch the cluster until `disconnect`. Raise `Stopped` on SIGTERM: Ray's handler exits with code 15 and stays.

    Args:
        gcs: Address of the cluster's GCS; None if it is unknown or does not exist yet.
        arguments: Arguments of ray.init.
    """
    global _vitals
    _vitals = Vitals(gcs)
    try:
        ray.init(**arguments)
    except SystemExit as exit_:
        raise Stopped(signal.SIGTERM) from exit_
    except Exception:
        _vitals.raise_if_lost()  # Ray's errors do not name the process
        raise
    finally:
        raise_signals()


def _gpus_here(workers: Workers) -> int:
    if workers.device == "cpu":
        return 0
    import torch

    return min(workers.count, torch.cuda.device_count())


def ask_cluster(workers: Workers, address: str) -> str:
    """Return a description of how the cluster meets the workers' needs, without starting any."""
    with disconnecting():
        _join(address, {})
        growth = _missing(workers, address)
        busy = _busy(workers)
    if growth:
        return f"must scale up: {growth}"
    return f"{address} has the resources for all workers" + (f", but not free: {busy}" if busy else "")


def _join(address: str, runtime_environment: Mapping[str, Any]) -> None:
    try:
        gcs = cluster_on_this_machine() if address == "auto" else address
        is_client = "://" in address  # such as anyscale://, which has no process to probe
        _connect(
            None if is_client else gcs,
            address=address,
            log_to_driver=False,
            runtime_env=dict(runtime_environment),
        )
    except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        raise cannot_connect(address, error) from error
    if not is_client:
        vitals().connected()


def _runtime_environment(device: Device) -> dict[str, Any]:
    """Return the runtime environment without keys that Ray's job server has set; Ray rejects a key that is set twice."""
    submitted = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}")).get("runtime_env") or {}
    variables = {
        STATE_VARIABLE: str(state_directory())
    }  # only a path, so that access keys stay on this machine
    if limit := os.environ.get(LIMIT_VARIABLE):
        variables[LIMIT_VARIABLE] = limit
    variables |= _allocator(device) if device == "cuda" else _NO_GPUS
    submitted_variables = submitted.get("env_vars") or {}
    environment: dict[str, Any] = {
        "env_vars": {name: value for name, value in variables.items() if name not in submitted_variables}
    }
    if "working_dir" not in submitted:
        environment |= {"working_dir": str(PROJECT), "excludes": EVERYTHING_BUT_CODE}
    return environment


def _allocator(device: Device) -> dict[str, str]:
    """Return the allocator settings of workers; variables set by the user take precedence."""
    if device == "cpu":
        return {name: os.environ.get(name, value) for name, value in _CPU_ALLOCATOR.items()}
    chosen = {name: os.environ[name] for name in _NAMES_OF_GPU_ALLOCATOR if name in os.environ}
    return chosen or GPU_ALLOCATOR


def _missing(workers: Workers, address: str | None) -> str | None:
    """Describe the resources that the cluster must add before the minimum number of workers can start; None if it has them.

    Raise an error if the cluster cannot scale up that far.

    Args:
        workers: The workers that the cluster must have resources for.
        address: The address of a remote cluster; None for a local one.
    """
    has = ray.cluster_resources()
    short = _short(workers.at_least, has)
    most = autoscaler_maximum()
    listed = _listed(short, has, most)
    may_grow = (
        all(most.get(resource, 0) >= amount for resource, amount in short.items())
        if most
        else has_node_groups()
    )
    if short and not may_grow:
        raise ClusterError(
            f"{f'the cluster at {address}' if address else 'this machine'} lacks resources that {_describe_least(workers)}: {listed}. "
            + (
                "It has no GPU at all: set device: cpu, or add nodes with GPUs."
                if "GPU" in short and not has.get("GPU")
                else "Lower num_devices or worker_resources, or use a larger cluster."
            )
        )
    nodes = [node for node in ray.nodes() if node["Alive"]]
    may_get_nodes = short or (address and _short(workers.together, has))
    if (len(nodes) > 1 or may_get_nodes) and uses_embedded_bucket(workers.storage):
        count = len(nodes) if len(nodes) > 1 else "more than one"
        raise ClusterError(
            f"the embedded bucket serves only this machine, but the cluster has {count} nodes. Set storage_path to a bucket that "
            "all nodes can access."
        )
    return listed or None


def _short(needed: Mapping[str, float], has: Mapping[str, float]) -> dict[str, float]:
    """Return the required amount of each resource that the cluster has less of."""
    return {name: amount for name, amount in needed.items() if has.get(name, 0) < amount}


def _listed(short: Mapping[str, float], has: Mapping[str, float], most: Mapping[str, float]) -> str:
    """List the required amounts with what the cluster has and, if its autoscaler reports it, the maximum it can scale up to."""
    return ", ".join(
        f"{name} {_amount(name, amount)} (has {_amount(name, has.get(name, 0))}"
        f"{f', at most {_amount(name, most.get(name, 0))}' if most else ''})"
        for name, amount in short.items()
    )


def _amount(name: str, amount: float) -> str:
    return format_bytes(int(amount)) if name.endswith("memory") else f"{amount:g}"


def _describe_least(workers: Workers) -> str:
    """Return the subject and verb of a sentence about the resources that workers need."""
    return f"{workers.least} workers need" if workers.least > 1 else "a worker needs"


def lacking(workers: Workers) -> str | None:
    """Describe the resources that a cluster lacks for the minimum number of workers, or that are in use; None if there are enough."""
    has = ray.cluster_resources()
    if short := _short(workers.at_least, has):
        return f"waiting for resources that {_describe_least(workers)}: {_listed(short, has, {})}"
    busy = None if _have_placement() else _busy(workers)
    return f"waiting until other work on the cluster frees resources: {busy}" if busy else None


def _have_placement() -> bool:
    """Return whether the cluster has reserved the resources of this job's workers, which then count as in use."""
    job = ray.get_runtime_context().get_job_id()  # the id of a placement group ends with that of its job
    groups = placement_group_table().items()
    return any(group.endswith(job) and facts["state"] == "CREATED" for group, facts in groups)


def _busy(workers: Workers) -> str | None:
    """Describe the resources that the cluster has for the minimum number of workers, but that are in use; None if they are free."""
    has, free = ray.cluster_resources(), ray.available_resources()
    short = _short(workers.at_least, free)
    in_use = ", ".join(
        f"{name} {_amount(name, amount)} (has {_amount(name, has.get(name, 0))}, free {_amount(name, free.get(name, 0))})"
        for name, amount in short.items()
    )
    return f"{_describe_least(workers)} {in_use}" if in_use else None

"""The cluster that a run's workers are placed on: the one that RAY_ADDRESS names, or one of this machine (driver side)."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.state import state
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]  # compiled, and without a stub
from ray.autoscaler.v2.sdk import get_cluster_resource_state

from training.addresses import TOKEN_ADVICE, ClusterError, ClusterTarget
from training.models.files import first_line
from training.models.kernels import Device
from training.plan import RunPlan
from training.travel import EVERYTHING_BUT_CODE, PROJECT
from utils.bucket import uses_embedded_bucket
from utils.embedded_bucket import STATE_VARIABLE, state_directory
from utils.files import format_bytes
from utils.node_cache import LIMIT_VARIABLE

# On CPU a step's large blocks are given back to the kernel and asked for again in the next one, for a tenth of the time.
# Ray's own processes have jemalloc; workers too then, and it keeps what was freed for ten seconds.
_CPU_ALLOCATOR = {
    "RAY_LD_PRELOAD_ON_WORKERS": "1",
    "MALLOC_CONF": "oversize_threshold:0,dirty_decay_ms:10000,muzzy_decay_ms:10000",
}
# Of long rows and short ones, blocks of fixed size leave gaps that nothing fits into. It is read when a GPU is first used, which Ray
# does before any code of ours.
GPU_ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
# Ray leaves a worker without GPUs all that its node has, and libraries would take them.
_NO_GPUS = {"CUDA_VISIBLE_DEVICES": ""}
_NAMES_OF_GPU_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@dataclass(frozen=True)
class Workers:
    """What a cluster is asked for."""

    count: int
    """The most that are placed."""
    least: int
    """With fewer nothing begins."""
    device: Device
    each: dict[str, float]
    """Ray resources of one."""
    storage: str
    """URI that all of them must reach."""

    @property
    def together(self) -> dict[str, float]:
        """Ray resources of all."""
        return {name: amount * self.count for name, amount in self.each.items()}

    @property
    def at_least(self) -> dict[str, float]:
        """Ray resources of the fewest that begin."""
        return {name: amount * self.least for name, amount in self.each.items()}


def workers_of(plan: RunPlan) -> Workers:
    """What a run trains on."""
    config = plan.config
    each = resources_of_device(plan.device) | config.worker_resources
    return Workers(config.most_devices, config.fewest_devices, plan.device, each, plan.run_uri)


def resources_of_device(device: Device) -> dict[str, float]:
    """Ray resources of a worker that has one, where nobody asks for others."""
    return {"CPU": 1.0, "GPU": 1.0} if device == "cuda" else {"CPU": 1.0}


@contextmanager
def cluster(workers: Workers, target: ClusterTarget, tell: Callable[[str], None]) -> Iterator[None]:
    """The cluster that is the target, or a local one sized to the workers that ends with the block.

    Args:
        workers: What has to find its place.
        target: The cluster to join.
        tell: Told that it waits for the cluster to scale up, where it does, and to what.

    Raises:
        ClusterError: it cannot be joined, or has too little and cannot scale up to it.
    """
    address = target.address
    if address:
        _join(address, _runtime_environment(workers.device))
    else:
        os.environ.update(_allocator(workers.device) | (_NO_GPUS if workers.device == "cpu" else {}))
        ray.init(
            address="local",  # else Ray joins one that somebody started on this machine
            num_cpus=math.ceil(workers.together["CPU"]),
            num_gpus=_gpus_here(workers),
            resources={
                name: amount
                for name, amount in workers.together.items()
                if name not in ("CPU", "GPU", "memory")
            },
            include_dashboard=False,
            log_to_driver=False,
        )
    try:
        growth = _missing(workers, address)
        if growth:
            tell(f"waiting for the cluster to scale up: {growth}")
        yield
    finally:
        ray.shutdown()


def _gpus_here(workers: Workers) -> int:
    if workers.device == "cpu":
        return 0
    import torch

    return min(workers.count, torch.cuda.device_count())


def ask_cluster(workers: Workers, address: str) -> str:
    """What a cluster has for the workers; nothing is started there.

    Raises:
        ClusterError: it cannot be joined, or has too little and cannot scale up to it.
    """
    _join(address, {})
    try:
        growth = _missing(workers, address)
    finally:
        ray.shutdown()
    return f"has to scale up: {growth}" if growth else f"{address} has what the workers need"


def _join(address: str, runtime_environment: Mapping[str, Any]) -> None:
    try:
        ray.init(address=address, log_to_driver=False, runtime_env=dict(runtime_environment))
    except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        causes = f"{error} {error.__cause__}"
        token = "AuthenticationError" in causes or isinstance(error, ray.exceptions.AuthenticationError)
        raise ClusterError(
            f"RAY_ADDRESS: the cluster at {address} cannot be joined ({first_line(error)}). "
            + (TOKEN_ADVICE if token else "Look whether it runs the same version of Ray and Python as here.")
        ) from error


def _runtime_environment(device: Device) -> dict[str, Any]:
    """What workers get besides what the job server, if it started this driver, gives them: Ray takes nothing twice."""
    submitted = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}")).get("runtime_env") or {}
    variables = {STATE_VARIABLE: str(state_directory())}  # a path: the keys themselves never travel
    if limit := os.environ.get(LIMIT_VARIABLE):
        variables[LIMIT_VARIABLE] = limit
    variables |= _allocator(device) if device == "cuda" else _NO_GPUS
    of_the_job = submitted.get("env_vars") or {}
    environment: dict[str, Any] = {
        "env_vars": {name: value for name, value in variables.items() if name not in of_the_job}
    }
    if "working_dir" not in submitted:
        environment |= {"working_dir": str(PROJECT), "excludes": EVERYTHING_BUT_CODE}
    return environment


def _allocator(device: Device) -> dict[str, str]:
    """How workers keep memory, where nobody has said it already."""
    if device == "cpu":
        return {name: os.environ.get(name, value) for name, value in _CPU_ALLOCATOR.items()}
    said = {name: os.environ[name] for name in _NAMES_OF_GPU_ALLOCATOR if name in os.environ}
    return said or GPU_ALLOCATOR


def _missing(workers: Workers, address: str | None) -> str | None:
    """What a cluster has to scale up to before the fewest workers find their places; None where they do now.

    Args:
        workers: What has to find its place.
        address: Of the cluster that is joined; None where it is this machine.

    Raises:
        ClusterError: it has too little, and cannot scale up to it.
    """
    has = ray.cluster_resources()
    short = _short(workers.at_least, has)
    most = state.get_max_resources_from_cluster_config() or {}  # of autoscalers that tell
    listed = _listed(short, has, most)
    may_grow = (
        all(most.get(resource, 0) >= amount for resource, amount in short.items())
        if most
        else _has_node_groups()
    )
    if short and not may_grow:
        raise ClusterError(
            f"{f'the cluster at {address}' if address else 'this machine'} lacks what {_describe_least(workers)}: {listed}. "
            "Lower num_devices or worker_resources, write device: cpu, or join a larger cluster."
        )
    nodes = [node for node in ray.nodes() if node["Alive"]]
    may_get_nodes = short or (address and _short(workers.together, has))
    if (len(nodes) > 1 or may_get_nodes) and uses_embedded_bucket(workers.storage):
        count = len(nodes) if len(nodes) > 1 else "more than one"
        raise ClusterError(
            f"the embedded bucket serves this machine only, and the cluster has {count} nodes. Set storage_path to a bucket that "
            "all nodes reach."
        )
    return listed or None


def _short(needed: Mapping[str, float], has: Mapping[str, float]) -> dict[str, float]:
    """Resource -> what is needed of it, where the cluster has less."""
    return {name: amount for name, amount in needed.items() if has.get(name, 0) < amount}


def _listed(short: Mapping[str, float], has: Mapping[str, float], most: Mapping[str, float]) -> str:
    """What is needed, beside what the cluster has and, where an autoscaler tells, may have at most."""

    def said(name: str, amount: float) -> str:
        return format_bytes(int(amount)) if name.endswith("memory") else f"{amount:g}"

    return ", ".join(
        f"{name} {said(name, amount)} (has {said(name, has.get(name, 0))}"
        f"{f', at most {said(name, most.get(name, 0))}' if most else ''})"
        for name, amount in short.items()
    )


def _describe_least(workers: Workers) -> str:
    """The beginning of a sentence on what they need."""
    return f"{workers.least} workers need" if workers.least > 1 else "a worker needs"


def lacking(workers: Workers) -> str | None:
    """What a cluster that has lost nodes lacks before the workers find their places again; None where it lacks nothing."""
    has = ray.cluster_resources()
    short = _short(workers.at_least, has)
    if not short:
        return None
    return f"waiting for the cluster to have what {_describe_least(workers)}: {_listed(short, has, {})}"


def _has_node_groups() -> bool:
    """Whether something (KubeRay, an autoscaler) makes the cluster's nodes, so that more may come."""
    cluster = get_cluster_resource_state(GcsClient(ray.get_runtime_context().gcs_address))
    return any(node.ray_node_type_name for node in cluster.node_states)

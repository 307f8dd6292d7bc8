"""Ray's private names that Anneal imports or overrides (Ray 2.60.0), each with the reason; other modules import them from here.

Check this file when Ray is upgraded. It imports no torch, so that a local cluster can start before the driver imports it.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any, NamedTuple

import ray
import ray.exceptions

# ray.init starts a head node with this class, and has no option for what it starts beside the GCS and the raylet.
from ray._private import node as _node

# ray.init uses the token file by itself for RAY_ADDRESS=auto. GcsClient terminates the process if RAY_AUTH_MODE=token lacks a token.
from ray._private.authentication.authentication_token_setup import (
    ensure_token_if_auth_enabled,
    maybe_enable_token_auth_if_token_available,
)

# The variable through which Ray's job server passes its runtime environment to the driver: Ray rejects a key that is set twice.
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

# ray.init finds the cluster of RAY_ADDRESS=auto with this function.
from ray._private.services import canonicalize_bootstrap_address_or_die

# The maximum that an autoscaler may scale up to; ray.cluster_resources counts only nodes that have joined.
from ray._private.state import state as _state

# The directories of Ray's logs and session, which no public function returns.
from ray._private.worker import global_worker as _global_worker

# The GCS answers a client at once, while ray.init retries for 20 s. It also stores values for all processes of a cluster.
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]  # compiled, and without a stub

# Which nodes an autoscaler or KubeRay has created; ray.nodes does not say.
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.train import ScalingConfig

# The callbacks that `LeanTrainer` omits. TorchTrainer has no option for them.
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

# After a node is lost, Ray counts it for some seconds and waits a minute for its resources. There is no public setting.
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR

# The errors in WorkerGroupError.worker_failures and ControllerError for a lost worker.
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerHealthCheckFailedError

# The only callback that sees the controller's states: workers waiting, started, failed. UserCallback sees exceptions only.
from ray.train.v2._internal.execution.callback import ControllerCallback

# The only way to read a preemption notice without a barrier; see `is_node_preempted`.
from ray.train.v2._internal.execution.context import get_train_context

# A local cluster has a controller and worker groups of its own: `LocalController` and `LocalWorkers` say what differs.
from ray.train.v2._internal.execution.controller import TrainController

# The states that a ControllerCallback receives.
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
    RunningState,
    SchedulingState,
    TrainControllerState,
)

# Ray's elastic policy accepts any number of workers in a range, and has no public way to exclude some.
from ray.train.v2._internal.execution.scaling_policy import (
    AUTOSCALING_REQUESTS_GET_TIMEOUT_S,
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)

# The actors of `LocalWorkers` and the group that takes them over; Ray's own group always starts new actors.
from ray.train.v2._internal.execution.worker_group import (
    RayTrainWorker,
    Worker,
    WorkerGroup,
    WorkerGroupPollStatus,
    WorkerGroupState,
)
from ray.train.v2._internal.execution.worker_group.placement_group_handle import (
    DefaultPlacementGroupHandle,
    PlacementGroupHandle,
)

# A group's resources as arguments of ray.remote, so that `LocalWorkers` requests the same as Ray's own group.
from ray.train.v2._internal.util import bundle_to_remote_args

# The base class of TorchTrainer, which does not import torch.
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

__all__ = [
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "WORKER_GROUP_START_TIMEOUT_S_ENV_VAR",
    "ControllerCallback",
    "DatasetsCallback",
    "ElasticPolicy",
    "InitializingState",
    "LeanTrainer",
    "LocalWorkers",
    "NoopDecision",
    "PlacementGroupCleanerCallback",
    "ReschedulingState",
    "ResizeDecision",
    "ResizingState",
    "RestartingState",
    "RunningState",
    "ScalingDecision",
    "SchedulingState",
    "TrainControllerState",
    "WorkerGroupPollStatus",
    "WorkerGroupStartupFailedError",
    "WorkerGroupState",
    "WorkerHealthCheckFailedError",
    "ask_gcs",
    "autoscaler_maximum",
    "cluster_on_this_machine",
    "cluster_value",
    "end_local_head",
    "has_node_groups",
    "is_node_preempted",
    "lean_head_node",
    "local_processes",
    "ray_logs",
    "session_directory",
    "set_cluster_value",
]

_NAMESPACE = b"anneal"
_PORT_STEP_MILLISECONDS = 100
_node_names: Any = _node
"""The module of Ray in which `lean_head_node` replaces two names."""
_ray_waits_for_port = _node_names.wait_for_persisted_port


class LocalProcess(NamedTuple):
    """A process that a local cluster cannot continue without."""

    name: str
    process: "Popen[bytes]"
    log: Path


_local_head: "_LeanNode | None" = None
"""The head node of the local cluster. Ray itself knows its processes only after all of them have started."""


class _LeanNode(_node.Node):
    """A head node without the processes of Ray that a local cluster does not need.

    These are the dashboard's API server (ray.init waits for it even with include_dashboard=False), the autoscaler's monitor and
    the log monitor, whose output log_to_driver=False discards. Worker processes import Ray once instead of twice.
    """

    def __init__(self, ray_params: Any, **arguments: Any):
        global _local_head
        _local_head = self
        ray_params.setup_worker_path = str(Path(__file__).with_name("start_ray_worker.py"))
        super().__init__(ray_params, **arguments)

    def start_api_server(self, **_: Any) -> None:
        self._webui_url = ""

    def start_monitor(self) -> None:
        pass

    def start_log_monitor(self) -> None:
        pass


@contextmanager
def lean_head_node() -> Iterator[None]:
    """Let ray.init start a local cluster of only the GCS, the raylet and the raylet's agents within the block."""
    originals = _node_names.Node, _node_names.wait_for_persisted_port
    _node_names.Node, _node_names.wait_for_persisted_port = _LeanNode, _wait_for_port
    try:
        yield
    finally:
        _node_names.Node, _node_names.wait_for_persisted_port = originals


def _wait_for_port(session: str, node: str, name: str, *, timeout_ms: int) -> int:
    """Wait for the port of a process in short steps: ray.init waits up to 30 s without releasing the lock of the interpreter."""
    deadline = time.monotonic() + timeout_ms / 1000
    while True:
        try:
            step = min(timeout_ms, _PORT_STEP_MILLISECONDS)
            return _ray_waits_for_port(session, node, name, timeout_ms=step)
        except RuntimeError:
            if time.monotonic() >= deadline:
                raise


class LocalWorkers:
    """The first worker actors of a local cluster, started before Ray Train asks for them, so that they can import libraries."""

    def __init__(self, count: int, resources: Mapping[str, float]):
        """Start the actors; nothing waits for them.

        Args:
            count: Number of workers.
            resources: Ray resources per worker.
        """
        self.placement = placement_group([dict(resources)] * count, strategy="PACK")
        actor: Any = ray.remote(**bundle_to_remote_args(dict(resources)))(RayTrainWorker)
        self.actors: list[Any] = [
            actor.options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.placement, index)
            ).remote()
            for index in range(count)
        ]

    def execute(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function in all workers before anything else, without waiting for it."""
        for actor in self.actors:
            actor.execute.remote(function, *arguments)


class _LocalWorkerGroup(WorkerGroup):
    """A worker group of a local cluster, whose controller runs in the driver."""

    started: LocalWorkers | None = None
    """Actors to use instead of new ones."""
    placement: PlacementGroupHandle | None = None
    """The resources of the actors; without them, the actors end."""

    def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> PlacementGroupHandle:
        # Ray's method would reserve the same resources again beside those of the actors that have started.
        if self.placement is None:
            self.placement = super()._create_placement_group(scaling_config, worker_group_context)
        return self.placement

    def _create_workers(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, num_workers: int, placement_group: Any, resources_per_worker: Any, **rest: Any
    ) -> Any:
        # Ray's method always starts new actors.
        if self.started is None:
            return super()._create_workers(num_workers, placement_group, resources_per_worker, **rest)
        try:
            facts = ray.get([actor.get_metadata.remote() for actor in self.started.actors])
        except ray.exceptions.RayActorError as error:
            raise WorkerGroupStartupFailedError(f"A worker exited while it started: {error}") from error
        workers = [
            Worker(actor, fact, resources_per_worker, placement_group_bundle_index=index)
            for index, (actor, fact) in enumerate(zip(self.started.actors, facts, strict=True))
        ]
        return self._assign_worker_ranks(workers, 0, None, None)

    def _init_train_context_on_workers(self, workers: Any, sync_actor: Any, train_context_args: Any) -> None:
        # Ray's method passes the controller's actor handle, which only validation functions use. The driver is no actor.
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=sync_actor,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{name: values[index] for name, values in train_context_args.items()},
                )
                for index, worker in enumerate(workers)
            ]
        )

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        return dict(custom_runtime_env)  # local workers inherit the driver's environment


class LocalController(TrainController):
    """Ray's controller in a thread of the driver, so that no process starts and imports torch for it."""

    def __init__(self, *, local_workers: LocalWorkers | None, **arguments: Any):
        super().__init__(**arguments)
        self._local_workers = local_workers
        self._is_stopped = False
        self._group: _LocalWorkerGroup | None = None
        self.worker_group_cls = self  # pyright: ignore[reportAttributeAccessIssue]  # see create

    def create(self, **arguments: Any) -> WorkerGroup:
        """Create and start a worker group; Ray calls this method of `worker_group_cls`."""
        group = _LocalWorkerGroup(**arguments)
        if self._local_workers is not None:
            group.started, self._local_workers = self._local_workers, None
            group.placement = DefaultPlacementGroupHandle(group.started.placement)
        self._group = group
        group._start()
        return group

    async def _step(self) -> Any:
        # `run` calls this between its waits; Ray has no other way to stop a controller that is no actor.
        if self._is_stopped:
            raise asyncio.CancelledError
        return await super()._step()

    def stop(self) -> None:
        """Let `run` raise CancelledError at its next step; called from another thread."""
        self._is_stopped = True

    def terminate_workers(self) -> None:
        """Terminate the workers, so that no call waits for them; called from another thread."""
        if (
            self._group is not None and self._group.placement is not None
        ):  # the length of a group needs its workers
            self._group.placement.shutdown()


class FixedSize(FixedScalingPolicy):
    """Ray's policy for a fixed number of workers, without the actor that asks an autoscaler for them."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ask for nothing; Ray calls this when the controller starts."""

    def _maybe_send_resource_request(self) -> None:
        pass


class ElasticPolicy(ElasticScalingPolicy):
    """Ray's elastic scaling policy with a hook for the number of workers, and with an up-to-date view of the cluster."""

    def __init__(self, scaling_config: ScalingConfig):
        super().__init__(scaling_config)

    def allowed_workers(self, possible: int) -> int:
        """Return how many of the possible workers to start."""
        return possible

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        # Ray's decisions for a running group and for one that waits both call this.
        return self.allowed_workers(super()._count_possible_workers(reserved_resources))

    def _get_reserved_resources(self) -> Any:
        # Ray's cached answer may be 20 s old and contain a lost node.
        try:
            coordinator: Any = self._autoscaling_coordinator
            answer = coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
            return ray.get(answer, timeout=AUTOSCALING_REQUESTS_GET_TIMEOUT_S)
        except ray.exceptions.RayError:
            return None  # unknown for now; Ray retries


class LeanTrainer(DataParallelTrainer):
    """The base of a TorchTrainer with an optional scaling policy, and without what Anneal does not need.

    - `DatasetsCallback` serves Ray Data, which is not used.
    - `PlacementGroupCleanerCallback` removes the placement group of a controller that died before its driver. Here the driver
      then exits, and Ray removes the group. A run would wait for the cleaner's process, and for up to 12 s at the end.
    - With a fixed number of workers on a local cluster, the controller runs in the driver and not in an actor.
    - With a fixed number of workers on a cluster without an autoscaler, nothing asks for one, which would start an actor.
    """

    def __init__(
        self,
        *arguments: Any,
        is_local: bool,
        scaling_policy: ElasticPolicy | None = None,
        local_workers: LocalWorkers | None = None,
        **keywords: Any,
    ):
        super().__init__(*arguments, **keywords)
        self._is_local = is_local
        self._scaling_policy = scaling_policy
        self._local_workers = local_workers
        self._controller: LocalController | None = None
        self._is_stopped = False

    @property
    def runs_in_driver(self) -> bool:
        """Return whether the controller runs in this process."""
        return self._is_local and self._scaling_policy is None

    def stop(self, *, terminate_workers: bool) -> None:
        """Let `fit` raise CancelledError if its controller runs in this process; otherwise do nothing.

        Args:
            terminate_workers: True to terminate the workers that the controller may wait for; False if their cluster is lost.
        """
        self._is_stopped = True
        if self._controller is not None:
            self._controller.stop()
            if terminate_workers:
                self._controller.terminate_workers()

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        # The only method in which Ray starts the controller, always as an actor, and with its own scaling policy.
        if self._scaling_policy is not None:
            arguments["scaling_policy"] = self._scaling_policy
        elif self._is_local or not (autoscaler_maximum() or has_node_groups()):
            arguments["scaling_policy"] = FixedSize(self.scaling_config)
        if not self.runs_in_driver:
            return super()._initialize_and_run_controller(**arguments)
        self._controller = LocalController(local_workers=self._local_workers, **arguments)
        if self._is_stopped:
            self._controller.stop()
        asyncio.run(self._controller.run())
        return self._controller.get_result()

    def _create_default_callbacks(self) -> list[Any]:
        # Ray adds its callbacks in this method only, and accepts none that replaces them.
        needless = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, needless)]


def ray_logs() -> Path:
    """Return the directory of Ray's logs on this node. There is no public way to find it."""
    node: Any = _global_worker.node
    return Path(node.get_logs_dir_path())


def session_directory() -> Path | None:
    """Return Ray's directory of the local cluster that this process has started; None if it has not started one."""
    session = getattr(_local_head, "_session_dir", None)
    return Path(session) if session else None


def local_processes() -> Sequence[LocalProcess]:
    """Return the GCS and the raylet of the local cluster, as far as they have started."""
    started: dict[str, Any] = getattr(_local_head, "all_processes", {})
    return [
        LocalProcess(label, infos[0].process, Path(_local_head.get_logs_dir_path()) / f"{name}.out")
        for name, label in (("gcs_server", "GCS"), ("raylet", "raylet"))
        if _local_head is not None and (infos := started.get(name))
    ]


def end_local_head() -> None:
    """End the processes of the local cluster that ray.shutdown does not know, since ray.init did not start all of them."""
    global _local_head
    if _local_head is not None:
        _local_head.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)
        _local_head = None


def cluster_on_this_machine() -> str:
    """Return the address of the cluster that `RAY_ADDRESS=auto` names; raise ConnectionError if there is none.

    Use this machine's token for it, as ray.init does; for any other address, Ray sends no token unless RAY_AUTH_MODE=token.
    """
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    return canonicalize_bootstrap_address_or_die("auto")


def ask_gcs(address: str) -> None:
    """Ask a GCS for the ID of its cluster; raise a RayError if it is no GCS or denies access. ray.init would retry for 20 s."""
    ensure_token_if_auth_enabled(create_token_if_missing=False)
    GcsClient(address=address)


def is_node_preempted() -> bool:
    """Return whether a node of this worker group has received a preemption notice; called inside a worker.

    The public `ray.train.get_preemption_info` waits for all workers at the same barrier as `ray.train.report`, which the
    committing thread calls. Ray may match one worker's call with another worker's call of the other function. The remaining
    workers then wait forever.
    """
    return get_train_context().preemption_context.preemption_info is not None


def autoscaler_maximum() -> Mapping[str, float]:
    """Return the maximum of each resource that the cluster can scale up to; empty if its autoscaler reports none."""
    return _state.get_max_resources_from_cluster_config() or {}


def has_node_groups() -> bool:
    """Return whether KubeRay or an autoscaler creates the cluster's nodes, so that nodes may be added."""
    cluster = get_cluster_resource_state(GcsClient(ray.get_runtime_context().gcs_address))
    return any(node.ray_node_type_name for node in cluster.node_states)


def client_of_serve() -> Any:
    """Return the client of the Ray Serve that runs on the cluster, or None. No public function returns its HTTP options."""
    from ray.serve.context import _get_global_client  # only the service installs ray[serve]

    return _get_global_client(raise_if_no_controller_running=False)


def set_cluster_value(name: str, value: str) -> None:
    """Store a value in the cluster's GCS. An application of Ray Serve has no field for its owner."""
    gcs = GcsClient(ray.get_runtime_context().gcs_address)
    gcs.internal_kv_put(name.encode(), value.encode(), True, _NAMESPACE)


def cluster_value(name: str) -> str | None:
    """Return a value that `set_cluster_value` has stored, or None."""
    stored = GcsClient(ray.get_runtime_context().gcs_address).internal_kv_get(name.encode(), _NAMESPACE)
    return None if stored is None else stored.decode()

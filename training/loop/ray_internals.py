"""Ray's private names that Anneal uses (Ray 2.60.0), each with the reason; other modules import them from here.

Check this file when Ray is upgraded.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

# The variable through which Ray's job server passes its runtime environment to the driver: Ray rejects a key that is set twice.
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.state import state as _state
from ray._private.worker import global_worker as _global_worker
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]  # compiled, and without a stub
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

# After a node is lost, Ray counts it for some seconds and waits a minute for its resources. There is no public setting.
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR

# The errors in WorkerGroupError.worker_failures and ControllerError for a lost worker.
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerHealthCheckFailedError

# The only callback that sees the controller's states: workers waiting, started, failed. UserCallback sees exceptions only.
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.context import get_train_context
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
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState

__all__ = [
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "WORKER_GROUP_START_TIMEOUT_S_ENV_VAR",
    "ControllerCallback",
    "DatasetsCallback",
    "ElasticPolicy",
    "InitializingState",
    "LeanTorchTrainer",
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
    "autoscaler_maximum",
    "has_node_groups",
    "is_node_preempted",
    "ray_logs",
]


class LeanTorchTrainer(TorchTrainer):
    """A TorchTrainer with an optional scaling policy, and without two of Ray's callbacks that would delay each start.

    `DatasetsCallback` serves Ray Data, which is not used. `PlacementGroupCleanerCallback` removes placement groups after the
    driver is lost. A local cluster ends with its driver, which would wait up to 12 s for the cleaner.
    """

    def __init__(
        self,
        *arguments: Any,
        is_local: bool,
        scaling_policy: ElasticScalingPolicy | None = None,
        **keywords: Any,
    ):
        super().__init__(*arguments, **keywords)
        self._is_local = is_local
        self._scaling_policy = scaling_policy

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if self._scaling_policy is not None:
            arguments["scaling_policy"] = self._scaling_policy
        return super()._initialize_and_run_controller(**arguments)

    def _create_default_callbacks(self) -> list[Any]:
        needless: list[type] = [DatasetsCallback]
        if self._is_local:
            needless.append(PlacementGroupCleanerCallback)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, tuple(needless))]


class ElasticPolicy(ElasticScalingPolicy):
    """Ray's elastic scaling policy with a hook for the number of workers, and with an up-to-date view of the cluster."""

    def __init__(self, scaling_config: ScalingConfig):
        super().__init__(scaling_config)

    def allowed_workers(self, possible: int) -> int:
        """Return how many of the possible workers to start."""
        return possible

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        return self.allowed_workers(super()._count_possible_workers(reserved_resources))

    def _get_reserved_resources(self) -> Any:
        # Ray's cached answer may be 20 s old and contain a lost node.
        try:
            coordinator: Any = self._autoscaling_coordinator
            answer = coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
            return ray.get(answer, timeout=AUTOSCALING_REQUESTS_GET_TIMEOUT_S)
        except ray.exceptions.RayError:
            return None  # unknown for now; Ray retries


def ray_logs() -> Path:
    """Return the directory of Ray's logs on this node. There is no public way to find it."""
    node: Any = _global_worker.node
    return Path(node.get_logs_dir_path())


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

"""How many workers a run has, and when that changes: a part of Ray's controller, which starts them, loses them and starts others.

Fewer, when a node is lost: at once, from the newest committed checkpoint. More, when nodes have come: behind a checkpoint that the
workers commit for it, so that no step is trained twice.
"""

import time
from collections.abc import Sequence
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
    RunningState,
    SchedulingState,
    TrainControllerState,
)
from ray.train.v2._internal.execution.scaling_policy import (
    AUTOSCALING_REQUESTS_GET_TIMEOUT_S,
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState

from training.events import PlacesFound, PlacesWanted, WorkersFailed

_LOOK_FOR_PLACES_SECONDS = 1.0


class GroupSizes(ElasticScalingPolicy):
    """Ray's own policy, but for numbers of workers that can share a step, and without losing steps by growing."""

    def __init__(self, scaling_config: ScalingConfig, counts: Sequence[int], mailbox: Any):
        """See ElasticScalingPolicy.

        Args:
            scaling_config: With a range of workers.
            counts: The numbers that it may have.
            mailbox: The driver's EventMailbox, where workers hear that they are to make room.
        """
        super().__init__(scaling_config)
        self._counts = tuple(counts)
        self._mailbox = mailbox
        self._asked_to_regroup = False

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Begin with what there is, once that is enough."""
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, ResizeDecision):
            self._asked_to_regroup = False
            ray.get(self._mailbox.go_on.remote())
        else:
            time.sleep(_LOOK_FOR_PLACES_SECONDS)  # Ray would ask again at once
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Where there is room for more, ask the workers to commit a checkpoint and wait; when they do, begin anew with all."""
        if self._asked_to_regroup:
            if ray.get(self._mailbox.is_at_rest.remote()):
                return self.make_decision_for_non_running_worker_group()
            return NoopDecision()
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, ResizeDecision) and decision.num_workers > worker_group_state.num_workers:
            self._asked_to_regroup = True
            self._mailbox.ask_to_regroup.remote()
        return NoopDecision()

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        possible = super()._count_possible_workers(reserved_resources)
        return max((count for count in self._counts if count <= possible), default=0)

    def _get_reserved_resources(self) -> Any:
        # Ray's own answer may be 20 s old, and name a node that is gone.
        try:
            coordinator: Any = self._autoscaling_coordinator
            answer = coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
            return ray.get(answer, timeout=AUTOSCALING_REQUESTS_GET_TIMEOUT_S)
        except ray.exceptions.RayError:
            return None  # not known now; it is asked again


def causes_of(error: BaseException) -> tuple[str, ...]:
    """What each of the workers that failed said, or Ray of itself."""
    failures = error.worker_failures.values() if isinstance(error, ray.train.WorkerGroupError) else [error]
    return tuple(str(failure).strip() or type(failure).__name__ for failure in failures)


class GroupTold(ControllerCallback):
    """Tells the driver who controls the workers, when they failed, or are not there yet, and when all of them have their places."""

    def __init__(self, mailbox: Any):
        self._mailbox = mailbox
        self._wanted = False
        self._workers = 0

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called once, in the controller."""
        self._mailbox.controlled_by.remote(ray.get_runtime_context().current_actor)

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Called over and over while nothing changes."""
        if isinstance(current_state, RestartingState) and not isinstance(previous_state, RestartingState):
            self._mailbox.put.remote(WorkersFailed(causes_of(current_state.training_failed_error)))
        match current_state:
            case (
                InitializingState()
                | RestartingState()
                | ReschedulingState()
                | ResizingState()
                | SchedulingState()
            ):
                if isinstance(current_state, SchedulingState):
                    decision: Any = current_state.scaling_decision
                    self._workers = decision.num_workers
                if not self._wanted:
                    self._mailbox.put.remote(PlacesWanted())
                self._wanted = True
            case RunningState():
                if self._wanted:
                    self._mailbox.put.remote(PlacesFound(self._workers))
                self._wanted = False
            case _:
                pass

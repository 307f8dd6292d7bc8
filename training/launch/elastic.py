"""Elastic worker groups: the policy and the callback that run inside Ray's controller.

After a node is lost, the run resumes from the latest committed checkpoint with fewer workers. When nodes join, the workers
first commit a checkpoint, so that no step is trained twice. They then restart as a larger group.
"""

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.train import ScalingConfig

from training.events import WorkersFailed, WorkersStarted, WorkersWaiting
from training.launch.failures import classify_failures
from training.loop.ray_internals import (
    ControllerCallback,
    ElasticPolicy,
    InitializingState,
    NoopDecision,
    ReschedulingState,
    ResizeDecision,
    ResizingState,
    RestartingState,
    RunningState,
    ScalingDecision,
    SchedulingState,
    TrainControllerState,
    WorkerGroupPollStatus,
    WorkerGroupState,
)

_RESOURCE_POLL_SECONDS = 1.0


class GroupSizes(ElasticPolicy):
    """Ray's elastic policy, restricted to worker counts that divide a step evenly, and growing only at a checkpoint."""

    def __init__(self, scaling_config: ScalingConfig, counts: Sequence[int], mailbox: Any):
        """Create the policy on the driver; Ray's controller runs it.

        Args:
            scaling_config: Ray's configuration, with a range of worker counts.
            counts: The allowed worker counts.
            mailbox: The driver's EventMailbox, which passes regroup requests to the workers.
        """
        super().__init__(scaling_config)
        self._counts = tuple(counts)
        self._mailbox = mailbox
        self._requested_regroup = False

    def allowed_workers(self, possible: int) -> int:
        """Return the largest allowed worker count up to `possible`, or 0 if there is none."""
        return max((count for count in self._counts if count <= possible), default=0)

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start a group with the available resources once they suffice."""
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, ResizeDecision):
            self._requested_regroup = False
            ray.get(self._mailbox.clear_regroup.remote())
        else:
            time.sleep(_RESOURCE_POLL_SECONDS)  # Ray would call again at once
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Request a regroup when there are resources for more workers; resize the group once the workers have committed."""
        if self._requested_regroup:
            if ray.get(self._mailbox.is_paused.remote()):
                return self.make_decision_for_non_running_worker_group()
            return NoopDecision()
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, ResizeDecision) and decision.num_workers > worker_group_state.num_workers:
            self._requested_regroup = True
            self._mailbox.request_regroup.remote()
        return NoopDecision()


class WorkerGroupReporter(ControllerCallback):
    """A controller callback that reports the controller, and workers that wait, start or fail, to the driver's mailbox."""

    def __init__(self, mailbox: Any):
        self._mailbox = mailbox
        self._is_waiting = False
        self._workers = 0

    def after_controller_start(self, train_run_context: Any) -> None:
        """Register a controller that is an actor; Ray calls this once, in the controller."""
        if ray.get_runtime_context().get_actor_id():
            self._mailbox.controlled_by.remote(ray.get_runtime_context().current_actor)

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Emit an event for each state change; Ray calls this repeatedly, even if the state is unchanged."""
        if isinstance(current_state, RestartingState) and not isinstance(previous_state, RestartingState):
            self._mailbox.put.remote(WorkersFailed(classify_failures(current_state.training_failed_error)))
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
                if not self._is_waiting:
                    self._mailbox.put.remote(WorkersWaiting())
                self._is_waiting = True
            case RunningState():
                if self._is_waiting:
                    self._mailbox.put.remote(WorkersStarted(self._workers))
                self._is_waiting = False
            case _:
                pass

"""The manifest, metrics and event of a checkpoint at the time of its save."""

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from configs.schema import DEVICE_KEYS, config_hash
from runs.layout import (
    DataPosition,
    Manifest,
    checkpoint_uri,
    metrics_lines,
)
from training.checkpoints.committer import SavedCheckpoint, package_versions
from training.events import CheckpointCommitted
from training.planning.deepspeed import offloads
from training.planning.plan import RunPlan
from training.world import World

if TYPE_CHECKING:
    from transformers import TrainerState

    from training.loop.throughput import Throughput


def describe_saved(
    plan: RunPlan, world: World, throughput: "Throughput", directory: Path, state: "TrainerState"
) -> SavedCheckpoint:
    """Describe the checkpoint that transformers has just saved.

    Args:
        plan: The run's plan.
        world: This worker.
        throughput: The counters up to this step.
        directory: The local directory of the checkpoint.
        state: transformers' state at this step.
    """
    step, epoch = state.global_step, state.epoch or 0.0
    eval_loss = next(
        (entry["eval_loss"] for entry in state.log_history if entry["step"] == step and "eval_loss" in entry),
        None,
    )
    manifest = Manifest(
        step=step,
        epoch=epoch,
        eval_loss=eval_loss if eval_loss is not None and math.isfinite(eval_loss) else None,
        world_size=world.world_size,
        zero_stage=plan.resolved.zero_stage,
        offload=offloads(plan.deepspeed),
        config_hash=plan.config_hash,
        hash_without_devices=config_hash(plan.config, without=DEVICE_KEYS),
        data=plan.data,
        data_position=DataPosition(
            epoch=step // plan.steps_per_epoch,
            steps_in_epoch=step % plan.steps_per_epoch,
            rows_seen=throughput.trained.rows,
        ),
        parent=plan.parent,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=package_versions(),
        files=[],
    )
    event = committed_event(plan, step, throughput)
    return SavedCheckpoint(directory, manifest, metrics_lines(state.log_history), event)


def committed_event(plan: RunPlan, step: int, throughput: "Throughput") -> CheckpointCommitted:
    """Return the event for the checkpoint of this run at `step`."""
    return CheckpointCommitted(
        step=step,
        uri=checkpoint_uri(plan.run_uri, step),
        tokens=throughput.trained.tokens,
        trained_tokens=throughput.trained.trained_tokens,
        speed=throughput.speed(),
    )

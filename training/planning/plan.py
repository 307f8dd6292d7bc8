"""The plan of a run: what the driver decided and the workers follow, and the report that a user reads before training."""

from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict

from configs.schema import FinetuneConfig
from runs.layout import DataFingerprints
from training.data.batches import BatchPlan, BatchShape, pack
from training.models.kernels import Device, KernelChoice, WeightsDtype
from training.planning.deepspeed import ZeroStage
from training.planning.endpoints import ClusterTarget
from training.planning.flops import RowFlops
from training.planning.paths import scratch_directory


class Resolved(BaseModel):
    """Decisions that are made once, by the planner, and that everything else reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: ClusterTarget
    """Where the workers are placed."""
    zero_stage: ZeroStage
    kernels: KernelChoice
    weights_dtype: WeightsDtype
    """In which the base is loaded."""


class RunPlan(BaseModel):
    """What the driver decided and the workers follow. It crosses the wire as a plain dictionary and is validated again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: FinetuneConfig
    config_hash: str
    run_name: str
    run_uri: str
    device: Device
    resolved: Resolved
    deepspeed: dict[str, Any] | None
    base_model: str
    """Hub id, absolute directory or s3:// prefix of the weights to start from."""
    adapter: str | None
    """Directory or s3:// prefix of the LoRA adapter to continue."""
    parent: str | None
    """What the run started from, if not from the plain model: recorded in manifests and the result."""
    restore_from: str | None
    """URI of the checkpoint whose whole trainer state is taken."""
    chat_template: str | None
    """Jinja text that takes the place of the tokenizer's own."""
    prepared: str
    """Where the rows' tokens are kept in the bucket, by their keys."""
    train: str
    """Key of the training rows."""
    valid: str | None
    data: DataFingerprints
    max_steps: int
    steps_per_epoch: int
    flops: RowFlops | None
    """What a row is worth; None where nobody has counted it for such layers or such a task."""
    scratch: str
    """Absolute directory for the cache and unfinished files: the driver's; see `on_this_node`."""

    @property
    def kernels(self) -> KernelChoice:
        """The kernels that train the model."""
        return self.resolved.kernels

    @property
    def cache(self) -> Path:
        """Where a node keeps what it downloaded and tokenised."""
        return Path(self.scratch) / "cache"

    def order(self, lengths: np.ndarray, longest: int, devices: int) -> BatchPlan:
        """Which rows each step takes; see `order_of`."""
        return order_of(self.config, lengths, longest, devices)

    def on_this_node(self) -> Self:
        """The plan with a scratch directory of the node that asks, where the YAML names none: nodes need not have the driver's."""
        if self.config.output_dir:
            return self
        return self.model_copy(update={"scratch": str(scratch_directory(self.config))})


def order_of(config: FinetuneConfig, lengths: np.ndarray, longest: int, devices: int) -> BatchPlan:
    """Which rows each step of a run takes: the same here and on every worker, and on any number of them.

    Args:
        config: The YAML.
        lengths: Tokens of each training row.
        longest: Of them.
        devices: One of the configuration's device_counts.
    """
    packs = pack(lengths, config.context_length or longest) if config.packing else None
    shape = BatchShape(
        len(lengths) if packs is None else len(packs),
        config.batch_size,
        devices,
        config.accumulation_on(devices),
    )
    is_padded_to_longest = config.padding == "longest" and packs is None
    return BatchPlan(shape, config.seed, lengths=lengths if is_padded_to_longest else None, packs=packs)

"""The plan of a run: the driver's decisions, which the workers follow."""

from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict

from configs.schema import FinetuneConfig
from runs.layout import DataFingerprints
from training.data.batches import BatchPlan, BatchShape, pack
from training.models.attention import Attention
from training.models.kernels import Device, KernelChoice, WeightsDtype
from training.models.new_tokens import NewTokens
from training.planning.deepspeed import ZeroStage
from training.planning.endpoints import ClusterTarget
from training.planning.flops import RowFlops
from training.planning.paths import scratch_directory


class Resolved(BaseModel):
    """Decisions that the planner makes once; all other code reads them here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: ClusterTarget
    """The cluster or machine where the workers are placed."""
    zero_stage: ZeroStage
    kernels: KernelChoice
    attention: Attention
    weights_dtype: WeightsDtype
    """The dtype in which the base model is loaded."""


class RunPlan(BaseModel):
    """The driver's decisions, which the workers follow. It is sent as a plain dictionary and validated again."""

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
    base_revision: str | None = None
    """Commit of a base model on the Hub, so that every node loads the one that was checked."""
    adapter: str | None
    """Directory or s3:// prefix of the LoRA adapter to continue."""
    parent: str | None
    """URI of the weights that the run continues, recorded in manifests and the result; None for a plain model."""
    restore_from: str | None
    """URI of the checkpoint whose complete trainer state is restored."""
    tokenizer: str
    """Hub id, directory or URI whose tokenizer is used: that of `adapter` or of `base_model`."""
    new_tokens: NewTokens | None = None
    """Tokens that the run adds to the vocabulary."""
    chat_template: str | None
    """Jinja text that replaces the tokenizer's own template."""
    prepared: str
    """URI under which the prepared rows are stored by their keys."""
    train: str
    """Key of the training rows."""
    valid: str | None
    """Key of the validation rows whose loss decides which checkpoint is the best."""
    more_valid: dict[str, str] = {}
    """Name -> key of the other validation sets."""
    data: DataFingerprints
    max_steps: int
    steps_per_epoch: int
    flops: RowFlops | None
    """Model FLOPs per row; None for unsupported architectures and tasks."""
    scratch: str
    """The driver's absolute directory for the cache and temporary files; see `on_this_node`."""

    @property
    def cache(self) -> Path:
        """The node cache: downloaded models and prepared rows."""
        return Path(self.scratch) / "cache"

    def order(self, lengths: np.ndarray, longest: int, devices: int) -> BatchPlan:
        """Return the rows of each step; see `order_of`."""
        return order_of(self.config, lengths, longest, devices)

    def on_this_node(self) -> Self:
        """Return the plan with this node's scratch directory, unless the YAML names one: it may differ from the driver's."""
        if self.config.output_dir:
            return self
        return self.model_copy(update={"scratch": str(scratch_directory(self.config))})


def order_of(config: FinetuneConfig, lengths: np.ndarray, longest: int, devices: int) -> BatchPlan:
    """Return the rows of each step of a run. The result is the same on every worker, for any number of workers.

    Args:
        config: The YAML.
        lengths: Tokens of each training row.
        longest: Tokens of the longest training row.
        devices: Number of devices, one of the configuration's device_counts.
    """
    packs = pack(lengths, config.context_length or longest) if config.packing else None
    shape = BatchShape(
        len(lengths) if packs is None else len(packs),
        config.batch_size,
        config.replicas_on(devices),
        config.accumulation_on(devices),
    )
    is_padded_to_longest = config.padding == "longest" and packs is None
    return BatchPlan(shape, config.seed, lengths=lengths if is_padded_to_longest else None, packs=packs)

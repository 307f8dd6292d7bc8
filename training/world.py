"""A worker's ranks in the run, and its communication with the other workers."""

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import ray.train

# Other ranks may wait for hours while a node transfers a large checkpoint; a lost node is noticed at once.
_LONGEST_TRANSFER = timedelta(hours=12)


@dataclass(frozen=True)
class World:
    """One worker's view of all workers: its ranks and their process group."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node_rank: int
    group: Any = None
    """The torch process group for its collectives; None is the default group, which training uses."""

    @classmethod
    def from_ray(cls) -> "World":
        """Read the ranks from Ray Train's context."""
        context = ray.train.get_context()
        return cls(
            context.get_world_rank(),
            context.get_local_rank(),
            context.get_world_size(),
            context.get_local_world_size(),
            context.get_node_rank(),
        )

    def with_patient_group(self) -> "World":
        """Return a copy with its own gloo group, which waits for hours and runs beside training. Every rank must call it."""
        if self.world_size == 1:
            return self
        import torch

        return replace(self, group=torch.distributed.new_group(backend="gloo", timeout=_LONGEST_TRANSFER))

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank; it is also a barrier."""
        if self.world_size == 1:
            return [value]
        import torch

        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, flag: bool) -> bool:
        """Return rank 0's flag on every rank."""
        if self.world_size == 1:
            return flag
        import torch

        # NCCL takes CUDA tensors only. A CPU run must not use its node's GPUs, which other jobs may fill.
        device = "cuda" if torch.distributed.get_backend(self.group) == "nccl" else "cpu"
        shared = torch.tensor([flag], dtype=torch.uint8, device=device)
        torch.distributed.broadcast(shared, src=0, group=self.group)
        return bool(shared.item())

"""Where a worker stands in the run, and how it talks with the others."""

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import ray.train

# A node may move a large checkpoint for hours while the others wait to hear of it; a lost one is noticed at once.
_LONGEST_TRANSFER = timedelta(hours=12)


@dataclass(frozen=True)
class Place:
    """One worker among all."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node_rank: int
    group: Any = None
    """The torch process group that it talks in; None is the one that training uses."""

    @classmethod
    def of_ray(cls) -> "Place":
        """As Ray Train placed it."""
        context = ray.train.get_context()
        return cls(
            context.get_world_rank(),
            context.get_local_rank(),
            context.get_world_size(),
            context.get_local_world_size(),
            context.get_node_rank(),
        )

    def patient(self) -> "Place":
        """The same place with a group of its own, which waits for hours and may be used beside training. Every rank calls it."""
        if self.world_size == 1:
            return self
        import torch

        return replace(self, group=torch.distributed.new_group(backend="gloo", timeout=_LONGEST_TRANSFER))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank; a barrier as well."""
        if self.world_size == 1:
            return [value]
        import torch

        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def of_rank_0(self, flag: bool) -> bool:
        """Rank 0's flag, on every rank."""
        if self.world_size == 1:
            return flag
        import torch

        # NCCL takes nothing else; and a run on CPU sees its node's GPUs, which others may fill.
        device = "cuda" if torch.distributed.get_backend(self.group) == "nccl" else "cpu"
        shared = torch.tensor([flag], dtype=torch.uint8, device=device)
        torch.distributed.broadcast(shared, src=0, group=self.group)
        return bool(shared.item())

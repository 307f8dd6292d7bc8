"""The ranks of a worker, and its collectives with the other workers."""

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import ray.train

if TYPE_CHECKING:
    import torch

# Other ranks may wait for hours while a node transfers a large checkpoint; a lost node is still detected at once.
_LONGEST_TRANSFER = timedelta(hours=12)


@dataclass(frozen=True)
class World:
    """One worker's ranks, world size and process group."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node_rank: int
    group: Any = None
    """The torch process group of the collectives; None is the default group, which training uses."""

    @classmethod
    def from_ray(cls) -> "World":
        """Return the ranks and world size from Ray Train's context."""
        context = ray.train.get_context()
        return cls(
            context.get_world_rank(),
            context.get_local_rank(),
            context.get_world_size(),
            context.get_local_world_size(),
            context.get_node_rank(),
        )

    def with_long_timeout(self) -> "World":
        """Return a copy with its own gloo group, which has a timeout of hours. Every rank must call this."""
        if self.world_size == 1:
            return self
        import torch

        return replace(self, group=torch.distributed.new_group(backend="gloo", timeout=_LONGEST_TRANSFER))

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks in rank order; this is also a barrier."""
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

        # NCCL accepts only CUDA tensors. A CPU run must not use its node's GPUs, which other jobs may be using.
        device = "cuda" if torch.distributed.get_backend(self.group) == "nccl" else "cpu"
        shared = torch.tensor([flag], dtype=torch.uint8, device=device)
        torch.distributed.broadcast(shared, src=0, group=self.group)
        return bool(shared.item())


def exclude_frozen_weights_from_sync(model: "torch.nn.Module") -> None:
    """Exclude frozen weights from the broadcast with which DDP starts.

    Each node has verified the files that its ranks read them from. The broadcast would send the base model over the network, and
    copy the pages that the workers of a node share into the memory of each.
    """
    from torch.nn.parallel import DistributedDataParallel

    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    # The only interface for it: torch 2.13 marks it as a workaround, and DDP(init_sync=False) would exclude the adapter, too.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)

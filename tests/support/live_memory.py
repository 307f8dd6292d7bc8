"""Peak memory of live tensors, counted on any device as torch allocates and frees them."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """A counter of live tensor bytes inside its block; `peak` is in bytes."""

    def __init__(self, existing: Iterable[torch.Tensor]):
        """Start with the bytes of existing tensors.

        Args:
            existing: Tensors that are alive before the block.
        """
        super().__init__()
        self.peak = 0
        self._live_bytes = 0
        self._live_storages: set[int] = set()
        for tensor in existing:
            self._add(tensor)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._live_storages:
            return
        self._live_storages.add(address)
        self._live_bytes += size
        self.peak = max(self.peak, self._live_bytes)
        weakref.finalize(storage, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self._live_storages.discard(address)
        self._live_bytes -= size

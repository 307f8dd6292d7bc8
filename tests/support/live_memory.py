"""How many bytes of tensors are alive at most, counted on any device as torch makes and drops them."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts inside its block; `peak` is in bytes."""

    def __init__(self, known: Iterable[torch.Tensor]):
        """Counting begins with what is there.

        Args:
            known: Tensors that live already.
        """
        super().__init__()
        self.peak = 0
        self._now = 0
        self._alive: set[int] = set()
        for tensor in known:
            self._add(tensor)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        return made

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        name, size = storage._cdata, storage.nbytes()
        if name in self._alive:
            return
        self._alive.add(name)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._drop, name, size)

    def _drop(self, name: int, size: int) -> None:
        self._alive.discard(name)
        self._now -= size

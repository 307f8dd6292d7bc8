"""What compiled Triton kernels have and Triton's interpreter lacks: imported before whatever defines kernels, with TRITON_INTERPRET=1."""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter

_argument = interpreter._implicit_cvt
_launch = interpreter.GridExecutor.__call__


def _number(argument: Any) -> Any:
    """Plain numbers have 32 bits, and can be cast."""
    if not isinstance(argument, float):
        return _argument(argument)
    value = interpreter.TensorHandle(
        interpreter.np.array([argument], dtype=interpreter.np.float32), tl.float32
    )
    return tl.tensor(value, tl.float32)


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _rsqrt(x):
    return tl.math.rsqrt(x)


@triton.jit
def cast(x, dtype):
    """Unsloth's, of a plain number."""
    return tl.full((), x, dtype)


def _launch_in_fp32(executor: Any, *arguments: Any, **keywords: Any) -> None:
    """NumPy has no bf16 and would add up its bits: a kernel gets fp32 copies of what lies in it, and its results are rounded."""
    copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def widened(argument: Any) -> Any:
        if not isinstance(argument, torch.Tensor) or argument.dtype != torch.bfloat16:
            return argument
        storage = argument.untyped_storage()
        if storage.data_ptr() not in copies:
            whole = torch.empty(0, dtype=torch.bfloat16).set_(storage)
            copies[storage.data_ptr()] = whole, whole.float()
        _, copy = copies[storage.data_ptr()]
        return copy.as_strided(argument.size(), argument.stride(), argument.storage_offset())

    with torch.no_grad(), torch._C.DisableTorchFunction():
        named = {name: widened(value) for name, value in keywords.items()}
        _launch(executor, *map(widened, arguments), **named)
        for whole, copy in copies.values():
            whole.copy_(copy)


interpreter._implicit_cvt = _number
interpreter.GridExecutor.__call__ = _launch_in_fp32
libdevice.tanh, libdevice.rsqrt = _tanh, _rsqrt

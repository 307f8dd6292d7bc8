"""Patches for Triton's interpreter, which lacks features of compiled kernels.

Import this module before modules that define kernels, with TRITON_INTERPRET=1.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter

_original_convert_argument = interpreter._implicit_cvt
_original_launch = interpreter.GridExecutor.__call__
_original_patch_tensor = interpreter._patch_lang_tensor
_original_convert_float = interpreter._convert_float


def _convert_argument(argument: Any) -> Any:
    """Convert a plain float to a 32-bit tensor, which can be cast; convert other arguments as the interpreter does."""
    if not isinstance(argument, float):
        return _original_convert_argument(argument)
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
def triton_cast(x, dtype):
    """Replace Unsloth's function of this name for plain numbers."""
    return tl.full((), x, dtype)


def _launch_in_fp32(executor: Any, *arguments: Any, **keywords: Any) -> None:
    """Launch a kernel on fp32 copies of its bf16 tensors and round the results, since NumPy would add bf16 bits as integers."""
    copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def to_fp32(argument: Any) -> Any:
        if not isinstance(argument, torch.Tensor) or argument.dtype != torch.bfloat16:
            return argument
        storage = argument.untyped_storage()
        if storage.data_ptr() not in copies:
            original = torch.empty(0, dtype=torch.bfloat16).set_(storage)
            copies[storage.data_ptr()] = original, original.float()
        _, copy = copies[storage.data_ptr()]
        return copy.as_strided(argument.size(), argument.stride(), argument.storage_offset())

    with torch.no_grad(), torch._C.DisableTorchFunction():
        named = {name: to_fp32(value) for name, value in keywords.items()}
        _original_launch(executor, *map(to_fp32, arguments), **named)
        for original, copy in copies.values():
            original.copy_(copy)


def _convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    """Round to bf16 as GPUs do; the interpreter truncates, which made gradients 0.3% smaller after every norm."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return _original_convert_float(data, source, target, rounding)
    return torch.from_numpy(data.copy()).bfloat16().view(torch.uint16).numpy()


def _patch_tensor(tensor: Any, scope: Any) -> None:
    """Make tensors of one element usable as an index, which Triton 3.6 (torch 2.11) does not do with NumPy 2.5."""
    _original_patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


interpreter._patch_lang_tensor = _patch_tensor
interpreter._implicit_cvt = _convert_argument
interpreter._convert_float = _convert_float
interpreter.GridExecutor.__call__ = _launch_in_fp32
libdevice.tanh, libdevice.rsqrt = _tanh, _rsqrt

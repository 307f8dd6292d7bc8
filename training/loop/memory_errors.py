"""Recognition of out-of-memory errors, without importing torch."""

import re

from utils.errors import first_line

# torch 2.x raises OutOfMemoryError only from its CUDA allocator. Its CPU allocator, the CUDA driver and NCCL raise RuntimeErrors.
_TORCH_OUT_OF_MEMORY = re.compile(
    r"^.*(?:DefaultCPUAllocator: can't allocate memory|CUDA.*out of memory|Cuda failure.*out of memory).*$",
    re.MULTILINE,
)


def out_of_memory_line(error: BaseException) -> str | None:
    """Return the line of an out-of-memory error's message that states the cause; None for any other error.

    An error counts if its type is MemoryError, an OutOfMemoryError of Ray or torch, or torch's RuntimeError with such a message.
    """
    text = str(error).strip()
    if isinstance(error, MemoryError) or any(
        kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__
    ):
        # Ray's message has forty lines with its largest processes; the first line that mentions memory states the cause.
        memory = re.search(r"^.*memory.*$", text, re.MULTILINE | re.IGNORECASE)
        return memory[0].strip() if memory else first_line(error)
    if isinstance(error, RuntimeError) and (failed := _TORCH_OUT_OF_MEMORY.search(text)):
        return failed[0].strip()
    return None

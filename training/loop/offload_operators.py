"""The operators with which DeepSpeed offloads: they are compiled on their first use on a machine."""

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.planning.deepspeed import offloads


def load_offload_operators(deepspeed: Mapping[str, Any], optim: str) -> None:
    """Load the operators of what a DeepSpeed configuration offloads, before DeepSpeed loads them without our lock.

    Args:
        deepspeed: The configuration.
        optim: The YAML's key, which accelerate maps to an optimizer of DeepSpeed.
    """
    states = offloads(deepspeed)
    if any(state.startswith("optimizer") for state in states):
        load_operator("CPULionBuilder" if optim == "lion_32bit" else "CPUAdamBuilder")
    if any(state.endswith("nvme") for state in states):
        load_operator("AsyncIOBuilder")


def load_operator(name: str) -> None:
    """Load the operator of a builder in deepspeed.ops.op_builder, compiled if need be."""
    import deepspeed.ops.op_builder

    builder = getattr(deepspeed.ops.op_builder, name)()
    with only_one_compiles(builder.name):
        builder.load(verbose=False)


@contextmanager
def only_one_compiles(extension: str) -> Iterator[None]:
    """Let one process of the machine compile an extension of torch while the others wait.

    torch waits for its own lock file without a limit, and a killed process leaves it behind. A lock of the system ends with its
    process, so whoever has it knows that no process of a run compiles.
    """
    from torch.utils.cpp_extension import _get_build_directory  # pyright: ignore[reportPrivateUsage]  # no public name

    directory = Path(_get_build_directory(extension, verbose=False))
    with (directory / "anneal.lock").open("w") as system_lock:
        fcntl.flock(system_lock, fcntl.LOCK_EX)
        (directory / "lock").unlink(missing_ok=True)
        yield

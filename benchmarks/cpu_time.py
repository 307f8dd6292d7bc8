"""CPU seconds of a command and of all processes that it starts, also those that no process waits for."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_V1, _V2 = Path("/sys/fs/cgroup/cpuacct"), Path("/sys/fs/cgroup")


class CpuTime:
    """A control group that counts the CPU time of the processes in it."""

    def __init__(self, directory: Path):
        self._directory = directory
        self.seconds_at_end = 0.0
        """The seconds of all processes, once the last has exited."""

    @property
    def join(self) -> Callable[[], None]:
        """Return a `preexec_fn` that moves a child process into the group."""
        processes = str(self._directory / "cgroup.procs")

        def move() -> None:
            with open(processes, "w") as file:  # noqa: PTH123  # between fork and exec
                file.write(str(os.getpid()))

        return move

    @property
    def seconds(self) -> float:
        """Return the seconds so far, in user and kernel mode."""
        if (usage := self._directory / "cpuacct.usage").exists():
            return int(usage.read_text()) / 1e9
        statistics = dict(line.split() for line in (self._directory / "cpu.stat").read_text().splitlines())
        return int(statistics["usage_usec"]) / 1e6


@contextmanager
def cpu_time() -> Iterator[CpuTime]:
    """Yield a new control group, which needs root and cgroups (version 1 or 2); wait until it is empty and remove it."""
    directory = (_V1 if _V1.exists() else _V2) / f"benchmark-{os.getpid()}-{time.time_ns()}"
    directory.mkdir()
    group = CpuTime(directory)
    try:
        yield group
    finally:
        while (directory / "cgroup.procs").read_text():
            time.sleep(0.1)
        group.seconds_at_end = group.seconds
        directory.rmdir()

"""The head start of a run on this machine: its cluster and its workers' imports begin while the run is planned.

An existing cluster is asked for nothing before the plan is made.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from configs.schema import FinetuneConfig
from training.launch.cluster import disconnect, start_local_cluster, workers_on
from training.loop.libraries import import_libraries
from training.loop.ray_internals import LocalWorkers
from training.models.libraries import unused_packages
from training.planning.devices import choose_device
from training.planning.endpoints import ClusterTarget
from training.planning.paths import storage_path
from utils.errors import AnnealError


class HeadStart:
    """What has been started for a run before its plan is made."""

    def __init__(self, started: "Future[LocalWorkers | None] | None"):
        self._started = started

    def wait(self) -> LocalWorkers | None:
        """Wait until the local cluster has started; return its first workers, if they were started."""
        return self._started.result() if self._started else None


@contextmanager
def head_start(config: FinetuneConfig, target: ClusterTarget) -> Iterator[HeadStart]:
    """Start the local cluster of a run in a thread, and end it when the block exits.

    Args:
        config: The run.
        target: Where the run trains; an existing cluster is asked for nothing.
    """
    if not target.is_local:
        yield HeadStart(None)
        return
    with ThreadPoolExecutor(1, "head-start") as thread:
        started = thread.submit(_start, config, target)
        try:
            yield HeadStart(started)
        finally:
            started.exception()  # Ray cannot be shut down while it starts
            disconnect()


def _start(config: FinetuneConfig, target: ClusterTarget) -> LocalWorkers | None:
    """Start the cluster, and the workers of a run with a fixed number of them; return these workers."""
    try:
        device = choose_device(config, target)
    except AnnealError:
        return None  # the planner reports it
    workers = workers_on(device, config, storage_path(config))
    start_local_cluster(workers)
    if workers.least < workers.count:
        return None
    started = LocalWorkers(workers.count, workers.each)
    # On GPUs, Ray sets the visible devices after a worker has started, and Unsloth must be imported first of all.
    if device == "cpu" and config.kernels in ("auto", "torch"):
        started.execute(import_libraries, unused_packages(config), config.deterministic)
    return started

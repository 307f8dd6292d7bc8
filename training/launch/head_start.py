"""The head start of a run on this machine: its cluster starts first, and its workers import libraries while the run is planned.

An existing cluster is asked for nothing here.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from configs.schema import FinetuneConfig
from training.launch.cluster import disconnecting, start_local_cluster, workers_on
from training.loop.libraries import import_libraries
from training.loop.ray_internals import LocalWorkers
from training.models.libraries import unused_packages
from training.planning.devices import choose_device, runs_here
from training.planning.endpoints import ClusterTarget
from training.planning.paths import storage_path
from utils.errors import AnnealError
from utils.processes import record_signals


@contextmanager
def head_start(config: FinetuneConfig, target: ClusterTarget) -> Iterator[LocalWorkers | None]:
    """Start the local cluster of a run, and end it when the block exits. Yield its first workers, if they were started.

    Args:
        config: The run.
        target: Where the run trains; an existing cluster is asked for nothing.
    """
    if not target.is_local:
        yield None
        return
    with disconnecting():
        try:
            yield _start(config, target)
        finally:
            record_signals()  # another signal must not leave processes of Ray behind


def _start(config: FinetuneConfig, target: ClusterTarget) -> LocalWorkers | None:
    """Start the cluster, and the workers of a run with a fixed number of them; return these workers."""
    try:
        device = choose_device(config, target)
    except AnnealError:
        return None  # the planner reports it
    if not runs_here(config, device, target):
        return None  # the plan is shown before that is an error
    workers = workers_on(device, config, storage_path(config))
    start_local_cluster(workers)
    if workers.least < workers.count:
        return None
    started = LocalWorkers(workers.count, workers.each)
    # On GPUs, Ray sets the visible devices after a worker has started, and Unsloth must be imported first of all.
    if device == "cpu" and config.kernels in ("auto", "torch"):
        started.execute(import_libraries, unused_packages(config), config.deterministic)
    return started

"""Work on many rows on a cluster: one Ray task per shard, on the CPUs of all nodes, and one task for their indexes."""

import functools
import gc
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
import ray.exceptions

from configs.schema import FinetuneConfig
from training.data.shards import ShardMap, ShardRun
from training.launch.cluster import disconnect, disconnecting, join_cluster, vitals
from training.planning.devices import choose_device
from training.planning.endpoints import ClusterError, ClusterTarget
from training.planning.paths import make_scratch_directory
from utils.errors import first_line
from utils.processes import record_signals

_COLLECTED = 50_000  # objects between garbage collections, as in training.data.chunk_processes


@contextmanager
def rows_on_cluster(config: FinetuneConfig, target: ClusterTarget) -> Iterator[ShardMap | None]:
    """Yield a context that connects to a cluster, whose nodes then work on rows, or None if the run has only this machine.

    The cluster is asked for nothing before. Each connection is one Ray job, whose processes load the code once.

    Args:
        config: The run.
        target: Where the run trains.
    """
    if target.is_local:
        yield None
        return

    @contextmanager
    def connect() -> Iterator[ShardRun]:
        join_cluster(choose_device(config, target), target)
        yield functools.partial(_run, config)
        disconnect()  # the plan needs no cluster

    with disconnecting():
        try:
            yield connect
        finally:
            if ray.is_initialized():
                record_signals()  # another signal must not leave tasks behind


def _run(config: FinetuneConfig, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Yield the results of tasks in their order. Ray runs a task up to three times again whose node or process was lost.

    Args:
        config: The run.
        work: Method of a dataclass whose field `scratch` becomes the scratch directory of the node.
        items: The argument of each task.
    """
    shared = ray.put((work, config))
    task: Any = ray.remote(_call)
    # Ray would otherwise fill one node first, and each node has its own network and disk.
    spread = task.options(num_cpus=1, scheduling_strategy="SPREAD")
    pending: deque[ray.ObjectRef[Any]] = deque(spread.remote([shared], item) for item in items)
    try:
        while pending:
            yield ray.get(pending[0])
            pending.popleft()
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        vitals().raise_if_lost()
        raise ClusterError(
            f"the rows cannot be prepared on the cluster: a task was lost four times ({first_line(error)}). If its nodes ran out of memory, "
            "use nodes with more memory per CPU."
        ) from error
    finally:
        for waiting in pending:
            ray.cancel(waiting)


def _call(shared: Sequence["ray.ObjectRef[Any]"], item: Any) -> Any:
    """Do one item's work in a process of the cluster."""
    return _work(shared[0])(item)


@functools.lru_cache(maxsize=1)
def _work(shared: "ray.ObjectRef[Any]") -> Callable[[Any], Any]:
    """Return the work of a process's tasks, so that only the first one loads the tokenizer."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have their own tasks
    gc.set_threshold(_COLLECTED)
    work, config = ray.get(shared)
    worker = replace(work.__self__, scratch=make_scratch_directory(config))
    return getattr(worker, work.__name__)

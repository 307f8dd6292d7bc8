"""Processes that tokenize the chunks of a large source, one per CPU core."""

import gc
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any, Generic, TypeVar

from training.data.errors import DataError
from utils.processes import die_with, ignore_signals

_ALONE = 3  # chunks that this process tokenizes sooner than others would start
_MOST = 16  # beyond, this process reads and writes more slowly than the others tokenize
_COLLECTED = 50_000  # objects between garbage collections, which would take 4% of the time with Python's 700
_AHEAD = 2  # chunks per process that are read before their turn

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")
_tokenize: Callable[[Any], Any]  # of a process that `_begin` has prepared


class ChunkProcesses(Generic[Chunk, Result]):
    """The processes of one preparation. They start with the first source of more than a few chunks.

    They are forked: a process that imports transformers first would take as long as 40 MB of rows. They inherit the tokenizer,
    touch nothing else of this process, and are killed by the kernel if this process ends.
    """

    def __init__(self, tokenize: Callable[[Chunk], Result]):
        self._tokenize = tokenize
        self._count = min(len(os.sched_getaffinity(0)), _MOST)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "ChunkProcesses[Chunk, Result]":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def tokenize(self, chunks: Iterator[Chunk], source: str) -> Iterator[Result]:
        """Yield the results of chunks in their order.

        Args:
            chunks: The chunks of a source.
            source: Path of the source in errors.

        Raises:
            DataError: A process was killed.
        """
        if self._pool is None:
            first = list(islice(chunks, _ALONE + 1))
            if len(first) <= _ALONE or self._count == 1:
                yield from map(self._tokenize, chain(first, chunks))
                return
            chunks = chain(first, chunks)
            self._pool = ProcessPoolExecutor(
                self._count, get_context("fork"), _begin, (self._tokenize, os.getpid())
            )
        pending: deque[Future[Result]] = deque()
        try:
            for chunk in chunks:
                pending.append(self._pool.submit(_run, chunk))
                if len(pending) > self._count * (1 + _AHEAD):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                f"{source}: a process that tokenizes the rows was killed. SIGKILL usually comes from the kernel when memory runs out: use a "
                "machine with more memory, or fewer CPU cores (taskset)."
            ) from error


def _begin(tokenize: Callable[[Any], Any], parent: int) -> None:
    """Prepare a new process."""
    global _tokenize
    die_with(parent)()
    ignore_signals()  # the parent ends it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's threads did not survive the fork
    gc.set_threshold(_COLLECTED)
    _tokenize = tokenize


def _run(chunk: Any) -> Any:
    return _tokenize(chunk)

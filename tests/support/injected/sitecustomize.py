"""Code that Python imports at the start of every process with this directory on PYTHONPATH, to observe, hold or change a run.

Environment variables select what it does:

- RESUME_LEDGER names a directory in which each worker writes the rows it trains, one "step rank row" per line. Workers then also
  record losses after each step instead of at intervals.
- RESUME_HOLD is `after_step:N`, `in_save:N` or `in_step_until_stop:N`. At the first two, every worker waits to be killed, or until
  the ledger's directory contains a file RELEASED. At the third, rank 0 waits until the driver has requested a stop.
- RESUME_SKIP_RESTORE names a part of a checkpoint that is not restored: `rng`, `position` or `optimizer`.
- GPU_KERNELS is `torch` or `liger`. CPU workers then compute the loss with TRL's fused head, as GPU workers do, in Triton's
  interpreter. With `liger` they use Liger's layers too.
- ROWS_SHARD_BYTES is the size of the shards in which rows are prepared, also of small sources. A task reads their indexes, too.
"""

import os
import sys
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, TextIO

_released = os.path.join(os.environ.get("RESUME_LEDGER", ""), "RELEASED")  # noqa: PTH118
_hold_point, _, _held_step = os.environ.get("RESUME_HOLD", "").partition(":")
_skipped_part = os.environ.get("RESUME_SKIP_RESTORE")


class _Ledger:
    """A record of the rows in each optimizer step; rows of evaluation belong to no step."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.rank = 0
        self._file: TextIO | None = None

    def record(self, row: int) -> None:
        """Write one line, which survives a kill because line buffering passes it to the kernel at once."""
        if self.step is None:
            return
        if self._file is None:
            path = os.path.join(os.environ["RESUME_LEDGER"], f"{os.getpid()}.txt")  # noqa: PTH118
            self._file = open(path, "a", buffering=1)  # noqa: PTH123, SIM115
        self._file.write(f"{self.step} {self.rank} {row}\n")


_ledger = _Ledger()


def _is_held(point: str, step: int) -> bool:
    return (_hold_point, _held_step) == (point, str(step))


def _hold(point: str, step: int) -> None:
    while _is_held(point, step) and not os.path.exists(_released):  # noqa: PTH110
        time.sleep(0.01)


def _record_rows(module: Any) -> None:
    for rows in (module.TokenSequences, module.PairSequences):
        rows.__getitem__ = _recording(rows.__getitem__)


def _recording(get_row: Callable[..., Any]) -> Callable[..., Any]:
    def recorded(self: Any, index: int) -> Any:
        _ledger.record(index)
        return get_row(self, index)

    return recorded


def _patch_callbacks(module: Any) -> None:
    module._RECORD_EVERY_SECONDS, module._RECORDED_LINES_A_SECOND = 0, float("inf")
    stopping = module.Stopping
    on_step_end = stopping.on_step_end

    def held(self: Any, args: Any, state: Any, *more: Any, **named: Any) -> None:
        while (
            _is_held("in_step_until_stop", state.global_step)
            and args.process_index == 0
            and not self.is_requested()
        ):
            time.sleep(0.01)
        on_step_end(self, args, state, *more, **named)

    stopping.on_step_end = held


def _patch_trainer(module: Any) -> None:
    trainer = module.FineTuningTrainer
    get_batch_samples, save_rng_state = trainer.get_batch_samples, trainer._save_rng_state

    def recorded(self: Any, *arguments: Any) -> Any:
        _hold("after_step", self.state.global_step)
        _ledger.step, _ledger.rank = self.state.global_step + 1, self.args.process_index
        try:
            return get_batch_samples(self, *arguments)
        finally:
            _ledger.step = None

    def held(self: Any, directory: str) -> None:
        # The weights and the optimizer are saved before this point, the random states and the trainer state after it.
        _hold("in_save", self.state.global_step)
        save_rng_state(self, directory)

    trainer.get_batch_samples, trainer._save_rng_state = recorded, held
    if _skipped_part:
        _SKIP_RESTORE[_skipped_part](trainer)


def _use_liger(module: Any) -> None:
    from tests.support import triton_interpreter  # noqa: F401

    build_model = module.build_model
    module.build_model = lambda provider, request: build_model("liger", request)


def _use_fused_head(module: Any) -> None:
    from tests.support import triton_interpreter  # noqa: F401

    trainer = module.FineTuningTrainer
    original_init = trainer.__init__
    trainer.__init__ = lambda self, **arguments: original_init(
        self, **arguments | {"loss_of_transformers": False}
    )


def _prepare_small_shards(module: Any) -> None:
    module.MIN_BYTES = module.SHARD_BYTES = int(os.environ["ROWS_SHARD_BYTES"])


def _read_small_indexes_in_a_task(module: Any) -> None:
    module.MOST_ROWS_HERE = 0


def _skip_rng(trainer: Any) -> None:
    trainer._load_rng_state = lambda self, checkpoint: None


def _skip_optimizer(trainer: Any) -> None:
    trainer._load_optimizer_and_scheduler = lambda self, checkpoint: None


def _skip_position(trainer: Any) -> None:
    init_training_state = trainer._init_training_state

    def from_the_first_batch(self: Any, *arguments: Any) -> Any:
        self.args.ignore_data_skip = True
        return init_training_state(self, *arguments)

    trainer._init_training_state = from_the_first_batch


_SKIP_RESTORE: dict[str, Callable[[Any], None]] = {
    "rng": _skip_rng,
    "optimizer": _skip_optimizer,
    "position": _skip_position,
}
_PATCHES: dict[str, Callable[[Any], None]] = {}
if "RESUME_LEDGER" in os.environ:
    _PATCHES |= {
        "training.data.batches": _record_rows,
        "training.loop.callbacks": _patch_callbacks,
        "training.loop.trainers": _patch_trainer,
    }
if "GPU_KERNELS" in os.environ:
    _PATCHES |= {"training.loop.trainers": _use_fused_head}
if os.environ.get("GPU_KERNELS") == "liger":
    _PATCHES |= {"training.models": _use_liger}
if "ROWS_SHARD_BYTES" in os.environ:
    _PATCHES |= {
        "training.data.shards": _prepare_small_shards,
        "training.planning.index_figures": _read_small_indexes_in_a_task,
    }


class _PatchingFinder:
    """A finder that applies the patch of a module after loading it."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        patch = _PATCHES.get(name)
        spec = PathFinder.find_spec(name, path, target) if patch else None
        if patch is None or spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        load = loader.exec_module

        def load_and_patch(module: ModuleType) -> None:
            load(module)
            patch(module)

        loader.exec_module = load_and_patch
        return spec


if _PATCHES:
    sys.meta_path.insert(0, _PatchingFinder())  # type: ignore[arg-type]

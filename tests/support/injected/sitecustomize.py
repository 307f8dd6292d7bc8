"""Python runs this first in every process that has this directory on PYTHONPATH: a run's own code, watched, held or sabotaged.

RESUME_LEDGER names a directory: each worker notes the rows it trains, one "step rank row" a line. Losses are then recorded after
each step, not only now and then.
RESUME_HOLD is `after_step:N` or `in_save:N`: there every worker waits to be killed; or `in_step_until_stop:N`: there the
first worker waits until the driver has asked it to stop.
RESUME_SABOTAGE names a part of a checkpoint that is not restored: `rng`, `position` or `optimizer`.
KERNELS_OF_GPUS is `torch` or `liger`: workers on CPU compute the loss by TRL's fused head, as those on a GPU do, in Triton's
interpreter; with `liger` its layers, too.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, TextIO

_holds, _, _held_step = os.environ.get("RESUME_HOLD", "").partition(":")
_sabotaged = os.environ.get("RESUME_SABOTAGE")


class _Ledger:
    """Knows which optimizer step takes its rows now, and notes them; evaluation's rows belong to no step."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.rank = 0
        self._file: TextIO | None = None

    def note(self, row: int) -> None:
        """One line, which outlives a kill: it is the kernel's as soon as it is written."""
        if self.step is None:
            return
        if self._file is None:
            path = os.path.join(os.environ["RESUME_LEDGER"], f"{os.getpid()}.txt")  # noqa: PTH118
            self._file = open(path, "a", buffering=1)  # noqa: PTH123, SIM115
        self._file.write(f"{self.step} {self.rank} {row}\n")


_ledger = _Ledger()


def _is_held(place: str, step: int) -> bool:
    return (_holds, _held_step) == (place, str(step))


def _hold(place: str, step: int) -> None:
    if _is_held(place, step):
        threading.Event().wait()


def _watch_rows(module: Any) -> None:
    for rows in (module.TokenSequences, module.PairSequences):
        rows.__getitem__ = _noting(rows.__getitem__)


def _noting(get: Callable[..., Any]) -> Callable[..., Any]:
    def noted(self: Any, index: int) -> Any:
        _ledger.note(index)
        return get(self, index)

    return noted


def _watch_callbacks(module: Any) -> None:
    module._RECORD_EVERY_SECONDS, module._RECORDED_LINES_A_SECOND = 0, float("inf")
    stopping = module.Stopping
    end_step = stopping.on_step_end

    def held(self: Any, args: Any, state: Any, *others: Any, **named: Any) -> None:
        while (
            _is_held("in_step_until_stop", state.global_step)
            and args.process_index == 0
            and not self.is_requested()
        ):
            time.sleep(0.01)
        end_step(self, args, state, *others, **named)

    stopping.on_step_end = held


def _watch_trainer(module: Any) -> None:
    trainer = module.FineTuningTrainer
    take, save_rng_state = trainer.get_batch_samples, trainer._save_rng_state

    def noted(self: Any, *arguments: Any) -> Any:
        _hold("after_step", self.state.global_step)
        _ledger.step, _ledger.rank = self.state.global_step + 1, self.args.process_index
        try:
            return take(self, *arguments)
        finally:
            _ledger.step = None

    def held(self: Any, directory: str) -> None:
        # The weights and the optimizer are written by now, the random states and the trainer's own are not.
        _hold("in_save", self.state.global_step)
        save_rng_state(self, directory)

    trainer.get_batch_samples, trainer._save_rng_state = noted, held
    if _sabotaged:
        _SABOTAGES[_sabotaged](trainer)


def _take_liger(module: Any) -> None:
    from tests.support import triton_interpreter  # noqa: F401

    build = module.build_model
    module.build_model = lambda provider, request: build("liger", request)


def _take_fused_head(module: Any) -> None:
    from tests.support import triton_interpreter  # noqa: F401

    trainer = module.FineTuningTrainer
    make = trainer.__init__
    trainer.__init__ = lambda self, **arguments: make(self, **arguments | {"loss_of_transformers": False})


def _forget_rng(trainer: Any) -> None:
    trainer._load_rng_state = lambda self, checkpoint: None


def _forget_optimizer(trainer: Any) -> None:
    trainer._load_optimizer_and_scheduler = lambda self, checkpoint: None


def _forget_position(trainer: Any) -> None:
    begin = trainer._init_training_state

    def from_the_first_batch(self: Any, *arguments: Any) -> Any:
        self.args.ignore_data_skip = True
        return begin(self, *arguments)

    trainer._init_training_state = from_the_first_batch


_SABOTAGES: dict[str, Callable[[Any], None]] = {
    "rng": _forget_rng,
    "optimizer": _forget_optimizer,
    "position": _forget_position,
}
_CHANGES: dict[str, Callable[[Any], None]] = {}
if "RESUME_LEDGER" in os.environ:
    _CHANGES |= {
        "training.data.batches": _watch_rows,
        "training.loop.callbacks": _watch_callbacks,
        "training.loop.trainers": _watch_trainer,
    }
if "KERNELS_OF_GPUS" in os.environ:
    _CHANGES |= {"training.loop.trainers": _take_fused_head}
if os.environ.get("KERNELS_OF_GPUS") == "liger":
    _CHANGES |= {"training.models": _take_liger}


class _Changing:
    """Finds modules as Python does, and changes those named once they are loaded."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        change = _CHANGES.get(name)
        spec = PathFinder.find_spec(name, path, target) if change else None
        if change is None or spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        load = loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            change(module)

        loader.exec_module = load_and_change
        return spec


if _CHANGES:
    sys.meta_path.insert(0, _Changing())  # type: ignore[arg-type]

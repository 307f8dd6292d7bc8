"""Callbacks of the training loop, called without a loop."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from training.loop import callbacks
from training.loop.callbacks import Recording


def test_interval_between_recordings_grows_with_the_number_of_losses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    now = 0.0
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: now))
    recorded: list[tuple[float, int]] = []
    recording = Recording(lambda log: recorded.append((now, len(log))))
    arguments: Any = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    state = TrainerState()
    for second in range(1, 201):
        now = float(second)
        state.log_history += [{"loss": 1.0, "step": second}] * (1 if second <= 100 else 100)
        recording.on_log(arguments, state, TrainerControl())
    assert recorded == [(30, 30), (60, 60), (90, 90), (120, 2100), (150, 5100)], "not again before 201 s"

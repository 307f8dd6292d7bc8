"""Sampling of one row: no value of one request may stop the batch."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from service.batching import Batch, _sample
from service.engine import Failed, Sampling


def row(temperature: float, events: list[Any] | None = None) -> Any:
    answer = SimpleNamespace(push=lambda sampled: sampled)
    emit = (events if events is not None else []).append
    sampling = Sampling(temperature=temperature)
    return SimpleNamespace(
        answer=answer, emit=emit, sampling=sampling, generator=None, tokens=[], is_cancelled=False
    )


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 9e-6])
def test_tiny_temperature_chooses_the_most_likely_token(temperature: float):
    assert _sample(row(temperature), torch.tensor([1.0, 5.0, 4.9999]), 1).token == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_row_with_nonfinite_logits_fails_alone(bad: float):
    batch, failed, answered = Batch.__new__(Batch), [], []
    rows = [row(1.0, failed), row(0.0, answered)]
    batch._push(rows, torch.tensor([[bad, 0.0], [0.0, 1.0]]))
    assert isinstance(failed[0], Failed)
    assert rows[0].is_cancelled
    assert [sampled.token for sampled in answered] == [1]

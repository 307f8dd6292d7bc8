"""What the trainer does with what it restores."""

import copy
import random
from pathlib import Path
from typing import Any

import bitsandbytes.optim
import numpy as np
import pytest
import torch

from training.trainers import note_device, page_states, random_states, state_of_noted_device


@pytest.mark.parametrize("optimizer_class", [bitsandbytes.optim.PagedAdamW8bit, bitsandbytes.optim.PagedLion])
def test_restored_states_lie_where_those_of_a_new_optimizer_do(
    optimizer_class: Any, monkeypatch: pytest.MonkeyPatch
):
    """Pages are CUDA's; here they are memory with a mark."""

    def buffer(self: Any, parameter: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        pages = torch.zeros_like(parameter, dtype=dtype)
        pages.is_a_page = True  # pyright: ignore
        return pages

    monkeypatch.setattr(optimizer_class, "get_state_buffer", buffer)
    parameter = torch.nn.Parameter(torch.randn(64, 128))

    def stepped(optimizer: Any) -> torch.Tensor:
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return parameter.detach().clone()

    optimizer = optimizer_class([parameter], lr=1e-2)
    stepped(optimizer)
    saved, weights = copy.deepcopy(optimizer.state_dict()), parameter.detach().clone()
    expected = stepped(optimizer)

    parameter.data = weights
    restored = optimizer_class([parameter], lr=1e-2)
    restored.load_state_dict(saved)
    for states in restored.state.values():  # bitsandbytes has moved them to the device
        states |= {name: states[name].clone() for name in states.keys() & {"state1", "state2"}}
    page_states(restored)
    for states in restored.state.values():
        assert all(states[name].is_a_page for name in states.keys() & {"state1", "state2"})
    assert torch.equal(stepped(restored), expected)


def test_a_rank_finds_its_own_random_state_on_another_gpu(tmp_path: Path):
    """As transformers saves them, one for each GPU that the rank saw."""
    states = [torch.randint(0, 255, (16,), dtype=torch.uint8) for _ in range(3)]
    others = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    file = random_states(tmp_path, 5, 8)
    torch.save(others | {"cuda": states}, file)
    note_device(file, 1)
    assert torch.equal(state_of_noted_device(file), states[1])


def test_states_of_other_optimizers_are_left_alone():
    parameter = torch.nn.Parameter(torch.randn(8, 8))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = dict(optimizer.state[parameter])
    page_states(optimizer)
    assert all(optimizer.state[parameter][name] is state for name, state in before.items())

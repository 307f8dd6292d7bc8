"""Restoring of optimizer states and random states by the trainer."""

import copy
import random
from pathlib import Path
from typing import Any

import bitsandbytes.optim
import numpy as np
import pytest
import torch
from transformers import get_scheduler

from training.loop.trainers import (
    note_device,
    page_states,
    random_states,
    set_learning_rates,
    state_of_noted_device,
)

PAGED = [bitsandbytes.optim.PagedAdamW8bit, bitsandbytes.optim.PagedLion]


def restored_optimizer(optimizer_class: Any, parameter: torch.nn.Parameter) -> tuple[Any, torch.Tensor]:
    """Return an optimizer restored after one step, and the weights that the saved optimizer has after its second step."""

    def step(optimizer: Any) -> None:
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    optimizer = optimizer_class([parameter], lr=1e-2)
    step(optimizer)
    saved, weights = copy.deepcopy(optimizer.state_dict()), parameter.detach().clone()
    step(optimizer)
    expected = parameter.detach().clone()
    parameter.data = weights
    restored = optimizer_class([parameter], lr=1e-2)
    restored.load_state_dict(saved)
    parameter.grad = torch.ones_like(parameter)
    return restored, expected


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optimizer_class", PAGED)
def test_page_states_copies_restored_states_into_the_optimizers_own_buffers(
    optimizer_class: Any, monkeypatch: pytest.MonkeyPatch
):
    """On CPU, bitsandbytes' buffers are ordinary memory, so the test checks their addresses and contents."""
    buffers: list[torch.Tensor] = []
    allocate = optimizer_class.get_state_buffer

    def recording_allocate(*arguments: Any, **keywords: Any) -> torch.Tensor:
        buffers.append(allocate(*arguments, **keywords))
        return buffers[-1]

    parameter = torch.nn.Parameter(torch.randn(64, 128))
    restored, expected = restored_optimizer(optimizer_class, parameter)
    monkeypatch.setattr(optimizer_class, "get_state_buffer", recording_allocate)
    page_states(restored)
    buffer_addresses = {buffer.data_ptr() for buffer in buffers}
    for states in restored.state.values():
        state_addresses = {states[name].data_ptr() for name in ("state1", "state2") if name in states}
        assert state_addresses
        assert state_addresses <= buffer_addresses
    restored.step()
    assert torch.equal(parameter, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pages need CUDA's managed memory")
@pytest.mark.parametrize("optimizer_class", PAGED)
def test_page_states_puts_restored_states_into_pages(optimizer_class: Any):
    parameter = torch.nn.Parameter(torch.randn(512, 512, device="cuda"))  # smaller ones are not paged
    restored, expected = restored_optimizer(optimizer_class, parameter)
    page_states(restored)
    for states in restored.state.values():
        assert all(states[name].is_paged for name in states.keys() & {"state1", "state2"})
    restored.step()
    assert torch.equal(parameter, expected)


def optimizer_and_schedule(name: str, steps: int) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    return optimizer, get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=steps)


def rates_of_steps(optimizer: Any, schedule: Any, steps: int) -> list[float]:
    """Return the learning rate with which each of the next steps is taken."""
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        assert schedule.get_last_lr() == rates[-1:]
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt"])
@pytest.mark.parametrize("now", [8, 12])
def test_restored_run_takes_each_step_at_the_rate_of_its_own_schedule(name: str, now: int):
    """Also the first one after 8 steps of 8, where a cosine or linear schedule has ended at 0."""
    optimizer, schedule = optimizer_and_schedule(name, 8)
    rates_of_steps(optimizer, schedule, 8 if now > 8 else 5)
    states = optimizer.state_dict(), schedule.state_dict()
    done = schedule.last_epoch
    uninterrupted = rates_of_steps(*optimizer_and_schedule(name, now), now)
    optimizer, schedule = optimizer_and_schedule(name, now)
    optimizer.load_state_dict(states[0])
    schedule.load_state_dict(states[1])
    set_learning_rates(optimizer, schedule)
    assert rates_of_steps(optimizer, schedule, now - done) == uninterrupted[done:]
    assert min(uninterrupted[1:]) > 0


def test_rank_restores_the_random_state_of_the_gpu_that_it_had(tmp_path: Path):
    """transformers saves one state per visible GPU."""
    states = [torch.randint(0, 255, (16,), dtype=torch.uint8) for _ in range(3)]
    others = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    file = random_states(tmp_path, 5, 8)
    torch.save(others | {"cuda": states}, file)
    note_device(file, 1)
    assert torch.equal(state_of_noted_device(file), states[1])


def test_page_states_does_not_change_other_optimizers():
    parameter = torch.nn.Parameter(torch.randn(8, 8))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = dict(optimizer.state[parameter])
    page_states(optimizer)
    assert all(optimizer.state[parameter][name] is state for name, state in before.items())

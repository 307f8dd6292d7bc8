"""Workers that share sequences: processes joined by gloo, which compute loss, gradients and saved tensors of one batch."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM

from tests.support.front_door import fork_server
from training.data.batches import part_of_sequences, with_ends_of_rows
from training.data.row_index import IGNORED
from training.models import sequence_parallel


@dataclass(frozen=True)
class Outcome:
    """The results of a batch over all workers."""

    loss: float
    """Mean over the loss tokens of all workers."""
    gradients: dict[str, torch.Tensor]
    """Parameter -> gradient, summed over the workers' copies."""
    saved: int
    """Bytes that autograd retains after the forward pass, without parameters: the most of all workers."""


def run_workers(
    directory: Path,
    model: Path,
    lengths: list[list[int]],
    *,
    workers: int,
    size: int = 1,
    attention: str = "sdpa",
    backward: bool = True,
    change: Callable[[], None] | None = None,
) -> Outcome:
    """Compute a batch on some workers.

    Args:
        directory: Directory for temporary files.
        model: Directory of the model.
        lengths: Tokens of the rows of each sequence. Sequences with several rows are packed, and then form one line.
        workers: Number of processes.
        size: Workers that share a sequence. Other groups of workers get other sequences.
        attention: Attention that workers compute who share a sequence.
        backward: False to compute only the forward pass.
        change: Called in each worker first, to break the product on purpose.
    """
    name = secrets.token_hex(4)
    arguments = (directory / name, model, lengths, workers, size, attention, backward, change)
    processes = [fork_server.Process(target=_work, args=(rank, *arguments)) for rank in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * workers
    return Outcome(**torch.load(directory / f"{name}.pt"))


def _work(
    rank: int,
    path: Path,
    directory: Path,
    lengths: list[list[int]],
    workers: int,
    size: int,
    attention: str,
    backward: bool,
    change: Callable[[], None] | None,
) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=workers, timeout=timedelta(minutes=5)
    )
    if change is not None:
        change()
    if size > 1:
        import tests.support.varlen_on_cpu  # noqa: F401  # registers the flash kernels for CPU

        sequence_parallel.join_group(size, attention)
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation=sequence_parallel.NAME if size > 1 else "sdpa",
    )
    replicas = workers // size
    own = lengths[rank // size :: replicas]
    batch = (
        part_of_sequences(partial(_collate, size=size), size, rank % size)(own)
        if size > 1
        else _collate(own, 1)
    )
    count = sum(length - length // 3 for sequence in lengths for length in sequence)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    retained: dict[int, int] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            retained[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        loss = model(**batch, num_items_in_batch=torch.tensor(count), use_cache=False).loss
        saved = torch.tensor(sum(retained.values()))
    total = loss.detach().clone()
    gradients = {}
    if backward:
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for figure in (total, *gradients.values()):
        torch.distributed.all_reduce(figure)
    torch.distributed.all_reduce(saved, torch.distributed.ReduceOp.MAX)
    if rank == 0:
        outcome = {"loss": total.item(), "gradients": gradients, "saved": int(saved)}
        torch.save(outcome, path.with_suffix(".pt"))


def _collate(lengths: list[list[int]], size: int) -> dict[str, Any]:
    """Return sequences as the trainer's collators do: one per line, or all in one line if some are packed."""
    if any(len(sequence) > 1 for sequence in lengths):
        return with_ends_of_rows(lambda _: _line([length for rows in lengths for length in rows], size))([])
    lines = [_line(rows, max(map(sum, lengths)), size) for rows in lengths]
    batch = {name: torch.cat([line[name] for line in lines]) for name in ("input_ids", "labels")}
    return batch | {"position_ids": torch.arange(batch["input_ids"].shape[1])[None]}


def _line(lengths: list[int], *multiples: int) -> dict[str, torch.Tensor]:
    """Return rows in one line, padded to multiples. Two thirds of a row are loss tokens; padding tokens are rows of their own."""
    tokens = [torch.randint(3, 500, (length,), generator=_seeded(length)) for length in lengths]
    labels = [row.where(torch.arange(len(row)) >= len(row) // 3, IGNORED) for row in tokens]
    positions = [torch.arange(length) for length in lengths]
    batch = {}
    for name, rows, filling in (
        ("input_ids", tokens, 0),
        ("labels", labels, IGNORED),
        ("position_ids", positions, 0),
    ):
        line = torch.cat(rows)
        for multiple in multiples:
            line = pad(line, (0, -len(line) % multiple), value=filling)
        batch[name] = line[None]
    return batch


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

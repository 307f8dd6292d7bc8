"""DeepSpeed engines on 1, 2 or 4 processes that save a checkpoint, and load one of another number of processes.

A process of its own imports DeepSpeed once and forks the workers, so a job takes a second or two.
"""

import multiprocessing
import os
import pickle
import secrets
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from tests.support.jobs import PROJECT, environment
from training.checkpoints.resharding import Shards, reshard
from training.checkpoints.store import CheckpointError
from training.world import World

ROWS = 8
STEPS = 4
"""Steps before the checkpoint, and after it."""
STATES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Outcome:
    """The losses of the steps after the checkpoint, and the states at the checkpoint and at the end."""

    losses: list[float]
    restored: dict[str, torch.Tensor]
    """`parameter/state` or `group/state` -> complete tensor, in fp32."""
    final: dict[str, torch.Tensor]
    problem: str
    """The error of the conversion; the rest is empty then."""


@dataclass(frozen=True)
class Job:
    """Training on some workers from the start, or from a checkpoint of others."""

    stage: int
    workers: int
    saved_by: int | None = None
    fault: str = ""
    """What is wrong with the checkpoint: `missing`, `truncated` or `pickled` shard; or a state that the conversion skips."""
    bf16: bool = False
    """Whether the weights are bf16 and the optimizer holds fp32 copies."""

    @property
    def directory(self) -> str:
        return f"zero_{self.stage}-{self.saved_by or self.workers}-workers{'-bf16' * self.bf16}"

    @property
    def outcome_file(self) -> str:
        return f"zero_{self.stage}-{self.saved_by}-to-{self.workers}{self.fault}{'-bf16' * self.bf16}.pt"


def run_jobs(directory: Path, jobs: list[Job]) -> dict[Job, Outcome]:
    """Run jobs in one process tree; those that load a checkpoint must follow the job that saves it."""
    arguments = [
        f"{job.stage}:{job.workers}:{job.saved_by or ''}:{job.fault}:{'bf16' * job.bf16}" for job in jobs
    ]
    finished = subprocess.run(
        [sys.executable, "-m", "tests.support.zero_engines", str(directory), *arguments],
        cwd=PROJECT,
        env=environment() | {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    return {job: Outcome(**torch.load(directory / job.outcome_file, weights_only=True)) for job in jobs}


class _Layers(torch.nn.Module):
    """A model whose sizes no number of workers divides, with frozen weights as under an adapter and an idle parameter group."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(7, 13)
        self.frozen = torch.nn.Linear(13, 13)
        self.norm = torch.nn.LayerNorm(13)
        self.outer = torch.nn.Linear(13, 3)
        self.frozen.requires_grad_(requires_grad=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.outer(self.norm(torch.tanh(self.frozen(self.inner(rows)))))


def _settings(job: Job) -> dict[str, Any]:
    return {
        "bf16": {"enabled": job.bf16},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": job.stage,
            "stage3_param_persistence_threshold": 20,  # some parameters are partitioned, others are not
            "sub_group_size": 60,  # their number depends on the number of workers
        },
    }


def _engine(job: Job) -> Any:
    import deepspeed

    torch.manual_seed(0)
    model = _Layers()
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    groups = [
        {"params": [weight for weight in named.values() if weight.dim() > 1], "weight_decay": 0.3},
        {"params": [weight for weight in named.values() if weight.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=_settings(job))
    return engine


def _train(engine: Any, first: int, rank: int, workers: int) -> list[float]:
    losses = []
    for step in range(first, first + STEPS):
        rows = torch.randn(ROWS, 10, generator=torch.Generator().manual_seed(step))
        rows = rows.to(next(engine.module.parameters()).dtype)
        own = rows.chunk(workers)[rank]
        loss = (engine(own[:, :7]).float() - own[:, 7:].float()).square().mean()
        engine.backward(loss)
        engine.step()
        whole = loss.detach().float()
        if workers > 1:
            torch.distributed.all_reduce(whole)
        losses.append(whole.item() / workers)
    return losses


def _states(engine: Any, world: World) -> dict[str, torch.Tensor]:
    """Return the complete states: by parameter under ZeRO-3, else by group, whose flat tensors have the order of the weights."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    states = {}
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        for name, weight in engine.module.named_parameters():
            if weight.requires_grad:
                parts: dict[str, Any] = {"weights": safe_get_full_fp32_param(weight)}
                parts |= {state: safe_get_full_optimizer_state(weight, state) for state in STATES}
                states |= {f"{name}/{state}": part.clone() for state, part in parts.items()}
        return states
    for number, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        entries = sum(weight.numel() for weight in optimizer.bit16_groups[number])
        parts = {"weights": flat.detach()} | {state: optimizer.state[flat][state] for state in STATES}
        for state, part in parts.items():
            states[f"group {number}/{state}"] = torch.cat(world.gather(part))[:entries].clone()
    return states


def _work(rank: int, directory: Path, job: Job, store: Path) -> None:
    import deepspeed
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.workers)}
    torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=job.workers, timeout=timedelta(minutes=5)
    )
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    world = World(rank, rank, job.workers, job.workers, 0)
    engine = _engine(job)
    checkpoint, problem = directory / job.directory, ""
    outcome: dict[str, Any] = {"losses": [], "restored": {}, "final": {}}
    if job.saved_by is None:
        _train(engine, 0, rank, job.workers)
        outcome["restored"] = _states(engine, world)
        engine.save_checkpoint(str(checkpoint), exclude_frozen_parameters=True)
        engine = _engine(job)  # a ZeRO-3 engine cannot train on after a save
        engine.load_checkpoint(str(checkpoint), load_module_strict=False)
    else:
        copy = checkpoint.with_name(job.outcome_file.removesuffix(".pt"))
        if rank == 0:
            shutil.copytree(checkpoint, copy)
            _damage(copy / f"global_step{STEPS}", job.fault)
        if job.fault in STATES:
            _skip(job.fault)
        world.gather(None)
        manifest: Any = _Manifest(job.saved_by, job.stage)
        try:
            reshard(copy, "s3://bucket/run/checkpoints/step-000004", manifest, engine, world)
        except (CheckpointError, pickle.UnpicklingError) as error:
            problem = str(error)
        else:
            engine.load_checkpoint(str(copy), load_module_strict=False)
            outcome["restored"] = _states(engine, world)
    if not problem:
        outcome["losses"] = _train(engine, STEPS, rank, job.workers)
        outcome["final"] = _states(engine, world)
    if rank == 0:
        torch.save(outcome | {"problem": problem}, directory / job.outcome_file)


class Canary:
    """An object that creates a file when it is unpickled, as a stand-in for any code."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def _damage(directory: Path, fault: str) -> None:
    shard = directory / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    if fault == "missing":
        shard.unlink()
    elif fault == "truncated":
        os.truncate(shard, shard.stat().st_size // 2)
    elif fault == "pickled":
        torch.save({"optimizer_state_dict": Canary(directory / "canary")}, shard)


def _skip(state: str) -> None:
    """Let the conversion leave a state of the optimizer at zero."""
    copy = Shards._copy

    def copy_others(shards: Shards, slices: Any, into: Any, copied: str) -> None:
        if copied != state:
            copy(shards, slices, into, copied)

    Shards._copy = copy_others  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True)
class _Manifest:
    """The parts of a manifest that a conversion reads."""

    world_size: int
    zero_stage: int


def _run(directory: Path, job: Job) -> None:
    """Fork the workers of a job and wait for them."""
    fork = multiprocessing.get_context("fork")
    store = directory / f"store-{secrets.token_hex(4)}"
    workers = [fork.Process(target=_work, args=(rank, directory, job, store)) for rank in range(job.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(worker.exitcode == 0 for worker in workers), (job, [worker.exitcode for worker in workers])


def main() -> None:
    """Run the jobs of the command line."""
    import deepspeed
    import deepspeed.module_inject.auto_ep_layer
    import deepspeed.ops
    import deepspeed.runtime.superoffload.superoffload_stage3
    import functorch.compile  # noqa: F401  # like these of DeepSpeed, every worker would import it

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it with g++ takes two minutes
    directory = Path(sys.argv[1])
    for argument in sys.argv[2:]:
        stage, workers, saved_by, fault, bf16 = argument.split(":")
        begin = time.monotonic()
        _run(directory, Job(int(stage), int(workers), int(saved_by) if saved_by else None, fault, bool(bf16)))
        print(argument, f"{time.monotonic() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    main()

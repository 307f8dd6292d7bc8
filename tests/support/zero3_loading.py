"""Memory of processes that load a model under ZeRO-3; as a program, one of them (started by torchrun)."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.support.jobs import PROJECT, environment
from tests.support.process_memory import anonymous_memory, proportional_memory

_SECONDS_BETWEEN_SAMPLES = 0.005
_RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class LoadedRank:
    """A rank that has loaded its part of a model."""

    anonymous: int
    """Bytes that no file backs, which it held while loading beyond those afterwards."""
    proportional: int
    """The same for its PSS."""
    weights: float
    """Sum of the absolute weights of all ranks."""


def loading_memory(model: Path, directory: Path, *, workers: int, dtype: str) -> list[LoadedRank]:
    """Load a model for full-parameter training with ZeRO-3 on CPU, and return its ranks."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={workers}",
            "-m",
            "tests.support.zero3_loading",
            str(model),
            str(directory),
            dtype,
        ],
        cwd=PROJECT,
        env=environment() | _RETURN_FREED_MEMORY | {"DS_ACCELERATOR": "cpu"},
        check=True,
        timeout=300,
    )
    return [LoadedRank(**json.loads((directory / f"{rank}.json").read_text())) for rank in range(workers)]


def _load(model: Path, directory: Path, dtype: str) -> None:
    import deepspeed
    import deepspeed.ops
    from transformers.integrations import HfDeepSpeedConfig

    from tests.support.model_requests import model_request
    from training.models.torch_provider import load_base

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it with g++ takes two minutes
    deepspeed.init_distributed("gloo")
    settings = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    kept = HfDeepSpeedConfig(settings)  # transformers holds a weak reference to it
    samples, is_loaded = [_memory()], threading.Event()

    def sample() -> None:
        while not is_loaded.wait(_SECONDS_BETWEEN_SAMPLES):
            samples.append(_memory())

    sampling = threading.Thread(target=sample)
    sampling.start()
    loaded = load_base(model_request(model, zero_stage=3, weights_dtype=dtype))
    is_loaded.set()
    sampling.join()
    anonymous, proportional = (
        max(figures) - now for figures, now in zip(zip(*samples, strict=True), _memory(), strict=True)
    )
    total = 0.0
    for weight in loaded.parameters():
        with deepspeed.zero.GatheredParameters([weight]):
            total += weight.detach().double().abs().sum().item()
    (directory / f"{os.environ['RANK']}.json").write_text(
        json.dumps(asdict(LoadedRank(anonymous, proportional, total)))
    )
    del kept


def _memory() -> tuple[int, int]:
    return anonymous_memory(), proportional_memory()


if __name__ == "__main__":
    _load(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])

"""Memory of two processes that load a model under ZeRO-3; as a program, one of them (started by torchrun)."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from tests.support.jobs import PROJECT, environment
from tests.support.process_memory import anonymous_memory

WORKERS = 2
_SECONDS_BETWEEN_SAMPLES = 0.005
_RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def loading_memory(model: Path, directory: Path) -> list[tuple[int, float]]:
    """Return for each rank the bytes that it held while loading beyond those afterwards, and the sum of the absolute weights."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={WORKERS}",
            "-m",
            "tests.support.zero3_loading",
            str(model),
            str(directory),
        ],
        cwd=PROJECT,
        env=environment() | _RETURN_FREED_MEMORY | {"DS_ACCELERATOR": "cpu"},
        check=True,
        timeout=180,
    )
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(WORKERS)]


def _load(model: Path, directory: Path) -> None:
    import deepspeed
    import deepspeed.ops
    from transformers.integrations import HfDeepSpeedConfig

    from tests.support.model_requests import model_request
    from training.models.torch_provider import load_base

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it with g++ takes two minutes
    deepspeed.init_distributed("gloo")
    settings = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    kept = HfDeepSpeedConfig(settings)  # transformers holds a weak reference to it
    samples, is_loaded = [anonymous_memory()], threading.Event()

    def sample() -> None:
        while not is_loaded.wait(_SECONDS_BETWEEN_SAMPLES):
            samples.append(anonymous_memory())

    sampling = threading.Thread(target=sample)
    sampling.start()
    loaded = load_base(model_request(model, zero_stage=3, weights_dtype="bf16"))
    is_loaded.set()
    sampling.join()
    extra = max(samples) - anonymous_memory()
    total = 0.0
    for weight in loaded.parameters():
        with deepspeed.zero.GatheredParameters([weight]):
            total += weight.detach().double().abs().sum().item()
    (directory / f"{os.environ['RANK']}.json").write_text(json.dumps([extra, total]))
    del kept


if __name__ == "__main__":
    _load(Path(sys.argv[1]), Path(sys.argv[2]))

"""The libraries of a process: the environment variables that they read at import, and packages that they need not import."""

import os
import sys
from collections.abc import Iterable

from configs.schema import FinetuneConfig

BITSANDBYTES_OPTIMIZERS = ("adamw_8bit", "adamw_bnb_8bit", "paged_", "lion_")
"""Prefixes of the names of optimizers that bitsandbytes implements."""


def unused_packages(config: FinetuneConfig) -> list[str]:
    """Return the packages that a run does not use, but that would be imported with the libraries that it does use.

    - bitsandbytes: PEFT 0.21 imports it, and with it torch's inductor: 1.0 CPU seconds in every process.
    - deepspeed: accelerate 1.15 imports it when a model is unwrapped, and it imports mlflow: 0.9 CPU seconds.
    - wandb: TRL 1.15 imports it: 0.2 CPU seconds, and directories in the machine's temporary directory.
    """
    is_used = {
        "bitsandbytes": config.load_in_4bit or config.optim.startswith(BITSANDBYTES_OPTIMIZERS),
        "deepspeed": config.deepspeed is not None,
        "mlflow": config.logger is not None and config.logger.provider == "mlflow",
        "wandb": config.logger is not None and config.logger.provider == "wandb",
    }
    return [package for package, used in is_used.items() if not used]


def block_imports(packages: Iterable[str]) -> None:
    """Let packages count as not installed in this process, unless they are already imported.

    For a name whose entry in sys.modules is None, Python raises ModuleNotFoundError on import, and importlib.util.find_spec
    returns None. Call this at the start of a process, before the libraries that look for the packages.
    """
    for package in packages:
        sys.modules.setdefault(package, None)  # pyright: ignore[reportArgumentType]


def set_environment(*, deterministic: bool) -> None:
    """Set the environment variables that libraries read when they are imported."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # DeepSpeed unpickles its shards, which can execute code; this prevents it for the complete process.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # required by torch.use_deterministic_algorithms
        os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"  # transformers passes it to the flash-attn package
        # torch.compile would select some kernels by timing them.
        os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"

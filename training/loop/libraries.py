"""The libraries of a worker: environment variables that they read at import, and the imports themselves."""

import os
from collections.abc import Sequence

from training.models.libraries import withhold
from utils.processes import importing


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


def import_libraries(withheld: Sequence[str], deterministic: bool) -> None:
    """Import what every run with torch's kernels imports; a worker that waits for its run calls this.

    Args:
        withheld: Packages that the run does not use.
        deterministic: The YAML's key.
    """
    set_environment(deterministic=deterministic)
    withhold(withheld)
    with importing():
        import training.loop.callbacks
        import training.loop.trainer_factory
        import training.loop.worker
        import training.models.torch_provider  # noqa: F401

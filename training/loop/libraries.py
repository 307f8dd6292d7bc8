"""Import libraries in a worker process before its run starts."""

from collections.abc import Sequence

from training.models.libraries import block_imports, set_environment
from utils.processes import importing


def import_libraries(withheld: Sequence[str], deterministic: bool) -> None:
    """Import what every run with torch's kernels imports.

    Args:
        withheld: Packages that the run does not use.
        deterministic: The YAML's key.
    """
    set_environment(deterministic=deterministic)
    block_imports(withheld)
    with importing():
        import training.loop.callbacks
        import training.loop.trainer_factory
        import training.loop.worker
        import training.models.torch_provider  # noqa: F401

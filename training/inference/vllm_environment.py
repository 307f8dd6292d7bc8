"""vLLM's environment: `make setup-vllm` creates it apart from the project's, because its pins differ from those of training."""

import os
from pathlib import Path

PYTHON_VARIABLE = "ANNEAL_VLLM_PYTHON"
"""Variable with the Python of the environment; the default is .venv-vllm in the project."""
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's --max-lora-rank accepts."""
LARGEST_RANK = _RANKS[-1]

_DEFAULT_PYTHON = Path(__file__).resolve().parents[2] / ".venv-vllm" / "bin" / "python"


def python_of_vllm() -> Path:
    """Return the Python of vLLM's environment, which may not exist."""
    return Path(os.environ.get(PYTHON_VARIABLE, _DEFAULT_PYTHON))


def max_lora_rank(rank: int) -> int | None:
    """Return the smallest --max-lora-rank for adapters up to a rank, or None if vLLM supports no such rank."""
    return next((allowed for allowed in _RANKS if allowed >= rank), None)


def variables_of_vllm(cache_gigabytes: int) -> dict[str, str]:
    """Return the environment variables of a process that runs vLLM.

    Args:
        cache_gigabytes: Memory for keys and values on CPU, unless the environment says otherwise.
    """
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", str(cache_gigabytes))
    environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    environment.pop("PYTHONPATH", None)  # it would put this environment's packages first
    return environment

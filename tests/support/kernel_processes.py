"""Helpers that run modules in separate processes, where Triton's interpreter runs kernels on CPU, and read their results."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.jobs import PROJECT

_TRITON = Path(sys.prefix) / "interpreter"
"""Outside site-packages: if Triton can be imported, TRL and other packages assume a GPU."""


def triton_directory() -> Path:
    """Return the directory from which Triton can be imported."""
    assert _TRITON.exists(), f"{_TRITON} is missing: run `make setup-dev`"
    return _TRITON


def run_with_triton(module: str, *arguments: str, **variables: str) -> dict[str, Any]:
    """Run a module with Triton's interpreter and return the JSON object on its last output line.

    Args:
        module: The name of the module.
        arguments: Its arguments.
        variables: Environment variables to add.
    """
    return run_without_triton(
        module, *arguments, PYTHONPATH=str(triton_directory()), TRITON_INTERPRET="1", **variables
    )


def run_without_triton(module: str, *arguments: str, **variables: str) -> dict[str, Any]:
    """Run a module without Triton and return the JSON object on its last output line."""
    completed = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=PROJECT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout.splitlines()[-1])

"""Starts processes of their own in which Triton's interpreter runs kernels on CPU, and reads what they find."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.jobs import PROJECT

_TRITON = Path(sys.prefix) / "interpreter"
"""Beside the environment, not in it: where Triton can be imported, TRL and others take a GPU for granted."""


def triton_directory() -> Path:
    """Where Triton can be imported from."""
    assert _TRITON.exists(), f"{_TRITON} is missing: `make setup-dev` makes it"
    return _TRITON


def found_by(module: str, *arguments: str, **variables: str) -> dict[str, Any]:
    """The last line, one of JSON, that a module prints which runs kernels; `variables` are its environment's."""
    return found_without_triton(
        module, *arguments, PYTHONPATH=str(triton_directory()), TRITON_INTERPRET="1", **variables
    )


def found_without_triton(module: str, *arguments: str, **variables: str) -> dict[str, Any]:
    """As `found_by`, of a module that runs no kernels."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=PROJECT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])

"""Command lines that messages print: they work from the current directory, with the Python that runs."""

import json
import os
import shlex
import sys
from pathlib import Path

COMMAND_VARIABLE = "ANNEAL_COMMAND"
"""The variable of a submitted job with the command, as a JSON list, that submitted it and resumes its run."""
ADDRESS_VARIABLE = "RAY_ADDRESS"
"""The variable that names the cluster; a command that trains on one starts with it."""

_MAIN = Path(__file__).absolute().parents[1] / "main.py"


def main_command(*arguments: str) -> list[str]:
    """Return a command that runs main.py with these arguments; in a submitted job, on the machine that submitted it."""
    if submitted := os.environ.get(COMMAND_VARIABLE):
        python, main, *_ = json.loads(submitted)
        return [python, main, *arguments]
    return [_shortest(sys.executable), _shortest(str(_MAIN)), *arguments]


def main_line(*arguments: str) -> str:
    """Return the command as one line for a shell."""
    return shlex.join(main_command(*arguments))


def ray_command(*arguments: str) -> list[str]:
    """Return a command of Ray's CLI in the environment of the Python that runs."""
    return [_shortest(str(Path(sys.executable).with_name("ray"))), *arguments]


def _shortest(path: str) -> str:
    """Return an absolute path, or the relative one if it is shorter."""
    return min(os.path.relpath(path), path, key=len)

"""The start of a worker process with a runtime environment, compared with Ray's own setup."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ray._private.workers import setup_worker

from training.loop import ray_internals

PRINT = (
    "import json, os, sys\nprint(json.dumps([sys.argv[1:], os.getcwd(), os.environ['A'], os.environ['B']]))\n"
)


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Return the arguments with which the raylet starts a worker in another directory."""
    script = tmp_path / "worker.py"
    script.write_text(PRINT)
    elsewhere = tmp_path / "working dir"
    elsewhere.mkdir()
    context = {
        "command_prefix": [f"cd '{elsewhere}' &&"],
        "env_vars": {"A": "x y", "B": "${HOME}:${NOT_SET_HERE}"},
        "py_executable": sys.executable,
        "override_worker_entrypoint": None,
        "java_jars": [],
    }
    worker = [str(script), "--name=a 'b'"]
    return [*worker, f"--serialized-runtime-env-context={json.dumps(context)}", "--language=PYTHON"]


def test_runtime_environment_is_set_as_by_ray(command: list[str]):
    ours = Path(ray_internals.__file__).with_name("start_ray_worker.py")
    printed = [
        subprocess.run(
            [sys.executable, str(setup), *command], capture_output=True, text=True, check=True
        ).stdout
        for setup in (ours, setup_worker.__file__)
    ]
    assert printed[0] == printed[1]
    arguments, directory, *_ = json.loads(printed[0])
    assert (arguments, Path(directory).name) == (["--name=a 'b'"], "working dir")

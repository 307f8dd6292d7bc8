"""Operators that are compiled: a killed process does not keep the next ones waiting."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.jobs import PROJECT, environment

COMPILE = """
import sys
from torch.utils.cpp_extension import load
from training.loop.offload_operators import only_one_compiles
with only_one_compiles("answer"):
    load("answer", sys.argv[1:], is_python_module=False)
"""


@pytest.mark.slow
def test_extension_is_compiled_after_a_process_was_killed_while_it_compiled(tmp_path: Path):
    source = tmp_path / "answer.cpp"
    source.write_text("int answer() { return 42; }\n")
    lock = tmp_path / "answer" / "lock"
    variables = environment() | {
        "TORCH_EXTENSIONS_DIR": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # ninja
    }

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", COMPILE, str(source)], cwd=PROJECT, env=variables, start_new_session=True
        )

    killed = start()
    while not lock.exists():
        assert killed.poll() is None
        time.sleep(0.005)
    killed.kill()
    killed.wait()
    assert lock.exists()  # torch removes it when it has compiled

    processes = [start(), start()]
    try:
        assert [process.wait(100) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert not lock.exists()

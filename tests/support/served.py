"""A running service: main.py serve in a process, and OpenAI's client in another that has only its packages."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.support.jobs import PROJECT, environment
from tests.support.ports import free_port

OPENAI = PROJECT / ".venv" / "openai"
CLIENT = PROJECT / "tests" / "support" / "openai_client.py"
PREFERENCE_CLIENT = CLIENT.with_name("openai_preference_client.py")


@dataclass
class Served:
    """A running service."""

    process: subprocess.Popen[str]
    base_url: str
    key: str | None
    errors: Path

    def descendants(self, name: str) -> list[psutil.Process]:
        """Return the processes of the service whose command line contains a name."""
        found = []
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if name in " ".join(child.cmdline()):
                        found.append(child)
        return found

    def kill_all(self) -> None:
        """Kill the service with all its processes."""
        with suppress(psutil.NoSuchProcess):
            main = psutil.Process(self.process.pid)
            processes = [main, *main.children(recursive=True)]
            for each in processes:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            self.process.wait()
            psutil.wait_procs(processes, timeout=30)


@contextmanager
def served(
    config: Path,
    port: int | None = None,
    errors: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Served]:
    """Run main.py serve within the block, and kill all its processes at the end.

    Args:
        config: The service YAML.
        port: Port; None: a free one.
        errors: File for its error output; None: beside the YAML.
        variables: Environment variables to add.
    """
    errors = errors or config.with_suffix(f".{time.time_ns()}.stderr")
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [
                sys.executable,
                str(PROJECT / "main.py"),
                "serve",
                str(config),
                "--port",
                str(port or free_port()),
                "--json",
            ],
            cwd=PROJECT,
            env=environment() | dict(variables or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            process_group=0,
        )
    assert process.stdout
    service = Served(process, "", None, errors)
    try:
        line = process.stdout.readline()
        assert line, errors.read_text()
        ready = json.loads(line)
        service.base_url, service.key = ready["base_url"], ready.get("api_key")
        yield service
    finally:
        service.kill_all()
        process.stdout.close()


def run_client(
    base_url: str, key: str, *arguments: str, program: Path = CLIENT, timeout: float = 300
) -> dict[str, Any]:
    """Run a program with OpenAI's client against the service and return what it received."""
    variables = {"PATH": os.environ["PATH"], "OPENAI_API_KEY": key, "PYTHONPATH": str(OPENAI)}
    done = subprocess.run(
        [sys.executable, "-S", str(program), base_url, *arguments],
        env=variables,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

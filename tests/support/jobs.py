"""Runs main.py as a user does, in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Finished:
    """How a run of main.py ended."""

    exit_code: int
    output: str
    errors: str

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object on the last line of standard output."""
        return json.loads(self.output.splitlines()[-1])


def write_yaml(path: Path, settings: dict[str, Any]) -> Path:
    """Write a config; returns its path."""
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def tiny_settings(files: Path) -> dict[str, Any]:
    """What every run of the tiny model says: `files` holds model/, train.jsonl and valid.jsonl, and gets runs and scratch."""
    return {
        "model_id": str(files / "model"),
        "train_path": str(files / "train.jsonl"),
        "valid_path": str(files / "valid.jsonl"),
        "storage_path": str(files / "runs"),
        "output_dir": str(files / "scratch"),
        "device": "cpu",
        "dtype": "fp32",
        "gradient_checkpointing": False,
        "max_failures": 0,
    }


def command(config: Path, *arguments: str) -> list[str]:
    """The command line, without library warnings."""
    return [sys.executable, str(PROJECT / "main.py"), str(config), *arguments]


def environment() -> dict[str, str]:
    """Ours, without a cluster of somebody else's."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def run_main(
    config: Path, *arguments: str, timeout: float = 300, variables: Mapping[str, str] | None = None
) -> Finished:
    """Run main.py to its end.

    Args:
        config: The YAML.
        arguments: Overrides and options.
        timeout: Seconds.
        variables: Set on top of the environment.
    """
    done = subprocess.run(
        command(config, *arguments),
        cwd=PROJECT,
        env=environment() | dict(variables or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, from a run stored in a local directory."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

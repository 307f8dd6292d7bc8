"""Reports of benchmarks: median and range on the screen, all raw results in benchmarks/results/."""

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "transformers", "trl", "peft", "ray")
_NVIDIA_SMI_SECONDS = 60


def find_gpu() -> tuple[str | None, str]:
    """Return (name of the first GPU or None, the reason why there is none)."""
    if shutil.which("nvidia-smi") is None:
        return None, "nvidia-smi is not on PATH"
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"nvidia-smi failed: {error}"
    lines = f"{done.stdout}\n{done.stderr}".strip().splitlines() or ["it printed nothing"]
    # It also exits with 0 if it finds none.
    if done.returncode != 0 or not done.stdout.strip() or "No devices were found" in done.stdout:
        return None, f"nvidia-smi reports no GPU: {lines[0].strip()}"
    return lines[0].strip(), ""


def gpu_name() -> str | None:
    """Return the name of the first GPU, or None."""
    return find_gpu()[0]


def machine() -> dict[str, Any]:
    """Describe this machine and its packages."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": gpu_name(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in _PACKAGES},
    }


def sha256(file: Path) -> str:
    """Return the checksum of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_whole(file: Path, text: str) -> None:
    """Write a file so that it is never seen or left half-written."""
    partial = file.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(file)


def rounds_parser(docstring: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """Return a parser of `--rounds`, described by the first line of a docstring."""
    parser = argparse.ArgumentParser(description=docstring and docstring.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    return parser


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and range."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def write_report(
    name: str,
    summary: Mapping[str, Mapping[str, float]],
    rounds: Sequence[Mapping[str, Any]],
    counts: Mapping[str, float] | None = None,
) -> None:
    """Write the raw rounds, and print their summary; `counts` are not measured per round."""
    report = {"machine": machine(), "summary": summary, "counts": counts or {}, "rounds": rounds}
    write_whole(RESULTS / f"{name}.json", json.dumps(report, indent=2) + "\n")
    for figure, values in summary.items():
        print(
            f"{figure}: median {values['median']:.3f} (range {values['lowest']:.3f} to {values['highest']:.3f}, {values.get('rounds', len(rounds))} rounds)"
        )
    for label, count in (counts or {}).items():
        print(f"{label}: {count:g}")

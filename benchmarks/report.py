"""Reports of benchmarks: median and range on the screen, all raw results in benchmarks/results/."""

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


def _gpu() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    return subprocess.check_output(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], text=True
    ).strip()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and range."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def write_report(
    name: str,
    summary: Mapping[str, Mapping[str, float]],
    rounds: Sequence[Mapping[str, Any]],
    counts: Mapping[str, float] | None = None,
    directory: Path = RESULTS,
) -> None:
    """Write the raw rounds to a directory, and print their summary; `counts` are not measured per round."""
    machine = {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": _gpu(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in _PACKAGES},
    }
    directory.mkdir(exist_ok=True)
    (directory / f"{name}.json").write_text(
        json.dumps(
            {"machine": machine, "summary": summary, "counts": counts or {}, "rounds": rounds}, indent=2
        )
        + "\n"
    )
    for figure, values in summary.items():
        print(
            f"{figure}: median {values['median']:.3f} (range {values['lowest']:.3f} to {values['highest']:.3f}, {values.get('rounds', len(rounds))} rounds)"
        )
    for label, count in (counts or {}).items():
        print(f"{label}: {count:g}")

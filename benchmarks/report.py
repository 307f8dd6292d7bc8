"""What every benchmark does with its rounds: median and range on the screen, all raw results in benchmarks/results/."""

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "transformers", "trl", "peft", "ray")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def write_report(
    name: str,
    summary: Mapping[str, Mapping[str, float]],
    rounds: Sequence[Mapping[str, Any]],
    counts: Mapping[str, float] | None = None,
) -> None:
    """Keep the raw rounds, and print what they come to; `counts` are of no round."""
    machine = {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in _PACKAGES},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(
        json.dumps(
            {"machine": machine, "summary": summary, "counts": counts or {}, "rounds": rounds}, indent=2
        )
        + "\n"
    )
    for ratio, values in summary.items():
        print(
            f"{ratio}: median {values['median']:.3f} (range {values['lowest']:.3f} to {values['highest']:.3f}, {len(rounds)} rounds)"
        )
    for what, count in (counts or {}).items():
        print(f"{what}: {count:g}")

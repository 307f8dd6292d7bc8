"""Results of the GPU benchmark: benchmarks/results/gpu.json, and the table and README line that are generated from it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts import PARTS, Figure
from benchmarks.gpu_processes import PROJECT
from benchmarks.gpu_runs import Measured
from benchmarks.report import RESULTS, machine, spread, write_whole

_NOT_MEASURED = "Not measured yet: no GPU was available."
_NEVER_RUN = (
    "> - **Never run on a GPU**: the CUDA paths, NCCL, the CUDA image, the GPU benchmark, and the memory estimate for GPUs. The Triton\n"
    ">   kernels were compared with torch in Triton's interpreter only ([how](docs/kernels.md))."
)


@dataclass
class Round:
    """The measurements of contestants on one kind of GPU."""

    gpu: str | None
    measured: dict[str, Measured]


class Results:
    """The rounds of all calls, in a directory; each change is written at once."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._file = directory / "gpu.json"
        known: Mapping[str, Any] = json.loads(self._file.read_text()) if self._file.exists() else {}
        self.machine: Mapping[str, Any] = known.get("machine", {})
        self.failed: dict[str, str] = known.get("failed", {})
        """Contestant -> the first line of its last error."""
        self.rounds = [
            Round(round_["gpu"], {name: Measured(**values) for name, values in round_["measured"].items()})
            for round_ in known.get("rounds", [])
        ]

    def current_round(self, gpu: str | None, contestants: list[str]) -> Round:
        """Return the unfinished round of this kind of GPU, or a new one: ratios must come from one kind."""
        last = self.rounds[-1] if self.rounds else None
        if last is None or last.gpu != gpu or set(contestants) <= last.measured.keys():
            self.rounds.append(Round(gpu, {}))
        return self.rounds[-1]

    def add(self, name: str, measured: Measured) -> None:
        """Add the measurements of a contestant to the current round."""
        self.rounds[-1].measured[name] = measured
        self.failed.pop(name, None)
        self._write()

    def add_failure(self, name: str, error: str) -> None:
        """Add a contestant's error, which the table names."""
        self.failed[name] = error.splitlines()[0]
        self._write()

    def _write(self) -> None:
        self.machine = machine()
        report = {
            "machine": self.machine,
            "summary": {
                f"{part}: {figure.name}": values for part, figure, values in self.figures() if values
            },
            "failed": self.failed,
            "rounds": [asdict(round_) for round_ in self.rounds],
        }
        self.directory.mkdir(parents=True, exist_ok=True)
        write_whole(self._file, json.dumps(report, indent=2) + "\n")

    def figures(self) -> Iterator[tuple[str, Figure, dict[str, float] | None]]:
        """Yield (part, figure, its median and range over the rounds, or None if it was not measured)."""
        for name, part in PARTS.items():
            for figure in part.figures:
                values = [
                    value
                    for round_ in self.rounds
                    if set(figure.needs) <= round_.measured.keys()
                    and (value := figure.value(*map(round_.measured.get, figure.needs))) is not None
                ]
                yield name, figure, spread(values) | {"rounds": len(values)} if values else None

    def met(self) -> tuple[int, int]:
        """Return the number of targets that the medians meet, and the number of measured figures."""
        measured = [(figure.target, values["median"]) for _, figure, values in self.figures() if values]
        return sum(target.includes(median) for target, median in measured), len(measured)

    def table(self) -> str:
        """Return a Markdown table with the measurements and targets of every part, or a line if there are none."""
        if not self.rounds:
            return _NOT_MEASURED
        lines = ["| part | figure | median (range) | rounds | target | |", "|---|---|---|---|---|---|"]
        for part, figure, values in self.figures():
            cells = ["–", "0", str(figure.target), self._why_missing(figure)]  # noqa: RUF001
            if values:
                median, lowest, highest = (values[name] for name in ("median", "lowest", "highest"))
                verdict = "hit" if figure.target.includes(median) else "miss"
                several = f" ({lowest:,.4g} to {highest:,.4g})" if values["rounds"] > 1 else ""
                cells = [f"{median:,.4g}{several}", f"{values['rounds']:g}", str(figure.target), verdict]
            lines.append(f"| {part} | {figure.name} | {' | '.join(cells)} |")
        return "\n".join([f"{self._where()}:\n", *lines])

    def _why_missing(self, figure: Figure) -> str:
        failed = [name for name in figure.needs if name in self.failed]
        return f"failed: {', '.join(failed)}" if failed else "not measured"

    def _where(self) -> str:
        versions = ", ".join(f"{name} {number}" for name, number in self.machine["versions"].items())
        return f"Measured on {self.machine['gpu'] or 'CPU'}, {self.machine['date']}, with {versions}"

    def status(self) -> str:
        """Return the line for the README's status."""
        if not self.rounds:
            return _NEVER_RUN
        met, measured = self.met()
        return (
            f"> - **Measured on one GPU** ({self.machine['gpu']}, {self.machine['date']}): {met} of {measured} targets met; see\n"
            ">   [the table](docs/performance.md#gpu-benchmark). Several GPUs, NCCL and the CUDA image have not been run."
        )


PAGES = {"README.md": Results.status, "docs/performance.md": Results.table}
"""Page -> what is generated between its two markers."""


def generated(page: str, results: Results) -> str:
    """Return the text of a page with the part between its markers generated from the results."""
    text = (PROJECT / page).read_text("utf-8")
    prefix = "> " if page == "README.md" else ""
    begin, end = f"{prefix}<!-- gpu.json -->\n", f"\n{prefix}<!-- end of gpu.json -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    assert rest and after, f"{page} has no markers"
    return f"{before}{begin}{PAGES[page](results)}{end}{after}"


def write_pages(results: Results | None = None) -> None:
    """Write the pages that contain results."""
    for page in PAGES:
        write_whole(PROJECT / page, generated(page, results or Results(RESULTS)))

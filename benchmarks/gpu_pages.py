"""Pages with figures of the GPU benchmark: the table in docs/performance.md and the status in the README, generated from gpu.json."""

import textwrap
from collections.abc import Sequence

from benchmarks.gpu_parts import Figure, number
from benchmarks.gpu_processes import PROJECT
from benchmarks.gpu_results import Results, Round, figures
from benchmarks.gpu_runs import Shapes
from benchmarks.report import RESULTS, write_whole

_WIDTH = 130
_NOT_MEASURED = "Not measured yet: no GPU was available."
_NEVER_RUN = (
    "> - **Never run on a GPU**: the CUDA paths, NCCL, the CUDA image, the cookbooks' YAMLs for GPUs, the GPU benchmark, and the memory\n"
    ">   estimate for GPUs. The Triton kernels were compared with torch in Triton's interpreter only ([how](docs/kernels.md))."
)


def table(results: Results, shapes: Shapes = "real") -> str:
    """Return a Markdown table with the latest measurements and targets of every part, or a line if there are none."""
    rounds = results.latest(shapes)
    if not rounds:
        return _NOT_MEASURED
    lines = ["| part | figure | median (range) | rounds | target | |", "|---|---|---|---|---|---|"]
    for part, figure, values in figures(rounds):
        cells = ["–", "0", str(figure.target), _why_missing(figure, rounds)]  # noqa: RUF001
        if values:
            median, lowest, highest = (values[name] for name in ("median", "lowest", "highest"))
            verdict = "hit" if figure.target.includes(median) else "miss"
            several = f" ({number(lowest)} to {number(highest)})" if values["rounds"] > 1 else ""
            cells = [f"{number(median)}{several}", f"{values['rounds']:g}", str(figure.target), verdict]
        lines.append(f"| {part} | {figure.name} | {' | '.join(cells)} |")
    return "\n".join([f"{_where(rounds)}\n", *lines])


def _failed(figure: Figure, rounds: Sequence[Round]) -> list[str]:
    return [name for name in figure.needs if any(name in round_.failed for round_ in rounds)]


def _why_missing(figure: Figure, rounds: Sequence[Round]) -> str:
    failed = _failed(figure, rounds)
    return f"failed: {', '.join(failed)}" if failed else "not measured"


def _where(rounds: Sequence[Round]) -> str:
    origin = rounds[0].origin
    machine = {
        "real": str(origin.gpu),
        "tiny": "CPU with shapes that only test the script",
        "simulated": "a simulated GPU with shapes that only test the script",
    }[origin.shapes]
    versions = ", ".join(f"{name} {number}" for name, number in origin.versions.items())
    text = f"Measured on {machine}, {_date(rounds)}, commit {origin.commit or 'unknown'}, with {versions}:"
    return textwrap.fill(text, _WIDTH, break_on_hyphens=False)


def _date(rounds: Sequence[Round]) -> str:
    return max(round_.updated for round_ in rounds)[:10]


def status(results: Results) -> str:
    """Return the line for the README's status."""
    rounds = results.latest("real")
    if not rounds:
        return _NEVER_RUN
    every = list(figures(rounds))
    measured = [(figure.target, values["median"]) for _, figure, values in every if values]
    met = sum(target.includes(median) for target, median in measured)
    methods = any(values for part, _, values in every if part == "methods")
    failed = sum(values is None and bool(_failed(figure, rounds)) for _, figure, values in every)
    text = (
        f"- **Measured on one GPU** ({rounds[0].origin.gpu}, {_date(rounds)}): {len(measured)} of {len(every)} figures measured, "
        f"{met} targets met, {failed} failed; see [the table](docs/performance.md#gpu-benchmark). "
        f"Never run on a GPU: {'' if methods else 'DeepSpeed, preference tuning, '}several GPUs, the cookbooks' YAMLs for GPUs and the CUDA image."
    )
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent="> ",
        subsequent_indent=">   ",
        break_on_hyphens=False,
        break_long_words=False,
    )


PAGES = {"README.md": status, "docs/performance.md": table}
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


def write_pages() -> None:
    """Generate the pages from benchmarks/results/gpu.json.

    Raises:
        ResultsError: The file has other content.
    """
    results = Results(RESULTS)
    for page in PAGES:
        write_whole(PROJECT / page, generated(page, results))

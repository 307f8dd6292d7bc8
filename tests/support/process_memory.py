"""Memory of this process, as Linux counts it."""

from pathlib import Path


def anonymous_memory() -> int:
    """Return the bytes of this process that no file backs."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line]
    return int(line.split()[1]) * 1024


def proportional_memory() -> int:
    """Return the PSS of this process in bytes: a page that n processes share, mapped files included, counts as 1/n."""
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Pss:"))

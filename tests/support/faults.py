"""What can happen to a run besides its bucket's faults (see bucket_proxy): killed at an exact place, seen through injected code."""

import os
from pathlib import Path

_INJECTED = Path(__file__).parent / "injected"


def injection(ledger: Path, *, hold: str = "", sabotage: str = "") -> dict[str, str]:
    """Environment variables that bring tests/support/injected into a run; see there."""
    ledger.mkdir(parents=True)
    paths = [str(_INJECTED), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "RESUME_LEDGER": str(ledger),
        "RESUME_HOLD": hold,
        "RESUME_SABOTAGE": sabotage,
    }

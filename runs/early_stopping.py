"""Early stopping: decide from the eval losses of a run, so that every worker, a resumed run and the driver decide alike."""

import math
from collections.abc import Iterable, Mapping
from typing import Any


def stopping_step(log: Iterable[Mapping[str, Any]], patience: int, threshold: float) -> int | None:
    """Return the step of the evaluation after which training stops, or None if it goes to the end.

    An evaluation counts against the patience unless its loss is lower than the best one before it by more than the threshold,
    as in EarlyStoppingCallback of transformers.

    Args:
        log: Entries with `step`, and with `eval_loss` if they are evaluations, in order.
        patience: Number of evaluations without an improvement, one after another.
        threshold: Improvement in nats per loss token that does not count.
    """
    best, waited = math.inf, 0
    for entry in log:
        loss = entry.get("eval_loss")
        if loss is None:
            continue
        waited = 0 if loss < best - threshold else waited + 1
        best = min(best, loss)
        if waited >= patience:
            return entry["step"]
    return None

"""Compare runs: settings side by side, curves in one chart."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from configs.loading import flat
from runs.charts import draw_eval_curves
from runs.summaries import RunDetails, read_run

_NOT_COMPARED = {"run_name", "storage_path", "output_dir"}  # these only name and locate a run
_VALIDATION_ROWS = {"valid_path", "valid_split"}
_WHAT_IS_EVALUATED = {*_VALIDATION_ROWS, "task", "preference_tuning_config", "classifier_config"}


class Comparison(BaseModel):
    """Runs side by side."""

    model_config = ConfigDict(frozen=True)

    runs: list[RunDetails]
    differences: dict[str, list[Any]]
    """Configuration keys whose values differ between runs with recorded settings -> values in the order of all runs."""
    incomparable_by: list[str]
    """Differing keys that make eval losses incomparable, or `tokens of the validation rows` if those differ under equal keys."""


def compare_runs(uris: Sequence[str]) -> Comparison:
    """Read runs and compare them."""
    runs = [read_run(uri) for uri in uris]
    return Comparison(
        runs=runs,
        differences=_differences(runs),
        incomparable_by=_incomparable_by([run for run in runs if run.eval_losses]),
    )


def _incomparable_by(evaluated: Sequence[RunDetails]) -> list[str]:
    differing = [key for key in _differences(evaluated) if key.partition(".")[0] in _WHAT_IS_EVALUATED]
    fingerprints = {run.valid_rows for run in evaluated}
    if None in fingerprints:
        return differing
    if len(fingerprints) == 1:  # the same rows, wherever they are stored
        return [key for key in differing if key not in _VALIDATION_ROWS]
    return differing if _VALIDATION_ROWS & set(differing) else [*differing, "tokens of the validation rows"]


def _differences(runs: Sequence[RunDetails]) -> dict[str, list[Any]]:
    configs = [flat(run.config) for run in runs]
    recorded = [config for config in configs if config]
    keys = dict.fromkeys(key for config in recorded for key in config if key not in _NOT_COMPARED)
    return {
        key: [config.get(key) for config in configs]
        for key in keys
        if any(config.get(key) != recorded[0].get(key) for config in recorded)
    }


def draw(comparison: Comparison) -> bytes | None:
    """Return a PNG of the eval losses of all runs over epochs; None if no run has any."""
    curves = {run.run_uri: run.eval_losses for run in comparison.runs if run.eval_losses}
    names = _shortest_names(list(curves))
    return draw_eval_curves({names[uri]: losses for uri, losses in curves.items()}) if curves else None


def _shortest_names(uris: Sequence[str]) -> dict[str, str]:
    """Return the last part of each URI, or the complete URIs if the last parts are not unique."""
    names = {uri: uri.rpartition("/")[2] for uri in uris}
    return names if len(set(names.values())) == len(uris) else {uri: uri for uri in uris}

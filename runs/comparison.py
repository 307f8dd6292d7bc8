"""What runs have in common and where they differ: settings side by side, curves in one picture."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from configs.loading import flat
from runs.curve import draw_eval_curves
from runs.listing import RunDetails, read_run

_NOT_COMPARED = {"run_name", "storage_path", "output_dir"}  # where a run is, not what it is
_WHAT_IS_EVALUATED = {"valid_path", "task", "preference_tuning_config", "classifier_config"}


class Comparison(BaseModel):
    """Runs side by side."""

    model_config = ConfigDict(frozen=True)

    runs: list[RunDetails]
    differences: dict[str, list[Any]]
    """Keys of the configuration that are not the same everywhere -> their values, in the order of the runs."""
    incomparable_by: list[str]
    """Those of them that make eval losses mean something else in one run than in another."""


def compare_runs(uris: Sequence[str]) -> Comparison:
    """Read runs and compare them; errors as of `read_run`."""
    runs = [read_run(uri) for uri in uris]
    evaluated = _differences([run for run in runs if run.eval_losses])
    return Comparison(
        runs=runs,
        differences=_differences(runs),
        incomparable_by=[key for key in evaluated if key.partition(".")[0] in _WHAT_IS_EVALUATED],
    )


def _differences(runs: Sequence[RunDetails]) -> dict[str, list[Any]]:
    configs = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key not in _NOT_COMPARED)
    values = {key: [config.get(key) for config in configs] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def draw(comparison: Comparison) -> bytes | None:
    """The eval losses of all runs over epochs as a PNG; None where no run has any."""
    curves = {run.run_uri: run.eval_losses for run in comparison.runs if run.eval_losses}
    names = _shortest_names(list(curves))
    return draw_eval_curves({names[uri]: losses for uri, losses in curves.items()}) if curves else None


def _shortest_names(uris: Sequence[str]) -> dict[str, str]:
    """The last parts of URIs, or the URIs themselves where those would be the same."""
    names = {uri: uri.rpartition("/")[2] for uri in uris}
    return names if len(set(names.values())) == len(uris) else {uri: uri for uri in uris}

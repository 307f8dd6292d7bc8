"""Read the state of a run from the bucket: its result, its committed checkpoints and its metrics."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import ValidationError

from configs.schema import FinetuneConfig
from configs.yaml_source import unescaped
from runs.layout import (
    CHECKPOINTS,
    CONFIG_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    RESULT_FILE,
    SAMPLES,
    EvalLoss,
    EvalSample,
    Lease,
    Manifest,
    MetricsLine,
    Phase,
    RunResult,
    checkpoint_key,
    checkpoint_uri,
    eval_figures,
    run_of,
    samples_key,
    step_of_samples,
)
from utils.errors import first_line
from utils.storage.bucket import DamagedError, Store, open_store

_STEP_PHASES: tuple[Phase, ...] = ("data", "forward", "backward", "optimizer", "other")
"""The phases of a step, excluding evaluation and saving."""
_REWRITE = "The command that started the run writes it again when it resumes; or remove the run"
_UNREADABLE = "is truncated, from another version of Anneal, or not written by Anneal"


def read_result(store: Store, key: str = RESULT_FILE) -> RunResult | None:
    """Return a run's result.json, or None.

    Args:
        store: the run, or a location above it.
        key: key of the result in the store.

    Raises:
        DamagedError: the object is not a valid result.
    """
    written = store.read_if_exists(key)
    if written is None:
        return None
    try:
        return RunResult.model_validate_json(written)
    except ValidationError as error:
        raise DamagedError(
            key, f"{store.uri_of(key)} {_UNREADABLE}. Remove it: the run writes it again when it ends"
        ) from error


@dataclass(frozen=True)
class StoredConfig:
    """A run's config.yaml."""

    keys: dict[str, Any]
    """The stored text; empty where it is damaged."""
    config: FinetuneConfig | None
    """None where it is damaged, or of a version with other keys."""
    damage: str | None
    """Reason why no version accepts it."""


def read_config(store: Store, key: str = CONFIG_FILE) -> StoredConfig | None:
    """Return a run's config.yaml, None where it has none. Never rejects its content: that is up to the caller.

    Args:
        store: The run, or a location above it.
        key: Key of the file in the store.

    Raises:
        BucketError: it cannot be read.
    """
    content = store.read_if_exists(key)
    if content is None:
        return None
    uri = store.uri_of(key)
    try:
        keys = unescaped(yaml.safe_load(content) or {})
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return StoredConfig({}, None, f"{uri} is not valid YAML ({first_line(error)}). {_REWRITE}")
    if not isinstance(keys, dict) or "model_id" not in keys:
        return StoredConfig({}, None, f"{uri} {_UNREADABLE}. {_REWRITE}")
    try:
        return StoredConfig(keys, FinetuneConfig.model_validate(keys), None)
    except ValidationError:
        return StoredConfig(keys, None, None)


def read_metrics(store: Store, key: str = METRICS_FILE) -> list[MetricsLine]:
    """Return the readable lines of a run's metrics.jsonl; empty if it does not exist. Arguments as in `read_result`."""
    return survey_metrics(store, key)[0]


def survey_metrics(store: Store, key: str = METRICS_FILE) -> tuple[list[MetricsLine], str | None]:
    """Return (the lines of a run's metrics.jsonl before the first unreadable one, the problem with that line or None)."""
    return parse_metrics(store.read_if_exists(key) or b"", store.uri_of(key))


def parse_metrics(content: bytes, uri: str) -> tuple[list[MetricsLine], str | None]:
    """Return the same as `survey_metrics` for the content of a metrics.jsonl at a URI."""
    lines: list[MetricsLine] = []
    written = content.splitlines()
    for number, line in enumerate(written, start=1):
        try:
            lines.append(MetricsLine.model_validate_json(line))
        except ValidationError:
            rest = (
                "it is"
                if number == len(written)
                else f"it and the {len(written) - number} lines after it are"
            )
            return lines, (
                f"{uri}: line {number} is truncated or was not written by Anneal; {rest} ignored. A run that resumes "
                "writes the file again"
            )
    return lines, None


def survey_samples(store: Store, most: int, until: int) -> tuple[list[EvalSample], str | None]:
    """Return (the samples of a run's evaluations, the problem with the first unreadable record or None).

    Args:
        store: the run.
        most: number of evaluations to read, the first and the last of them among these.
        until: step of the last evaluation that counts; later ones belong to an attempt whose steps are lost.
    """
    steps = [step for key in sizes(store, f"{SAMPLES}/") if (step := step_of_samples(key)) is not None]
    steps = sorted(step for step in steps if step <= until)
    last = len(steps) - 1
    places = {last} if most == 1 else {round(part * last / (most - 1)) for part in range(most)}
    keys = [samples_key(steps[place]) for place in sorted(places) if steps]
    samples: list[EvalSample] = []
    for key in keys:
        try:
            samples += [
                EvalSample.model_validate_json(line)
                for line in (store.read_if_exists(key) or b"").splitlines()
            ]
        except ValidationError:
            return samples, f"{store.uri_of(key)} {_UNREADABLE}; it and later samples are ignored. Delete it"
    return samples, None


def read_lease(store: Store, key: str) -> Lease | None:
    """Return a lease on a run, or None if its owner has removed it. Arguments and errors as in `read_result`."""
    written = store.read_if_exists(key)
    if written is None:
        return None
    try:
        return Lease.model_validate_json(written)
    except ValidationError as error:
        raise DamagedError(
            key, f"{store.uri_of(key)} {_UNREADABLE}. If no process trains this run, delete it and try again"
        ) from error


def eval_losses_of(metrics: Sequence[MetricsLine]) -> list[EvalLoss]:
    """Return the evaluations among the lines of metrics.jsonl, excluding those with a NaN or infinite loss."""
    return [
        EvalLoss(
            step=line.step,
            epoch=line.epoch,
            eval_loss=line.eval_loss,
            figures={
                name: value
                for name, value in eval_figures(line.model_extra or {}).items()
                if math.isfinite(value)
            },
        )
        for line in metrics
        if line.eval_loss is not None and math.isfinite(line.eval_loss)
    ]


def overall_speed(result: RunResult, metrics: Sequence[MetricsLine]) -> float | None:
    """Return a run's training speed in tokens per second over all attempts, excluding evaluation and saving as in `Speed`.

    Args:
        result: the run's result. Its own speed is that of the last attempt only.
        metrics: the lines of the run's metrics.jsonl.

    Returns:
        None if no step was trained, or if the metrics lack a step or its seconds per phase.
    """
    lines = [line for line in metrics if line.loss is not None and line.step <= result.train_steps]
    steps = [line.model_extra or {} for line in lines]
    names = [f"seconds/{phase}" for phase in _STEP_PHASES]
    if len(steps) != result.train_steps or any(name not in step for step in steps for name in names):
        return None
    seconds = sum(step[name] for step in steps for name in names)
    return round(result.tokens / seconds, 3) if seconds else None


def parent_metrics(parent: str | None) -> list[MetricsLine]:
    """Return the metrics of a checkpoint's run up to that checkpoint; empty if it does not belong to a run.

    Args:
        parent: URI of the checkpoint, as in the `parent` of a run's manifest and result.
    """
    if parent is None or not (run := run_of(parent)):
        return []
    reached = int(parent.rstrip("/").rpartition("-")[2])
    return [line for line in read_metrics(open_store(run)) if line.step <= reached]


def committed(store: Store) -> list[Manifest]:
    """Return the committed checkpoints of a run, sorted by step: valid manifest, and all files with the right size."""
    return survey(store)[0]


def survey(store: Store) -> tuple[list[Manifest], list[str]]:
    """Return (committed checkpoints, problems with checkpoints that are damaged since their commit).

    Files without a manifest are not damage: a killed attempt leaves them.
    """
    stored = sizes(store, f"{CHECKPOINTS}/")
    manifests, damage = [], []
    for key in stored:
        if not key.endswith(f"/{MANIFEST_FILE}"):
            continue
        content = store.read_if_exists(key)
        if content is None:
            continue  # a training run has removed it meanwhile
        try:
            manifest = Manifest.model_validate_json(content)
        except ValidationError:
            damage.append(f"{store.uri_of(key)} {_UNREADABLE}")
            continue
        if key != checkpoint_key(manifest.step, MANIFEST_FILE):
            damage.append(f"{store.uri_of(key)} is the manifest of step {manifest.step}")
            continue
        wrong = wrong_sizes(store, manifest, stored)
        damage += wrong
        if not wrong:
            manifests.append(manifest)
    return sorted(manifests, key=lambda manifest: manifest.step), damage


def sizes(store: Store, prefix: str) -> dict[str, int]:
    """Return the size in bytes of each object below a prefix."""
    return {item.key: item.size for item in store.list(prefix)}


def wrong_sizes(store: Store, manifest: Manifest, stored: Mapping[str, int]) -> list[str]:
    """Return a message for each file of a checkpoint whose stored size differs from the manifest."""
    return [
        f"{store.uri_of(name)} has {stored.get(name, 'no')} bytes, but {file.size} were committed"
        for file in manifest.files
        if stored.get(name := checkpoint_key(manifest.step, file.path)) != file.size
    ]


def best(manifests: list[Manifest]) -> Manifest | None:
    """Return the checkpoint with the lowest eval loss; the latest if none was evaluated."""
    evaluated = [manifest for manifest in manifests if manifest.eval_loss is not None]
    if evaluated:
        return min(evaluated, key=lambda manifest: (manifest.eval_loss, manifest.step))
    return manifests[-1] if manifests else None


def latest(manifests: list[Manifest]) -> Manifest | None:
    """Return the checkpoint with the highest step."""
    return manifests[-1] if manifests else None


def missing_of_completed(store: Store, manifests: list[Manifest]) -> list[str]:
    """Return a message for each checkpoint that a completed run's result.json names but that no longer exists."""
    result = read_result(store)
    if result is None or result.status != "completed":
        return []
    there = {checkpoint_uri(result.run_uri, manifest.step) for manifest in manifests}
    named = {uri for uri in (result.best_checkpoint, result.last_checkpoint) if uri}
    return [f"{uri} is listed in {RESULT_FILE}, but has no {MANIFEST_FILE}" for uri in sorted(named - there)]

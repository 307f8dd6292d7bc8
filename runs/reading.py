"""How a run stands, from what lies in the bucket: its result, its committed checkpoints, what was measured so far."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import ValidationError

from configs.schema import FinetuneConfig
from runs.layout import (
    CHECKPOINTS,
    CONFIG_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    RESULT_FILE,
    Claim,
    EvalLoss,
    Manifest,
    MetricsLine,
    RunResult,
    checkpoint_key,
    checkpoint_uri,
    eval_figures,
    run_of,
)
from utils.bucket import DamagedError, Store, open_store

_UNREADABLE = "is cut off, of another version of Anneal, or none of ours"


def read_result(store: Store, key: str = RESULT_FILE) -> RunResult | None:
    """A run's result.json, if it has one.

    Args:
        store: The run, or a place above it.
        key: Of the result in the store.

    Raises:
        DamagedError: it is no result.
        BucketError: it cannot be read.
    """
    written = store.read_if_exists(key)
    if written is None:
        return None
    try:
        return RunResult.model_validate_json(written)
    except ValidationError as error:
        raise DamagedError(
            key, f"{store.uri_of(key)} {_UNREADABLE}. Remove it: the run's end writes it again"
        ) from error


@dataclass(frozen=True)
class StoredConfig:
    """A run's config.yaml."""

    keys: dict[str, Any]
    """As it is stored; empty where it is damaged."""
    config: FinetuneConfig | None
    """None where it is damaged, or of a version with other keys."""
    damage: str | None
    """Why it is no configuration of any version."""


def read_config(store: Store) -> StoredConfig | None:
    """Return a run's config.yaml, None where it has none. Never rejects its content: that is up to the caller.

    Args:
        store: The run.

    Raises:
        BucketError: it cannot be read.
    """
    content = store.read_if_exists(CONFIG_FILE)
    if content is None:
        return None
    uri = store.uri_of(CONFIG_FILE)
    try:
        keys = yaml.safe_load(content) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return StoredConfig({}, None, f"{uri} is not valid YAML ({str(error).splitlines()[0]})")
    if not isinstance(keys, dict):
        return StoredConfig({}, None, f"{uri} is not the configuration that Anneal writes")
    try:
        return StoredConfig(keys, FinetuneConfig.model_validate(keys), None)
    except ValidationError:
        return StoredConfig(keys, None, None)


def read_metrics(store: Store, key: str = METRICS_FILE) -> list[MetricsLine]:
    """The lines of a run's metrics.jsonl; none where there is none yet. Arguments and errors as of `read_result`."""
    written = store.read_if_exists(key) or b""
    try:
        return [MetricsLine.model_validate_json(line) for line in written.splitlines()]
    except ValidationError as error:
        raise DamagedError(
            key, f"{store.uri_of(key)} {_UNREADABLE}. Remove it: the next checkpoint writes it again"
        ) from error


def read_claim(store: Store, key: str) -> Claim | None:
    """A claim on a run; None where its owner has ended. Arguments and errors as of `read_result`."""
    written = store.read_if_exists(key)
    if written is None:
        return None
    try:
        return Claim.model_validate_json(written)
    except ValidationError as error:
        raise DamagedError(
            key, f"{store.uri_of(key)} {_UNREADABLE}. If nobody trains this run, delete it and try again"
        ) from error


def eval_losses_of(metrics: Sequence[MetricsLine]) -> list[EvalLoss]:
    """The evaluations among the lines of metrics.jsonl; those whose loss is no number are none."""
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


def parent_metrics(parent: str | None) -> list[MetricsLine]:
    """What was measured in the run that a checkpoint belongs to, up to that checkpoint; nothing where it is no run's.

    Args:
        parent: The checkpoint's URI, as a run's manifest and result name what it started from.
    """
    if parent is None or not (run := run_of(parent)):
        return []
    reached = int(parent.rstrip("/").rpartition("-")[2])
    return [line for line in read_metrics(open_store(run)) if line.step <= reached]


def committed(store: Store) -> list[Manifest]:
    """Every committed checkpoint of a run, by step: those whose manifest can be read and whose files have their sizes.

    Raises:
        BucketError: the run cannot be listed.
    """
    return survey(store)[0]


def survey(store: Store) -> tuple[list[Manifest], list[str]]:
    """(committed checkpoints, what is wrong with those that were committed once and are damaged now).

    Files without a manifest are no damage: an attempt that was killed leaves them.

    Raises:
        BucketError: the run cannot be listed.
    """
    stored = sizes(store, f"{CHECKPOINTS}/")
    manifests, damage = [], []
    for key in stored:
        if not key.endswith(f"/{MANIFEST_FILE}"):
            continue
        content = store.read_if_exists(key)
        if content is None:
            continue  # a run that trains has removed it meanwhile
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
    """Bytes of each object below a prefix."""
    return {item.key: item.size for item in store.list(prefix)}


def wrong_sizes(store: Store, manifest: Manifest, stored: Mapping[str, int]) -> list[str]:
    """The files of a checkpoint that are not stored as they were committed, and how they are."""
    return [
        f"{store.uri_of(name)} has {stored.get(name, 'no')} bytes, and {file.size} were committed"
        for file in manifest.files
        if stored.get(name := checkpoint_key(manifest.step, file.path)) != file.size
    ]


def best(manifests: list[Manifest]) -> Manifest | None:
    """The lowest eval loss; without any, the newest."""
    evaluated = [manifest for manifest in manifests if manifest.eval_loss is not None]
    if evaluated:
        return min(evaluated, key=lambda manifest: (manifest.eval_loss, manifest.step))
    return manifests[-1] if manifests else None


def newest(manifests: list[Manifest]) -> Manifest | None:
    """The one with the highest step."""
    return manifests[-1] if manifests else None


def missing_of_completed(store: Store, manifests: list[Manifest]) -> list[str]:
    """The checkpoints that a completed run's result.json names and that are there no more."""
    result = read_result(store)
    if result is None or result.status != "completed":
        return []
    there = {checkpoint_uri(result.run_uri, manifest.step) for manifest in manifests}
    named = {uri for uri in (result.best_checkpoint, result.last_checkpoint) if uri}
    return [f"{uri} is named by {RESULT_FILE}, and has no {MANIFEST_FILE}" for uri in sorted(named - there)]

"""What a run begins with: its own newest checkpoint, the whole state of another run's, or weights alone."""

from collections.abc import Callable, Sequence

from configs.loading import ConfigError
from configs.schema import NOT_IN_HASH, FinetuneConfig
from runs.layout import DataFingerprints, Manifest, checkpoint_uri, run_of
from runs.reading import best, missing_of_completed, newest, survey
from training.checkpoints.store import read_manifest, resolve_start
from training.models.files import is_hub_id
from training.planning.changes import MAY_CHANGE_WITH_WHOLE_STATE, differences
from training.planning.paths import about_key, absolute
from utils.storage.bucket import check_readable, is_remote, open_store


def starting_weights(config: FinetuneConfig, storage: str) -> tuple[str, str | None, str | None]:
    """(base model, adapter, what the run is a continuation of)."""
    adapter = None
    if config.initial_base_model_ckpt_path:
        base = resolve("initial_base_model_ckpt_path", config.initial_base_model_ckpt_path, storage)
    elif is_hub_id(config.model_id):
        base = config.model_id
    else:
        base = absolute(config.model_id)
        if is_remote(base):
            with about_key("model_id"):
                check_readable(base)
    if config.initial_adapter_model_ckpt_path:
        adapter = resolve("initial_adapter_model_ckpt_path", config.initial_adapter_model_ckpt_path, storage)
    return base, adapter, adapter or (base if config.initial_base_model_ckpt_path else None)


def newest_of_the_same_run(
    config: FinetuneConfig, run_uri: str, outcome_hash: str, data: DataFingerprints
) -> tuple[str | None, list[str]]:
    """(URI of the checkpoint to go on from, if the run has begun before; what is wrong with others of its checkpoints)."""
    store = open_store(run_uri)
    manifests, damage = survey(store)
    if lost := missing_of_completed(store, manifests):
        raise ConfigError(
            f"the run {run_uri} is completed, and its checkpoints are damaged:\n{listed(damage or lost)}\n"
            "Choose another run_name to train it again, or remove the run."
        )
    last = newest(manifests)
    if last is None and damage:
        raise ConfigError(
            f"the run {run_uri} has begun before, and none of its checkpoints is whole:\n{listed(damage)}\n"
            "Bring back what is missing, or choose another run_name. To train it from the beginning, remove the run."
        )
    if last is None:
        return None, []
    if config.resume == "never":
        raise ConfigError(
            f"resume: never, and the run {run_uri} has begun before. Choose another run_name, or leave resume out to go on."
        )
    changed = differences(store, last, config, may_change=NOT_IN_HASH)
    if last.data.train != data.train:
        changed.append("train_path: its rows are others now")
    if last.data.valid != data.valid:
        changed.append("valid_path: its rows are others now")
    if not changed and last.config_hash != outcome_hash:
        changed.append("a key that decides the outcome")
    if changed:
        longer = any(line.startswith(("num_epochs", "max_steps", "min_update_steps")) for line in changed)
        advice = (
            f"\nTo train it for longer: another run_name, with resume_from_checkpoint: run:{run_uri.rpartition('/')[2]}."
            if longer
            else ""
        )
        raise ConfigError(
            f"the run {run_uri} has begun with other settings or other data; this is what changed:\n{listed(changed)}\n"
            "Choose another run_name for a new run, or go back to its settings (its config.yaml) to continue it."
            + advice
        )
    return checkpoint_uri(run_uri, last.step), damage


def whole_state(config: FinetuneConfig, storage: str, data: DataFingerprints, steps: int) -> str | None:
    """URI of the checkpoint whose whole trainer state a new run takes."""
    if config.resume_from_checkpoint is None:
        return None
    key = "resume_from_checkpoint"
    checkpoint = resolve(key, config.resume_from_checkpoint, storage, newest)
    manifest = read_manifest(checkpoint)
    changed = differences(
        open_store(run_of(checkpoint)), manifest, config, may_change=MAY_CHANGE_WITH_WHOLE_STATE
    )
    if manifest.data.train != data.train:
        changed.append("train_path: its rows are others now")
    if changed:
        holds_adapter = any(file.path == "adapter_config.json" for file in manifest.files)
        raise ConfigError(
            f"{key}: {checkpoint} cannot be taken whole (weights, optimizer, schedule, position in the data), because this changed "
            f"since:\n{listed(changed)}\nGo back to those settings, or start from its weights alone: "
            f"{'initial_adapter_model_ckpt_path' if holds_adapter else 'initial_base_model_ckpt_path'}: {config.resume_from_checkpoint}"
        )
    if manifest.step >= steps:
        raise ConfigError(
            f"{key}: {checkpoint} stands at step {manifest.step} already, and the run is to have {steps}. Raise num_epochs or max_steps: "
            "both count from the first run's beginning."
        )
    return checkpoint


def resolve(
    key: str, uri: str, storage: str, choose: Callable[[list[Manifest]], Manifest | None] = best
) -> str:
    """The place that a key names as a start, once it is known to be there."""
    if uri.startswith("run:"):
        return resolve_start(uri, storage, choose=choose)
    if is_hub_id(uri):
        return uri
    with about_key(key):
        check_readable(absolute(uri))
    return resolve_start(absolute(uri), storage, choose=choose)


def listed(lines: Sequence[str]) -> str:
    """Lines of a refusal, below its first."""
    return "\n".join(f"  {line}" for line in lines)

"""Find the checkpoint or weights that a run starts from, and reject settings that differ but must match the checkpoint's."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from configs.loading import ConfigError
from configs.schema import DEVICE_KEYS, NOT_IN_HASH, FinetuneConfig, LoraConfig, config_hash
from runs.layout import DataFingerprints, Manifest, checkpoint_uri, run_of
from runs.reading import best, latest, missing_of_completed, read_config, survey
from training.checkpoints.store import read_manifest, resolve_start
from training.models.files import AdapterFacts, is_hub_id
from training.planning.deepspeed import Execution, check_resharding, offloads
from training.planning.paths import about_key, absolute
from utils.storage.bucket import Store, check_readable, open_store

# A restored trainer state retains its position in the rows, its optimizer and its schedule. Keys that determine none of
# them may change; a longer run takes its schedule over the new length.
MAY_CHANGE_WITH_COMPLETE_STATE = NOT_IN_HASH | {
    "num_epochs",
    "max_steps",
    "min_update_steps",
    "train_path",  # the rows themselves are compared
    "columns",
    "ignore_columns",
    "valid_path",
    "early_stopping_patience",
    "early_stopping_threshold",
    "eval_batch_size_per_device",
    "eval_first",
    "checkpoint_and_evaluation_frequency",
    "eval_steps",
    "save_steps",
    "resume_from_checkpoint",
    "device",
    "kernels",
    "gradient_checkpointing",
    "flash_attention_2",
    "deterministic",
}


def starting_weights(config: FinetuneConfig, storage: str) -> tuple[str, str | None, str | None]:
    """Return (base model, adapter, URI of the weights that the run continues)."""
    adapter = None
    if config.initial_base_model_ckpt_path:
        base = resolve("initial_base_model_ckpt_path", config.initial_base_model_ckpt_path, storage)
    elif is_hub_id(config.model_id):
        base = config.model_id
    else:
        base = absolute(config.model_id)
        with about_key("model_id"):
            check_readable(base)
    if config.initial_adapter_model_ckpt_path:
        adapter = resolve("initial_adapter_model_ckpt_path", config.initial_adapter_model_ckpt_path, storage)
    return base, adapter, adapter or (base if config.initial_base_model_ckpt_path else None)


def latest_of_the_same_run(
    config: FinetuneConfig, execution: Execution, run_uri: str, outcome_hash: str, data: DataFingerprints
) -> tuple[str | None, list[str]]:
    """Return (URI of the run's latest checkpoint, or None for a new run; damage of its other checkpoints)."""
    store = open_store(run_uri)
    manifests, damage = survey(store)
    if lost := missing_of_completed(store, manifests):
        raise ConfigError(
            f"the run {run_uri} is completed, but its checkpoints are damaged:\n{listed(damage or lost)}\n"
            "Choose another run_name to train it again, or remove the run."
        )
    last = latest(manifests)
    if last is None and damage:
        raise ConfigError(
            f"the run {run_uri} has checkpoints, but none is complete:\n{listed(damage)}\n"
            "Restore the missing files, or choose another run_name. To restart training from step 0, remove the run."
        )
    if last is None:
        return None, []
    if config.resume == "never":
        raise ConfigError(
            f"resume: never, but the run {run_uri} has checkpoints. Choose another run_name, or remove resume to continue the run."
        )
    changed = differences(store, last, config, execution, may_change=NOT_IN_HASH)
    if last.data.train != data.train:
        changed.append("train_path: the rows have changed")
    if last.data.valid != data.valid:
        changed.append("valid_path: the rows have changed")
    if not changed and last.config_hash != outcome_hash and not _has_other_devices(store, last, config):
        changed.append("a key that affects the result")
    if changed:
        longer = any(line.startswith(("num_epochs", "max_steps", "min_update_steps")) for line in changed)
        advice = (
            f"\nTo train longer, choose another run_name and write resume_from_checkpoint: run:{run_uri.rpartition('/')[2]}."
            if longer
            else ""
        )
        raise ConfigError(
            f"the run {run_uri} was started with different settings or data:\n{listed(changed)}\n"
            "Choose another run_name for a new run, or restore the original settings (its config.yaml) to continue it."
            + advice
        )
    _check_resharding(last, config, execution)
    return checkpoint_uri(run_uri, last.step), damage


def recorded_paths(config: FinetuneConfig, run_uri: str, data: DataFingerprints) -> dict[str, Any]:
    """Return the data keys of a run with checkpoints whose paths differ from the configuration's, but whose rows are equal.

    Args:
        config: The configuration as the user wrote it.
        run_uri: The run with its name.
        data: Its rows.
    """
    store = open_store(run_uri)
    stored = read_config(store)
    earlier = stored.config if stored else None
    if earlier is None or (earlier.train_path, earlier.valid_path) == (config.train_path, config.valid_path):
        return {}
    last = latest(survey(store)[0])
    if last is None:
        return {}
    paths = {}
    if last.data.train == data.train:
        paths["train_path"] = earlier.train_path
    if last.data.valid == data.valid:
        paths["valid_path"] = earlier.valid_path
    return paths


def complete_state(
    config: FinetuneConfig,
    recorded: FinetuneConfig,
    execution: Execution,
    storage: str,
    data: DataFingerprints,
    steps: int,
) -> str | None:
    """Return the URI of the checkpoint whose complete trainer state a new run restores, or None.

    Args:
        config: The configuration with the paths to read.
        recorded: The configuration that the run records.
        execution: Its DeepSpeed settings.
        storage: URI that holds the runs.
        data: The rows.
        steps: Optimizer steps of the run.
    """
    if config.resume_from_checkpoint is None:
        return None
    key = "resume_from_checkpoint"
    checkpoint = resolve(key, config.resume_from_checkpoint, storage, latest)
    manifest = read_manifest(checkpoint)
    changed = differences(
        open_store(run_of(checkpoint)),
        manifest,
        recorded,
        execution,
        may_change=MAY_CHANGE_WITH_COMPLETE_STATE,
    )
    if manifest.data.train != data.train:
        changed.append("train_path: the rows have changed")
    if changed:
        holds_adapter = any(file.path == "adapter_config.json" for file in manifest.files)
        raise ConfigError(
            f"{key}: the trainer state of {checkpoint} (weights, optimizer, schedule, data position) cannot be restored, because "
            f"these settings changed:\n{listed(changed)}\nRestore the original settings, or start from the weights only: "
            f"{'initial_adapter_model_ckpt_path' if holds_adapter else 'initial_base_model_ckpt_path'}: {recorded.resume_from_checkpoint}"
        )
    if manifest.step >= steps:
        raise ConfigError(
            f"{key}: {checkpoint} is already at step {manifest.step} of {steps}. Raise num_epochs or max_steps: both count from the "
            "start of the first run."
        )
    _check_resharding(manifest, config, execution)
    return checkpoint


def _check_resharding(manifest: Manifest, config: FinetuneConfig, execution: Execution) -> None:
    if config.device_counts != (manifest.world_size,):
        check_resharding(config, execution)


def resolve(
    key: str, uri: str, storage: str, choose: Callable[[list[Manifest]], Manifest | None] = best
) -> str:
    """Resolve the model or checkpoint that a key names, after checking that it can be read."""
    if uri.startswith("run:"):
        try:
            return resolve_start(uri, storage, choose=choose)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from error
    if is_hub_id(uri):
        return uri
    with about_key(key):
        check_readable(absolute(uri))
    return resolve_start(absolute(uri), storage, choose=choose)


def batch_size_of(store: Store, config: FinetuneConfig) -> int | None:
    """Return the value of `train_batch_size_per_device: auto` in an earlier run; None if its steps had other rows.

    Args:
        store: The earlier run.
        config: The current configuration, with `auto`.
    """
    stored = read_config(store)
    earlier = stored.config if stored else None
    devices = (config.num_devices, config.sequence_parallel_size)
    if earlier is None or (earlier.num_devices, earlier.sequence_parallel_size) != devices:
        return None
    return earlier.batch_size if earlier.rows_per_step == config.train_batch_size else None


def differences(
    store: Store,
    manifest: Manifest,
    config: FinetuneConfig,
    execution: Execution,
    *,
    may_change: frozenset[str] | set[str],
) -> list[str]:
    """Return the settings that differ from an earlier run's, as `key: then -> now`.

    num_devices and the keys that go with it may change as long as each step trains on the same rows.

    Args:
        store: The earlier run.
        manifest: Its checkpoint to resume from.
        config: The current configuration.
        execution: Its DeepSpeed settings.
        may_change: Keys that are not compared.
    """
    stored = read_config(store)
    # Without a readable configuration, the manifest's hash still shows that something changed.
    earlier = stored.config if stored else None
    if earlier is not None:
        if _takes_the_same_steps(earlier, config):
            may_change = may_change | DEVICE_KEYS
        changed = list(_changed_keys(earlier, config, may_change))
        then, now = earlier.rows_per_step, config.rows_per_step
        if then != now and any(line.startswith("num_devices") for line in changed):
            changed.append(f"rows per step: {then} -> {now} (num_devices may change if they stay the same)")
    else:
        changed = []
        if manifest.world_size not in config.device_counts:
            changed.append(f"num_devices: {manifest.world_size} -> {_shown(config.num_devices)}")
    if not any(line.startswith("deepspeed") for line in changed):
        # A custom file may have changed under the same name.
        if manifest.zero_stage != execution.zero_stage:
            changed.append(f"deepspeed: ZeRO stage {manifest.zero_stage} -> {execution.zero_stage}")
        elif manifest.offload not in (None, offloaded := offloads(execution.deepspeed)):
            changed.append(f"deepspeed: offloads {_shown(manifest.offload)} -> {_shown(offloaded)}")
    return changed


def _takes_the_same_steps(earlier: FinetuneConfig, config: FinetuneConfig) -> bool:
    """Return whether another number of devices trains on the same rows in each step, with the same loss."""
    return (
        earlier.num_devices != config.num_devices
        and earlier.rows_per_step == config.rows_per_step
        and not config.preference.takes_unpaired_rows
    )


def _has_other_devices(store: Store, manifest: Manifest, config: FinetuneConfig) -> bool:
    """Return whether the hashes of a checkpoint and the configuration differ by DEVICE_KEYS only."""
    if manifest.hash_without_devices is not None:
        return manifest.hash_without_devices == config_hash(config, without=DEVICE_KEYS)
    stored = read_config(store)
    earlier = stored.config if stored else None
    return earlier is not None and _takes_the_same_steps(earlier, config)


def _changed_keys(
    earlier: FinetuneConfig, config: FinetuneConfig, may_change: frozenset[str] | set[str]
) -> Iterator[str]:
    then, now = earlier.model_dump(mode="json"), config.model_dump(mode="json")
    for key in now:
        if key in may_change or then[key] == now[key]:
            continue
        if isinstance(then[key], dict) and now[key] is None:
            yield f"{key}: set in the run, missing from the YAML"
            continue
        if isinstance(then[key], dict) and isinstance(now[key], dict):
            for name in now[key]:
                if then[key].get(name) != now[key][name]:
                    yield f"{key}.{name}: {_shown(then[key].get(name))} -> {_shown(now[key][name])}"
        else:
            yield f"{key}: {_shown(then[key])} -> {_shown(now[key])}"


def adapter_differences(
    adapter: AdapterFacts, lora: LoraConfig, targets: Sequence[str], asked_targets: Sequence[str]
) -> list[str]:
    """Return the keys given in the YAML's `lora_config` that differ from the continued adapter.

    Args:
        adapter: The adapter.
        lora: The YAML's lora_config.
        targets: The modules and parameters that the adapter covers.
        asked_targets: Those that the YAML's lora_config would cover.
    """
    changed = []
    for name in sorted(lora.model_fields_set):
        asked, has = getattr(lora, name), adapter.lora.get(name, LoraConfig.model_fields[name].default)
        if name == "target_modules":
            asked, has = asked_targets, targets
        if asked != has:
            changed.append(f"lora_config.{name}: {_shown(has)} in the adapter, {_shown(asked)} in the YAML")
    return changed


def listed(lines: Sequence[str]) -> str:
    """Indent the lines of an error message that follow its first line."""
    return "\n".join(f"  {line}" for line in lines)


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:120]}…"

"""What a continued run may change, decided in one place: the same run, a run that takes another's whole state, an adapter."""

import re
from collections.abc import Iterator
from typing import Any

from configs.schema import NOT_IN_HASH, FinetuneConfig, LoraConfig
from runs.layout import Manifest
from runs.reading import read_config
from training.models.files import AdapterFacts, ModelFacts, targeted_modules
from utils.storage.bucket import Store

# A whole trainer state goes on where it stood in its rows, with the optimizer and the schedule it has. What decides
# neither may change; a longer run stretches the schedule over the steps that are to come.
MAY_CHANGE_WITH_WHOLE_STATE = NOT_IN_HASH | {
    "num_epochs",
    "max_steps",
    "min_update_steps",
    "train_path",  # its rows are compared themselves
    "columns",
    "valid_path",
    "eval_batch_size_per_device",
    "eval_first",
    "checkpoint_and_evaluation_frequency",
    "resume_from_checkpoint",
    "device",
    "kernels",
    "gradient_checkpointing",
    "flash_attention_2",
    "deterministic",
}


def differences(
    store: Store, manifest: Manifest, config: FinetuneConfig, *, may_change: frozenset[str] | set[str]
) -> list[str]:
    """What a run's configuration says otherwise than `config`, as `key: then -> now`, for keys that may not change.

    Args:
        store: The earlier run.
        manifest: Its checkpoint that is continued.
        config: The configuration now.
        may_change: Keys that are not compared.
    """
    stored = read_config(store)
    # Of one that cannot be read, the manifest's hash still shows whether something changed.
    earlier = stored.config if stored else None
    changed = list(_changed_keys(earlier, config, may_change)) if earlier is not None else []
    if manifest.world_size not in config.device_counts and not any("num_devices" in line for line in changed):
        changed.append(f"num_devices: {manifest.world_size} -> {_shown(config.num_devices)}")
    return changed


def batch_size_of(store: Store, config: FinetuneConfig) -> int | None:
    """What `train_batch_size_per_device: auto` came to in an earlier run; None where a step of it had other rows.

    Args:
        store: The earlier run.
        config: The configuration now, which says auto.
    """
    stored = read_config(store)
    earlier = stored.config if stored else None
    if earlier is None or earlier.num_devices != config.num_devices:
        return None
    rows = earlier.most_devices * earlier.batch_size * earlier.gradient_accumulation_steps
    return earlier.batch_size if rows == config.train_batch_size else None


def _changed_keys(
    earlier: FinetuneConfig, config: FinetuneConfig, may_change: frozenset[str] | set[str]
) -> Iterator[str]:
    then, now = earlier.model_dump(mode="json"), config.model_dump(mode="json")
    for key in now:
        if key in may_change or then[key] == now[key]:
            continue
        if isinstance(then[key], dict) and now[key] is None:
            yield f"{key}: the run has it, the YAML has none"
            continue
        if isinstance(then[key], dict) and isinstance(now[key], dict):
            for name in now[key]:
                if then[key].get(name) != now[key][name]:
                    yield f"{key}.{name}: {_shown(then[key].get(name))} -> {_shown(now[key][name])}"
        else:
            yield f"{key}: {_shown(then[key])} -> {_shown(now[key])}"


def adapter_differences(adapter: AdapterFacts, lora: LoraConfig | None, model: ModelFacts) -> list[str]:
    """What the YAML's `lora_config` says otherwise than the adapter that it continues, for the keys that it gives."""
    changed = []
    for name in sorted(lora.model_fields_set if lora else ()):
        asked, has = getattr(lora, name), adapter.lora.get(name, LoraConfig.model_fields[name].default)
        if name == "target_modules" and lora is not None:
            asked = sorted(targeted_modules(model, lora))
            has = sorted(adapter.modules)
        if asked != has:
            changed.append(
                f"lora_config.{name}: the adapter has {_shown(has)}, the YAML says {_shown(asked)}"
            )
    return changed


def misfits(adapter: AdapterFacts, model: ModelFacts) -> list[str]:
    """Where an adapter's matrices do not fit the base model's: module, and what was found."""
    wrong = [f"the adapter has nothing for {module}" for module in _other_layers(adapter, model)]
    for module, (outputs, inputs) in sorted(adapter.modules.items()):
        shape = model.matrix_shapes.get(module)
        if shape is None:
            wrong.append(f"the model has no {module}")
        elif shape != (outputs, inputs):
            wrong.append(
                f"{module} is {shape[0]} x {shape[1]} in the model, {outputs} x {inputs} in the adapter"
            )
    return wrong


def _other_layers(adapter: AdapterFacts, model: ModelFacts) -> list[str]:
    """Modules of the model that the adapter covers in other layers only: it was trained on a model with fewer."""
    chosen = [adapter.lora.get(key) for key in ("layers_to_transform", "exclude_modules")]
    targets = adapter.lora.get("target_modules")
    if any(chosen) or not isinstance(targets, list) or any(re.search(r"\d", name) for name in targets):
        return []  # it may have been told to leave layers out
    covered = {re.sub(r"\.\d+\.", ".*.", module) for module in adapter.modules}
    return sorted(
        module
        for module in model.matrix_shapes
        if module not in adapter.modules and re.sub(r"\.\d+\.", ".*.", module) in covered
    )


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:120]}…"

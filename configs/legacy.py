"""Convert LLMForge's keys to current keys.

Every old key gives one warning that names its replacement. Old settings that this project does not support become
rejections: the file can be loaded and printed, but a run on it is an error. No setting is dropped silently.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from configs.prompt_format import to_chat_template
from configs.schema import DEEPSPEED_PRESETS, FinetuneConfig
from configs.yaml_source import Document, KeyPath, Origin, dotted, shown

IGNORED = frozenset({"dataset_size_scaling_factor"})
"""Old keys without effect that LLMForge's own files contain twice."""

_NO_EFFECT = {
    "dataset_size_scaling_factor": "the complete data set is always used",
    "num_data_blocks_per_device": "rows are not split into blocks",
    "data_processor_config": "rows are prepared before training, on all CPUs of the driver or the cluster",
}
_LIGER_KERNELS = ("rms_norm", "rope", "swiglu", "cross_entropy", "fused_linear_cross_entropy")


@dataclass
class Migration:
    """The result of converting the old keys of a document, which is modified in place."""

    document: Document
    warnings: list[tuple[Origin, str]] = field(default_factory=list)
    rejections: list[tuple[Origin, str]] = field(default_factory=list)

    def has(self, key: str) -> bool:
        """Return true if the document sets a top-level key."""
        return key in self.document.data

    def warn(self, path: KeyPath, text: str) -> None:
        """Add a warning that names the replacement of the value at `path`."""
        self.warnings.append((self.document.origin(path), f"`{dotted(path)}` {text}"))

    def reject(self, path: KeyPath, text: str) -> None:
        """Add a rejection of the unsupported value at `path`."""
        self.rejections.append((self.document.origin(path), f"`{dotted(path)}` {text}"))

    def no_effect(self, path: KeyPath, reason: str) -> None:
        """Warn that the value at `path` has no effect."""
        self.warn(path, f"has no effect any more: {reason}; remove it")

    def not_run(self, path: KeyPath) -> None:
        """Warn that runs do not support the value at `path`; the rejection explains why."""
        self.warn(path, "is no longer supported: a run with it is rejected")

    def take(self, path: KeyPath) -> Any:
        """Remove the value at `path` and return it."""
        section = self.document.data
        for key in path[:-1]:
            section = section[key]
        return section.pop(path[-1])

    def replace(self, old: str, new: str, value: Any, instead: str) -> None:
        """Move the value of the key `old` to `new`, converted to `value`, and add the warning.

        If both are set, an override takes precedence over the file; within one of them it is an error.
        """
        self.warn((old,), f"is LLMForge's spelling: write {instead} instead")
        origin = self.document.origin((old,))
        if old != new:
            self.take((old,))
            if self.has(new):
                other = self.document.origin((new,))
                if origin.from_override == other.from_override:
                    self.document.complain((new,), f"`{new}` and `{old}` set the same option: keep `{new}`")
                if not origin.from_override:
                    return
        self.document.put((new,), Document(value, {(): origin}))


def migrate(document: Document) -> Migration:
    """Convert the old keys of a top-level mapping, in place.

    A value that is invalid for its old key stays in place and becomes a problem of the document.
    """
    migration = Migration(document)
    for key in list(document.data):
        if key in _NO_EFFECT:
            migration.no_effect((key,), _NO_EFFECT[key])
            migration.take((key,))
        elif key in _RULES and key not in FinetuneConfig.model_fields and document.data[key] is None:
            migration.no_effect((key,), "it is empty")
            migration.take((key,))
        elif key in _RULES:
            _RULES[key](migration, document.data[key])
    if (migration.warnings or migration.rejections) and not migration.has("task"):
        origin = document.origin(())
        migration.warnings.append(
            (
                origin,
                "`task` is not set: LLMForge's default was causal_lm, here it is "
                "instruction_tuning; add `task:`",
            )
        )
    return migration


def _deepspeed(migration: Migration, value: Any) -> None:
    """Replace a path into LLMForge's directory of ZeRO configurations with the preset of the same name."""
    if (
        not isinstance(value, dict)
        or set(value) != {"config_path"}
        or not isinstance(value["config_path"], str)
    ):
        return
    path = PurePosixPath(value["config_path"])
    shipped = path.parts[-2:-1] == ("deepspeed_configs",) or path.parts[-3:-1] == ("configs", "deepspeed")
    if shipped and path.suffix == ".json" and path.stem in DEEPSPEED_PRESETS:
        migration.warn(
            ("deepspeed", "config_path"), f"is LLMForge's spelling: write `deepspeed: {path.stem}` instead"
        )
        origin = migration.document.origin(("deepspeed", "config_path"))
        migration.document.put(("deepspeed",), Document(path.stem, {(): origin}))


def _no_gradient_checkpoint(migration: Migration, value: Any) -> None:
    path = ("no_gradient_checkpoint",)
    if not isinstance(value, bool):
        _wrong_value(migration, path, value, "true or false; the current key is `gradient_checkpointing`")
        return
    written = str(not value).lower()
    migration.replace(path[0], "gradient_checkpointing", not value, f"`gradient_checkpointing: {written}`")


def _checkpoint_every_n_epochs(migration: Migration, value: Any) -> None:
    path = ("checkpoint_every_n_epochs",)
    if not _is_count(value):
        _wrong_value(
            migration, path, value, "an integer; the current key is `checkpoint_and_evaluation_frequency`"
        )
        return
    migration.replace(
        path[0],
        "checkpoint_and_evaluation_frequency",
        {"unit": "epochs", "frequency": value},
        f"`checkpoint_and_evaluation_frequency: {{unit: epochs, frequency: {value}}}`",
    )


def _max_num_checkpoints(migration: Migration, value: Any) -> None:
    path = ("max_num_checkpoints",)
    if not _is_count(value):
        _wrong_value(migration, path, value, "an integer; the current key is `num_checkpoints_to_keep`")
        return
    migration.replace(path[0], "num_checkpoints_to_keep", value, f"`num_checkpoints_to_keep: {value}`")


def _liger_kernel(migration: Migration, value: Any) -> None:
    path = ("liger_kernel",)
    enabled = value.get("enabled", False) if isinstance(value, dict) else None
    kwargs = value.get("kwargs") or {} if isinstance(value, dict) else None
    if not isinstance(enabled, bool) or not isinstance(kwargs, dict) or set(value) - {"enabled", "kwargs"}:
        _wrong_value(
            migration, path, value, "`enabled` (true or false) and `kwargs`; the current key is `kernels`"
        )
        return
    for name, wanted in kwargs.items() if enabled else ():
        if name not in _LIGER_KERNELS or wanted is not True:
            migration.reject(
                (*path, "kwargs", name),
                "cannot be set: `kernels: liger` uses Liger's own selection of kernels for "
                "the model; remove it",
            )
    kernels = "liger" if enabled else "torch"
    migration.replace(path[0], "kernels", kernels, f"`kernels: {kernels}`")


def _checkpoint_uri(key: str) -> Callable[[Migration, Any], None]:
    """Return a rule that replaces `{uri: ADDRESS}` with the address."""

    def rule(migration: Migration, value: Any) -> None:
        if isinstance(value, dict) and set(value) == {"uri"} and isinstance(value["uri"], str):
            migration.replace(key, key, value["uri"], f"`{key}: ADDRESS`, without `uri:`,")
        elif isinstance(value, dict):
            _wrong_value(migration, (key,), value, f"a URI: write `{key}: s3://BUCKET/PREFIX`")

    return rule


def _generation_config(migration: Migration, value: Any) -> None:
    path = ("generation_config",)
    if not isinstance(value, dict) or set(value) - {"prompt_format", "stopping_sequences"}:
        _wrong_value(
            migration, path, value, "`prompt_format` and `stopping_sequences` only; remove the other keys"
        )
        return
    below = (*path, "prompt_format")
    if not value.get("prompt_format"):
        migration.no_effect(path, "the model's own chat template formats and ends conversations")
        migration.take(path)
        return
    try:
        template = to_chat_template(value["prompt_format"])
    except ValueError as error:
        migration.reject(below, f"has no equivalent chat template ({error}); write `chat_template`")
        migration.not_run(path)
        migration.take(path)
        return
    if value.get("stopping_sequences"):
        migration.no_effect((*path, "stopping_sequences"), "the chat template defines the end of an answer")
    migration.replace(path[0], "chat_template", template, "`chat_template`, as printed by --print-config,")


def _classifier_config(migration: Migration, value: Any) -> None:
    path = ("classifier_config",)
    if not isinstance(value, dict):
        return
    if "eval_metrics" in value:
        below = (*path, "eval_metrics")
        asked = value["eval_metrics"] if isinstance(value["eval_metrics"], list) else [value["eval_metrics"]]
        if others := [shown(name) for name in asked if name not in (None, "accuracy", "f1")]:
            migration.reject(
                below, f"does not support {', '.join(others)}: accuracy and F1 are reported; remove it"
            )
            migration.not_run(below)
        else:
            migration.no_effect(below, "accuracy and F1 are always reported")
        migration.take(below)
    _infer_task(migration, path, "classification")


def _preference_tuning_config(migration: Migration, value: Any) -> None:
    path = ("preference_tuning_config",)
    if not isinstance(value, dict):
        return
    if "logprob_processor_scaling_config" in value:
        below = (*path, "logprob_processor_scaling_config")
        migration.no_effect(below, "the reference model runs on the training workers, on the same device")
        migration.take(below)
    _infer_task(migration, path, "preference_tuning")


def _infer_task(migration: Migration, path: KeyPath, task: str) -> None:
    """Set the task, which LLMForge inferred from the section."""
    if not migration.has("task"):
        migration.warn(path, f"does not imply the task any more: add `task: {task}`")
        migration.document.put(("task",), Document(task, {(): migration.document.origin(path)}))


def _logger(migration: Migration, value: Any) -> None:
    """Move the keys of `provider_config` up, next to `provider`; validation checks them there."""
    path = ("logger", "provider_config")
    if not isinstance(value, dict) or "provider_config" not in value:
        return
    settings = value["provider_config"]
    if settings is not None and not isinstance(settings, dict):
        _wrong_value(migration, path, settings, "a section; write its keys next to `provider`")
        return
    settings = dict(settings or {})
    if settings.pop("create_experiment_if_not_exists", True) is not True:
        migration.reject(
            (*path, "create_experiment_if_not_exists"),
            "cannot be false: a missing experiment is always created; remove it",
        )
    keys = ", ".join(f"`{key}`" for key in settings)
    migration.warn(
        path,
        f"is LLMForge's spelling: write {keys} next to `provider` instead" if keys else "is empty: remove it",
    )
    for key, setting in settings.items():
        if key in value:
            migration.document.complain(
                (*path, key), f"`logger.{key}` is set twice: keep the one next to `provider`"
            )
            continue
        origin = migration.document.origin((*path, key))
        migration.document.put(("logger", key), Document(setting, {(): origin}))
    migration.take(path)


def _trainer_resources(migration: Migration, value: Any) -> None:
    migration.no_effect(("trainer_resources",), "Ray Train's controller takes no resources")


def _embedding_scaling_technique(migration: Migration, value: Any) -> None:
    path = ("embedding_scaling_technique",)
    migration.reject(path, "is not supported: models are trained with their own embeddings; remove it")
    migration.not_run(path)
    migration.take(path)


def _vision_language_config(migration: Migration, value: Any) -> None:
    path = ("vision_language_config",)
    migration.reject(path, "is not supported: training uses text only; remove it")
    migration.not_run(path)
    migration.take(path)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong_value(migration: Migration, path: KeyPath, value: Any, expected: str) -> None:
    migration.document.complain(path, f"`{dotted(path)}` is {shown(value)}, but must be {expected}")


_RULES: dict[str, Callable[[Migration, Any], None]] = {
    "deepspeed": _deepspeed,
    "no_gradient_checkpoint": _no_gradient_checkpoint,
    "checkpoint_every_n_epochs": _checkpoint_every_n_epochs,
    "max_num_checkpoints": _max_num_checkpoints,
    "liger_kernel": _liger_kernel,
    "initial_adapter_model_ckpt_path": _checkpoint_uri("initial_adapter_model_ckpt_path"),
    "initial_base_model_ckpt_path": _checkpoint_uri("initial_base_model_ckpt_path"),
    "generation_config": _generation_config,
    "classifier_config": _classifier_config,
    "preference_tuning_config": _preference_tuning_config,
    "logger": _logger,
    "trainer_resources": _trainer_resources,
    "embedding_scaling_technique": _embedding_scaling_technique,
    "vision_language_config": _vision_language_config,
}

"""The training configuration of a job, from the base model's YAML and OpenAI's hyperparameters."""

import math
from typing import Any

from pydantic import ValidationError

from configs.schema import FinetuneConfig
from service.config import BaseModelSettings
from utils.errors import AnnealError

CHECKPOINTS_OF_JOB = 3
"""Checkpoints that a job retains besides the latest one."""

# Keys about the rows or the life of the base's own run; a job has other rows.
_DATA_KEYS: dict[str, Any] = {
    "valid_split": None,
    "max_train_rows": None,
    "max_valid_rows": None,
    "columns": {},
    "ignore_columns": [],
    "bad_rows": "error",
    "prompt_template": None,
    "max_steps": None,
    "min_update_steps": None,
    "resume": "auto",
    "resume_from_checkpoint": None,
    "export": None,
    "logger": None,
    "push_to_hub": False,
    "hub_model_id": None,
    "hub_private_repo": None,
    "eval_samples": None,
    "eval_max_new_tokens": 128,
}


class JobConfigError(AnnealError):
    """An error for a job whose settings do not make a valid training configuration."""


_WITHOUT_VALIDATION: dict[str, Any] = {"early_stopping_patience": None, "early_stopping_threshold": 0.0}


def resolve_hyperparameters(
    method: str, given: dict[str, Any], settings: BaseModelSettings, base: FinetuneConfig
) -> dict[str, Any]:
    """Return the hyperparameters of a job without `auto`.

    Args:
        method: "supervised" or "dpo".
        given: The request's hyperparameters.
        settings: The base model's settings, with the service's defaults.
        base: The base model's training YAML.
    """
    defaults = getattr(settings.hyperparameters, method).model_dump()
    resolved = {"n_epochs": _epochs(base), "batch_size": _batch_size(base), "learning_rate_multiplier": 1.0}
    if method == "dpo":
        resolved["beta"] = 0.1
    for values in (defaults, given):
        resolved |= {name: value for name, value in values.items() if value not in ("auto", None)}
    return resolved


def training_config(
    job: dict[str, Any], base: FinetuneConfig, paths: dict[str, str | None]
) -> FinetuneConfig:
    """Return the configuration of a job's run.

    Args:
        job: The job's record.
        base: The base model's training YAML.
        paths: URIs: `train`, `valid` (or None), `storage`, and where to export the adapter, `publish` (or None).
    """
    keys = _settings(job, base, validates=bool(paths["valid"]))
    keys |= {
        "train_path": paths["train"],
        "valid_path": paths["valid"],
        "storage_path": paths["storage"],
        "run_name": job["id"],
    }
    if paths["publish"]:
        keys["export"] = {"merge": False, "to": paths["publish"]}
    return _validated(keys)


def check_settings(job: dict[str, Any], base: FinetuneConfig) -> None:
    """Raise a JobConfigError if a job's settings do not make a valid training configuration, whatever its files are.

    Args:
        job: The job's record; it need not have an id yet.
        base: The base model's training YAML.
    """
    validates = job["validation_file"] is not None
    valid_path = (base.valid_path or base.train_path) if validates else None
    _validated(_settings(job, base, validates=validates) | {"valid_path": valid_path})


def _settings(job: dict[str, Any], base: FinetuneConfig, *, validates: bool) -> dict[str, Any]:
    """Return the keys of a job's run, with the base's own data files and URIs."""
    keys = base.model_dump(mode="json") | _DATA_KEYS
    hyperparameters = job["hyperparameters"]
    keys |= _batches(base, hyperparameters["batch_size"])
    keys |= {
        "seed": job["seed"],
        "num_epochs": float(hyperparameters["n_epochs"]),
        "learning_rate": base.learning_rate * hyperparameters["learning_rate_multiplier"],
        "data_format": "messages",
        "num_checkpoints_to_keep": max(base.num_checkpoints_to_keep, CHECKPOINTS_OF_JOB),
    }
    if not validates:
        keys |= _WITHOUT_VALIDATION
    if job["method"] == "dpo":
        keys |= {
            "task": "preference_tuning",
            "packing": False,
            "data_format": "preference",
            "preference_tuning_config": {"beta": float(hyperparameters["beta"]), "loss": "dpo"},
        }
    if job["parent_checkpoint"]:
        if base.trains_adapter:
            keys |= {"initial_adapter_model_ckpt_path": job["parent_checkpoint"], "lora_config": None}
        else:
            keys["initial_base_model_ckpt_path"] = job["parent_checkpoint"]
    if job["integrations"]:
        wandb = job["integrations"][0]["wandb"]
        keys["logger"] = {
            "provider": "wandb",
            "project": wandb["project"],
            "entity": wandb.get("entity"),
            "name": wandb.get("name"),
            "tags": wandb.get("tags") or [],
        }
    return keys


def _validated(keys: dict[str, Any]) -> FinetuneConfig:
    try:
        return FinetuneConfig.model_validate(keys)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise JobConfigError(
            f"{'.'.join(map(str, first['loc']))}: {first['msg'][:300]}".lstrip(": ")
        ) from error


def _epochs(base: FinetuneConfig) -> int:
    return math.ceil(base.num_epochs) if base.num_epochs else 3


def _batch_size(base: FinetuneConfig) -> int:
    if base.train_batch_size is not None:
        return base.train_batch_size
    return base.rows_per_step  # the schema requires train_batch_size with auto


def _batches(base: FinetuneConfig, batch_size: int) -> dict[str, Any]:
    """Return the keys that train on `batch_size` rows per step, on as many devices as can share them equally."""
    if batch_size == _batch_size(base):
        return {}
    devices = _devices(base, batch_size)
    if base.train_batch_size_per_device == "auto":
        return {"num_devices": devices, "train_batch_size": batch_size}
    share = batch_size // devices
    rows = max(number for number in range(1, base.train_batch_size_per_device + 1) if share % number == 0)
    return {
        "num_devices": devices,
        "train_batch_size_per_device": rows,
        "gradient_accumulation_steps": share // rows,
    }


def _devices(base: FinetuneConfig, batch_size: int) -> int:
    return max(number for number in range(1, base.most_devices + 1) if batch_size % number == 0)
